"""Specs and calls that no person chose: generated kernels have the properties, and a seed names an example."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nsa_gen.spec import Spec
from nsa_gen.verification import OracleParameters, assert_verified, verify
from nsa_gen.verification.drawing import spec_of_seed
from nsa_gen.verification.examples import drawn_case, drawn_example, parse_example
from nsa_gen.verification.properties import PROPERTIES, Trial
from nsa_gen.verification.reference.inputs import kinds_of
from nsa_gen.verification.strategies import cases, properties, specs
from tests.support import DEVICE, operator_of_spec, small_spec
from tests.verification.test_verify import package
from tests.verification.verification_specs import spec_of

NIGHTLY = os.environ.get("NSA_GEN_PROFILE") == "nightly"
quiet = functools.partial(
    settings, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("examples", [5, 300 if NIGHTLY else 12])
def test_kernels_of_drawn_specs_have_drawn_properties(examples: int) -> None:
    @quiet(max_examples=examples)
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        spec = data.draw(specs())
        case = data.draw(cases(spec))
        name = data.draw(properties(spec, case))
        op = operator_of_spec(spec)
        trial = Trial(spec, op.module, case, 1, DEVICE.type, lambda other: operator_of_spec(other).module)
        assert [row for row in PROPERTIES[name].check(trial) if not row.ok] == [], spec.resolved_yaml()

    draw()


def test_drawn_specs_reach_every_branch_phi_and_gate() -> None:
    seen: set[object] = set()

    @quiet(max_examples=150, phases=(Phase.generate,))
    @given(specs())
    def draw(spec: Spec) -> None:
        seen.update([*spec.branches, spec.combine.gate, spec.kv, spec.dtype, spec.passes])
        if spec.compression is not None:
            seen.update([f"key {spec.compression.phi.key}", f"value {spec.compression.phi.value}"])
        if spec.selection is not None:
            seen.add(spec.selection.indices)

    draw()
    kinds = ("mean", "weighted", "linear", "mlp", "external")
    expected = {"cmp", "slc", "win", "sigmoid", "given", "none", "shared", "per_branch", "float16", "float32"}
    expected |= {"computed", "input", ("forward",), ("forward", "backward")}
    assert expected | {f"{side} {kind}" for side in ("key", "value") for kind in kinds} <= seen


def test_wide_specs_of_seeds_are_legal_and_reach_the_sizes_that_gpus_are_used_with() -> None:
    drawn = [spec_of_seed(seed, dtypes=("bfloat16", "float16", "float32"), wide=True) for seed in range(300)]
    assert [spec.name for spec in drawn[:2]] == ["drawn_0", "drawn_1"]
    assert drawn[7] == spec_of_seed(7, dtypes=("bfloat16", "float16", "float32"), wide=True) != drawn[8]
    assert {16, 64, 128, 192, 256} <= {spec.head_dim.qk for spec in drawn} & {spec.head_dim.v for spec in drawn}
    assert {1, 7, 12, 16} <= {spec.heads.query // spec.heads.kv for spec in drawn}
    assert {spec.dtype for spec in drawn} == {"bfloat16", "float16", "float32"}
    assert {spec.fp32_precision for spec in drawn} == {"ieee", "tf32"}


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("given_indices", [True, False])
def test_drawn_cases_cover_every_form_and_kind_within_their_limits(interpreted: bool, given_indices: bool) -> None:
    p = OracleParameters.from_spec(spec_of(indices_given=given_indices))
    drawn = [drawn_case(p, random.Random(seed).choice, interpreted=interpreted) for seed in range(600)]
    packed = [case.tokens for case in drawn if isinstance(case.tokens, tuple)]
    assert {case.kind for case in drawn} == set(kinds_of(p))
    assert any(0 in lengths for lengths in packed) and any(1 in lengths for lengths in packed)
    assert any(case.tokens_kv for case in drawn) and {case.batch for case in drawn} == {0, 1, 2}
    assert any(case.tokens == 0 for case in drawn) and any(not any(lengths) for lengths in packed)
    most = max(sum(case.tokens) if isinstance(case.tokens, tuple) else case.tokens for case in drawn)
    assert most <= (14 if interpreted else 1104)


def test_an_example_is_the_same_alone_as_in_a_longer_run_and_as_its_text_says() -> None:
    spec = spec_of(branches="win")
    module = package(spec)
    long = verify(spec, package=module, device="cpu", examples=6, seed=10)
    short = verify(spec, package=module, device="cpu", examples=1, seed=13)
    assert long.ok and len(long.cases) == 6 and short.cases == long.cases[3:4]
    example = drawn_example(spec, 13, "cpu")
    assert example.seed == 13 and parse_example(example.text, 13) == example
    told = verify(spec, package=module, device="cpu", example=example.text, seed=13)
    assert told.rows == short.rows and told.examples == short.examples


def test_every_example_is_told_in_words_that_read_back_as_it() -> None:
    for p in (spec_of(), spec_of(branches="slc win", indices_given=True), spec_of(branches="cmp", phi="external")):
        for seed in range(200):
            example = drawn_example(p, seed, "cuda")
            assert parse_example(example.text, seed) == example
            assert example.applies(OracleParameters.from_spec(p), "cuda")


@pytest.mark.parametrize(
    "text",
    ["", "oracle", "oracle: T=3", "oracle: B=1 T=x", "oracl: B=1 T=3", "oracle: B=1 T=3 wild", "packed: packed",
     "oracle: B=1 Tq=9 Tkv=3"],
)  # fmt: skip
def test_words_that_describe_no_example_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="example: expected"):
        parse_example(text, 0)


def test_an_example_that_says_nothing_of_a_spec_is_refused() -> None:
    spec = spec_of(branches="win")
    for text in ("oracle: B=1 T=3 ties", "packed: B=1 T=3", "memory: B=1 T=3"):
        with pytest.raises(ValueError, match="can have on cpu"):
            verify(spec, package=package(spec), device="cpu", example=text)


def test_an_exception_of_a_package_is_a_failed_example_and_the_others_are_run() -> None:
    spec = spec_of(branches="win")

    def breaks(o: torch.Tensor, aux: dict[str, torch.Tensor]) -> torch.Tensor:
        if o.shape[-3] == 7:
            raise RuntimeError("no sevens")
        return o

    report = verify(spec, package=package(spec, tamper=breaks), device="cpu", examples=40, seed=0)
    failed = [each for each in report.examples if not each.ok]
    assert 0 < len(failed) < 40 and len(report.examples) == 40
    assert all("no sevens" in row.problem and row.measure == "raised" for row in report.failures)
    assert report.reproduction is not None and "T=7" in report.reproduction.example


def test_wide_selections_of_an_indexer_are_dense_attention() -> None:
    spec = small_spec("slc win", index=16)
    report = verify(spec, package=package(spec), device="cpu", example="dense: B=1 Tq=6 Tkv=7", seed=3)
    assert report.ok and report.rows, report.failures


def test_examples_refuse_what_they_would_ignore() -> None:
    spec = spec_of(branches="win")
    with pytest.raises(ValueError, match="lengths"):
        verify(spec, package=package(spec), device="cpu", examples=1, lengths=[3])
    with pytest.raises(ValueError, match="at least 1"):
        verify(spec, package=package(spec), device="cpu", examples=0)
    with pytest.raises(ValueError, match="one of the two"):
        verify(spec, package=package(spec), device="cpu", examples=1, example="oracle: B=1 T=3")


@pytest.mark.parametrize("form", ["module", "path", "text"])
def test_a_project_asserts_that_its_package_is_right(form: str) -> None:
    op = operator_of_spec(small_spec("win", gate="none"))
    package = {"module": op.module, "path": op.folder, "text": str(op.folder)}[form]
    report = assert_verified(package, lengths=[3], packed=False, device=DEVICE.type)
    assert report.ok and report.digest == op.spec.digest()


def test_an_assertion_about_what_is_no_package_is_refused() -> None:
    with pytest.raises(TypeError, match="package_or_spec"):
        assert_verified(3)


def test_the_assertion_lists_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = operator_of_spec(small_spec("win", gate="none"))
    right = op.module.nsa_attention

    def wrong(*arguments: object, **more: object) -> object:
        o, aux = right(*arguments, **more)
        return 1.1 * o, aux

    monkeypatch.setattr(op.module, "nsa_attention", wrong)
    with pytest.raises(AssertionError, match=r"under_test .*\n  T=3: o: "):
        assert_verified(op.module, lengths=[3], packed=False, device=DEVICE.type)


def test_the_pages_example_of_a_projects_test_passes(project_root: Path) -> None:
    page = (project_root / "docs" / "verification.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code, "docs/verification.md", "exec"), names)
    names["test_attention_is_right"]()
    assert all(f"\n| {name} | " in page for name in PROPERTIES)
