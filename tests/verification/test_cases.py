"""The default cases of verify catch the mistakes that only show where importance, ties, NaN or counts decide."""

from __future__ import annotations

import functools

import pytest
import torch

from nsa_gen.verification import OracleParameters, Row, make_inputs, reference_attention
from nsa_gen.verification.cases import Case, default_cases
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.reference.inputs import KINDS, kinds_of
from tests.mutants.model import SPECS, build
from tests.mutants.table import BY_NAME
from tests.support import DEVICE, GPU, operator_of_spec
from tests.verification.verification_specs import spec_of

SUBTLE = (
    "overlap_weights_shifted",
    "importance_of_one_head",
    "ties_to_the_higher_block",
    "nan_importance_ranks_first",
    "underflowed_block_dropped",
    "slots_beyond_the_counts_listed",
)


def contested(name: str) -> list[Case]:
    """The default cases of one of the mutants' specs that have more blocks than slots."""
    cases, notes = default_cases(SPECS[name], interpreted=True, lengths=None, packed=True, batch=1)
    selection = SPECS[name].selection
    assert selection is not None and not any("slots" in note for note in notes)
    bound = selection.count * selection.block
    return [case for case in cases if case.variation is None and (case.tokens_kv or 0) > bound]


def run(name: str, case: Case, module: object) -> list[Row]:
    op = operator_of_spec(SPECS[name])
    inputs = make_inputs(
        op.spec, batch=1, tokens=case.tokens, tokens_kv=case.tokens_kv, kind=case.kind, seed=1, device=DEVICE
    )  # type: ignore[arg-type]
    return check_case(module, op.parameters, case, inputs, with_gradients=case.gradients)


@functools.cache
def right_package_passes(name: str) -> bool:
    module = operator_of_spec(SPECS[name]).module
    return all(row.ok for case in contested(name) for row in run(name, case, module))


@pytest.mark.skipif(GPU, reason="mutants keep within their tensors for the interpreter's tile sizes alone")
@pytest.mark.parametrize("mutant", SUBTLE)
def test_a_subtle_mistake_is_caught_by_the_default_cases(mutant: str) -> None:
    name = BY_NAME[mutant].check.spec
    assert right_package_passes(name)
    module = build(BY_NAME[mutant])
    assert any(not row.ok for case in contested(name) for row in run(name, case, module)), f"{mutant} survives"


def test_every_kind_that_says_something_of_a_spec_is_among_its_cases() -> None:
    assert set(KINDS) - set(kinds_of(OracleParameters.from_spec(spec_of()))) == {"counts"}
    given = spec_of(indices_given=True)
    assert set(KINDS) - set(kinds_of(OracleParameters.from_spec(given))) == {"ties", "abyss"}
    for spec, wanted in ((spec_of(), {"ties", "abyss", "nan"}), (given, {"counts"})):
        cases, _ = default_cases(spec, interpreted=True, lengths=None, packed=True, batch=1)
        assert wanted <= {case.kind for case in cases if (case.tokens_kv or 0) > 5 * 16}
        p = OracleParameters.from_spec(spec)
        everywhere, _ = default_cases(spec, interpreted=False, lengths=None, packed=True, batch=2)
        assert set(kinds_of(p)) == {case.kind for case in everywhere}


def test_an_abyss_underflows_float32_and_ties_repeat_every_selection_block() -> None:
    spec = spec_of()
    p = OracleParameters.from_spec(spec)
    deep = make_inputs(spec, tokens=6, tokens_kv=126, kind="abyss", dtype=torch.float64)
    found = reference_attention(p, **deep.arguments()).importance
    assert found is not None and (found < 1e-46).float().mean() > 0.5 and (found > 0.1).any()
    assert torch.isfinite(deep.q.half()).all()
    tied = make_inputs(spec, tokens=126, kind="ties")
    assert tied.k is not None and torch.equal(tied.k[:, 16:32], tied.k[:, :16])
    external = make_inputs(spec_of(phi="external"), tokens=126, kind="ties")
    assert external.k_cmp is not None and torch.equal(external.k_cmp[:, 4:8], external.k_cmp[:, :4])


def test_counts_lie_between_zero_and_the_slots_and_often_cut_some_off() -> None:
    inputs = make_inputs(spec_of(indices_given=True, count=4), tokens=80, kind="counts")
    assert inputs.counts is not None and inputs.indices is not None
    assert inputs.counts.dtype == torch.int32 and inputs.counts.shape == inputs.indices.shape[:-1]
    assert set(inputs.counts.unique().tolist()) == {0, 1, 2, 3, 4}
    assert (inputs.counts < (inputs.indices >= 0).sum(-1)).any()


def test_a_spec_with_too_many_keys_for_the_interpreter_says_so() -> None:
    cases, notes = default_cases(spec_of(count=256), interpreted=True, lengths=None, packed=True, batch=1)
    assert any("4158 keys" in note for note in notes) and max(case.tokens_kv or 0 for case in cases) < 200
