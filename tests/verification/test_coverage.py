"""The fixed cases exercise every schedule and option of a package, or the report names what they leave out."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from nsa_gen.lowering import lower
from nsa_gen.spec import Spec, load_spec
from nsa_gen.verification import Inputs, OracleParameters
from nsa_gen.verification.cases import Case, default_cases, packed_offsets, start_remainders
from nsa_gen.verification.coverage import ALWAYS_LEFT_OUT, BUDGET_LEFT_OUT, coverage
from nsa_gen.verification.examples import drawn_example
from nsa_gen.verification.inference import PAGE_SIZES, fixed_scenarios
from nsa_gen.verification.report import Coverage
from nsa_gen.verification.running import CaseCheck, Check, ScenarioCheck, as_request, from_request
from nsa_gen.verification.schedules import LAUNCH_OPTIONS, decode_variation, variations, varied
from nsa_gen.verification.verify import _scenarios
from tests.support import operator_of_spec, small_spec

PAGE = Path(__file__).resolve().parents[2] / "docs" / "verification.md"
SPECS = {
    "tiny": load_spec("tiny"),
    "linear": small_spec(phi="mlp", phi_value="linear", group=3, passes=("forward", "backward", "decode")),
    "given": small_spec("slc", indices="input", gate="none"),
    "window": small_spec("win", gate="none", passes=("forward", "decode")),
    "external": small_spec("cmp win", phi="external"),
    "indexer": small_spec("slc win", index=16, count=4, local=2, window=40),
}
OPTIONS = {
    "nsa_attention": {"return_aux", "recompute"},
    "NSACache": {"batch", "capacity", "page_size", "max_new_tokens"},
}
"""Options that the fixed cases use, besides the tensors of `Inputs`."""
LEFT_OUT = {"workspace_bytes", "layers", "layer", "pages", "out", "device"}
"""Options that they leave out, which the report names; where tensors live is the run's, not the package's."""


def cases_of(spec: Spec, interpreted: bool = True) -> tuple[Case, ...]:
    return default_cases(spec, interpreted=interpreted, lengths=None, packed=True, batch=2)[0]


def coverage_of(spec: Spec, interpreted: bool = True) -> Coverage:
    program = lower(spec)
    scenarios = _scenarios(spec, program, 0, "cpu") if "decode" in spec.passes else []
    return coverage(program, cases_of(spec, interpreted), scenarios, interpreted=interpreted, passes=spec.passes)


@pytest.mark.parametrize("name", SPECS)
def test_every_tunable_of_a_package_has_several_values_in_the_default_run(name: str) -> None:
    spec = SPECS[name]
    tables = operator_of_spec(spec).module.configs.DEFAULTS["interpreter"]
    found = coverage_of(spec)
    alone = {kernel.name for kernel in lower(spec).kernels if not kernel.whole}
    wanted = {f"{kernel}.{key}" for kernel, values in tables.items() for key in values
              if kernel not in alone and key not in LAUNCH_OPTIONS}  # fmt: skip
    assert wanted == set(found.exercised) - {"recompute", "packed offsets", "page_size"}
    options = {"layers, layer, pages and out of the cache and of decode"} if "decode" in spec.passes else set()
    options |= {BUDGET_LEFT_OUT} if spec.selection else set()
    assert set(found.left_out) == {*ALWAYS_LEFT_OUT, *options}


@pytest.mark.parametrize("name", SPECS)
def test_a_package_takes_every_way_in_which_the_default_run_runs_it(name: str) -> None:
    spec = SPECS[name]
    module = operator_of_spec(spec).module
    ways = [case.variation for case in cases_of(spec)]
    if "decode" in spec.passes:
        ways += [way for _, way in _scenarios(spec, lower(spec), 0, "cpu")]
    assert any(ways)
    for way in ways:
        with varied(module, way):
            pass


def test_a_tunable_that_no_case_varies_is_named() -> None:
    spec = SPECS["tiny"]
    plain = tuple(case for case in cases_of(spec) if case.variation is None)
    found = coverage(lower(spec), plain, [], interpreted=True, passes=spec.passes)
    (line,) = (each for each in found.left_out if each.startswith("values other than those in force"))
    assert "compressed_backward_dkdv.HEAD_SPLITS" in line and "selected_attention.KEY_MAJOR_DQ" in line
    assert "recompute: cmp, slc, win, cmp+slc, cmp+win, slc+win, cmp+slc+win" in found.left_out
    assert "packed sequences that begin at tokens of remainder 1, 2 by the stride 4" in found.left_out
    assert any(each.startswith("page_size: contiguous") for each in found.left_out)


def test_on_a_gpu_schedules_and_splits_vary_and_tile_sizes_are_named_as_left_out() -> None:
    found = coverage_of(SPECS["tiny"], interpreted=False)
    assert found.exercised["selected_attention.LOCAL_IN_WINDOW"] == (0, 1)
    assert found.exercised["compressed_backward_dkdv.HEAD_SPLITS"] == (1, 2)
    assert any("window_forward.KEY_BLOCK" in each for each in found.left_out)
    changed = {
        name for case in cases_of(SPECS["tiny"], False) if case.variation for _, name, _ in case.variation.values
    }
    assert changed == {"HEAD_SPLITS", "KEY_MAJOR_FORWARD", "KEY_MAJOR_DQ", "LOCAL_IN_WINDOW", "CHUNK_TOKENS"}


def test_every_option_of_the_public_functions_is_exercised_or_named() -> None:
    module = operator_of_spec(SPECS["tiny"]).module
    tensors = {field.name for field in fields(Inputs)}
    known = {*tensors, "cache", *LEFT_OUT, *itertools.chain.from_iterable(OPTIONS.values())}
    for function in (module.nsa_attention, module.NSACache, module.nsa_decode, module.nsa_prefill):
        assert set(inspect.signature(function).parameters) <= known, function
    assert OPTIONS["nsa_attention"] <= set(inspect.signature(module.nsa_attention).parameters)
    text = " ".join(coverage_of(SPECS["tiny"]).left_out)
    assert all(name in text for name in LEFT_OUT - {"device"})


def test_the_page_names_every_tunable_and_option() -> None:
    page = PAGE.read_text()
    part = page[page.index("## Fixed cases") : page.index("## Random examples")]
    names = {name.split(".")[-1] for spec in SPECS.values() for name in coverage_of(spec).exercised}
    assert names >= {"KEY_MAJOR_FORWARD", "SHARES", "PROGRAMS", "recompute", "page_size"}
    names -= {"packed offsets"}
    missing = [name for name in (*names, *LAUNCH_OPTIONS, *LEFT_OUT - {"device"}) if f"`{name}`" not in part]
    assert not missing


def test_few_ways_have_every_pair_of_a_choice_and_a_recomputed_branch() -> None:
    program = lower(SPECS["tiny"])
    found = variations(program, True, True)
    assert {way.recompute for way in found if way.number == 5} == {("slc",)}
    packed = [case.variation for case in cases_of(SPECS["tiny"]) if case.variation and isinstance(case.tokens, tuple)]
    choices = ("KEY_MAJOR_FORWARD", "KEY_MAJOR_DQ", "LOCAL_IN_WINDOW")

    def values(way, name: str) -> set[int]:
        return {value for _, key, value in way.values if key == name}

    assert len({tuple(min(values(way, name)) for name in choices) for way in found}) == 8
    assert len({way.recompute for way in found}) == 8
    for choice, branch in itertools.product(choices, program.spec.branches):
        assert len({(min(values(way, choice)), branch in way.recompute) for way in found}) == 4, (choice, branch)
        assert len({min(values(way, choice)) for way in packed}) == 2
    assert all(len({branch in way.recompute for way in packed}) == 2 for branch in program.spec.branches)
    several = {(min(values(case.variation, choice)), min(values(case.variation, "CHUNK_TOKENS")) < case.rows)
               for case in cases_of(SPECS["tiny"]) if case.variation for choice in choices[:1]}  # fmt: skip
    assert several == {(0, False), (0, True), (1, False), (1, True)}


def test_packed_sequences_begin_at_every_remainder_of_the_stride() -> None:
    p = OracleParameters.from_spec(SPECS["tiny"])
    assert start_remainders(p, (19, 0, 1, 11)) == {0}
    done = set().union(*(start_remainders(p, tokens) for tokens in packed_offsets(p, True)))
    assert done == {1, 2, 3} and all(sum(tokens) <= 20 for tokens in packed_offsets(p, True))
    large = OracleParameters.from_spec(small_spec(compression=(32, 16), block=64))
    (everything,) = packed_offsets(large, False)
    assert start_remainders(large, everything) == set(range(16))
    some = coverage_of(small_spec(compression=(16, 8), block=16))
    assert some.exercised["packed offsets"] == (0, 1, 4, 7)
    assert any("remainder 2, 3, 5, 6 by the stride 8" in each for each in some.left_out)


def test_scenarios_have_every_kind_of_cache_and_split() -> None:
    scenarios = fixed_scenarios(OracleParameters.from_spec(SPECS["tiny"]))
    assert {scenario.page_size for scenario in scenarios} == {None, *PAGE_SIZES}
    kinds = {step.kind for scenario in scenarios for step in scenario.steps}
    assert kinds == {"fill", "prefill", "decode", "truncate", "fork"}
    program = lower(SPECS["tiny"])
    programs = {value for n in range(len(scenarios)) for _, name, value in decode_variation(program, n, True).values
                if name == "PROGRAMS"}  # fmt: skip
    assert programs == {1, 2, 3, 4, 8}


def test_checks_are_told_to_another_process_in_full() -> None:
    spec = SPECS["tiny"]
    checks: list[Check] = [CaseCheck(case, 3, True) for case in cases_of(spec)]
    checks += [ScenarioCheck(*each) for each in _scenarios(spec, lower(spec), 0, "cpu")]
    checks += [drawn_example(spec, seed, "cpu") for seed in range(20)]
    for check in checks:
        assert from_request(json.loads(json.dumps(as_request(check)))) == check


def test_a_way_to_run_is_told_in_a_line_and_by_a_number() -> None:
    way = next(case.variation for case in cases_of(SPECS["tiny"]) if case.variation and case.variation.number == 1)
    assert way.label == "schedule 1 recompute cmp+win"
    assert re.match(r"schedule 1 recompute cmp\+win: .*selected_attention .*KEY_MAJOR_FORWARD=1", way.text)
