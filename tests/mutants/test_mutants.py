"""Packages with one mistake each fail the verification, and the same packages without it pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa_gen.verification import Row
from tests.mutants.model import (
    SPECS,
    CacheCheck,
    Check,
    Edit,
    Equivalent,
    Mutant,
    StaleMutantError,
    bits,
    build,
    edited,
    failures,
    run,
    source_of,
)
from tests.mutants.table import CHECKS, EQUIVALENT, HEAD, MUTANTS, PAGE, page
from tests.support import GPU, operator_of_spec

pytestmark = [
    pytest.mark.skipif(GPU, reason="mutants keep within their tensors for the interpreter's tile sizes alone"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of mistakes that divide by zero
]

A_MUTANT = MUTANTS[0]
FEWEST = 28
"""Below this number of mutants the list is no measure of the verification."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_package_with_a_mistake_fails_its_check(mutant: Mutant) -> None:
    found = failures(mutant.check, build(mutant))
    survived = [quantity for quantity in mutant.killed_by if quantity not in found]
    assert not survived, (
        f"the mutant {mutant.name} ({mutant.mistake}) survives in {', '.join(survived)} of the check "
        f"{mutant.check.label}; what fails there: {found or 'nothing'}"
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.label)
def test_the_package_without_a_mistake_passes_the_same_check(check: Check | CacheCheck) -> None:
    rows = run(check)
    assert [row for row in rows if not row.ok] == []
    compared = {row.quantity for row in rows}
    named = {quantity for mutant in MUTANTS if mutant.check == check for quantity in mutant.killed_by}
    assert named and named <= compared, named - compared


@pytest.mark.parametrize("spec", SPECS)
def test_every_edit_fits_the_generated_text_as_often_as_it_says(spec: str) -> None:
    texts = source_of(operator_of_spec(SPECS[spec]).folder)
    mutants = [mutant for mutant in MUTANTS if mutant.check.spec == spec]
    assert mutants
    for mutant in mutants:
        for name, text in edited(mutant, texts).items():
            assert text != texts[name], mutant.name
            compile(text, f"{mutant.name}/{name}", "exec")


@pytest.mark.parametrize("edit", EQUIVALENT, ids=lambda edit: edit.name)
def test_an_edit_that_is_said_to_change_no_result_changes_no_bit(edit: Equivalent) -> None:
    texts = source_of(operator_of_spec(SPECS[edit.check.spec]).folder)
    assert all(text != texts[name] for name, text in edited(edit, texts).items())
    right = bits(edit.check)
    changed = {name: x for name, x in bits(edit.check, build(edit)).items() if not torch.equal(x, right[name])}
    assert right and not changed


def test_there_are_enough_mutants_and_each_has_a_name_and_a_reason_of_its_own() -> None:
    assert len(MUTANTS) >= FEWEST
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.edits, mutant.check.spec) for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.killed_by and mutant.edits and mutant.name.isidentifier() for mutant in MUTANTS)


@pytest.mark.parametrize(
    "edit",
    [
        Edit("kernels/selected_attention.py", "text of a template long gone", ""),
        Edit("kernels/selected_attention.py", "tl.load(", "tl.load("),
        Edit("a_file_long_gone.py", "x", "y"),
    ],
    ids=["text gone", "text more often", "file gone"],
)
def test_a_mutant_whose_text_is_no_longer_in_the_package_is_an_error(edit: Edit) -> None:
    texts = source_of(operator_of_spec(SPECS[A_MUTANT.check.spec]).folder)
    with pytest.raises(StaleMutantError, match=A_MUTANT.name):
        edited(replace(A_MUTANT, edits=(edit,)), texts)


def test_a_mutant_that_changes_no_result_is_found_to_survive() -> None:
    (first, *_) = (mutant for mutant in MUTANTS if mutant.check.spec == "window" and not mutant.check.gradients)
    harmless = Edit("kernels/banded.py", "end = position + 1 if", "end = 1 + position if")
    mutant = replace(first, name="nothing_changed", edits=(harmless,))
    assert failures(mutant.check, build(mutant)) == {}
    with pytest.raises(AssertionError, match="nothing_changed"):
        test_a_package_with_a_mistake_fails_its_check(mutant)


def test_every_kind_of_comparison_has_caught_a_mutant() -> None:
    caught = {quantity for mutant in MUTANTS for quantity in mutant.killed_by}
    branches = ("cmp", "slc", "win")
    expected = {"o", "selection", "determinism", "k_cmp", "v_cmp", "dq", "dk", "dv", "dgates"}
    expected |= {f"{output}_{branch}" for output in ("o", "lse") for branch in branches}
    assert expected <= caught and any(quantity.startswith("dcompression.") for quantity in caught)


def test_the_page_about_mutants_is_in_step_with_the_list() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.mutants.table --write"
    assert HEAD in page() and all(f"`{mutant.name}`" in page() for mutant in MUTANTS)


def test_a_row_that_fails_names_its_quantity_and_reason() -> None:
    found = failures(A_MUTANT.check, build(A_MUTANT))
    assert set(A_MUTANT.killed_by) <= found.keys()
    assert isinstance(run(A_MUTANT.check)[0], Row) and all("error" in reason for reason in found.values())
