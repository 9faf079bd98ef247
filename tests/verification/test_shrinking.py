"""A failing example becomes a small one that fails in the same way, and a command that repeats it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.rendering import generate, import_package
from nsa_gen.spec import Spec, parse_spec
from nsa_gen.verification import verify
from nsa_gen.verification.cases import Case
from nsa_gen.verification.examples import (
    Example,
    ExampleResult,
    Shrunk,
    run_example,
    shrink,
    simpler_specs,
    smaller_cases,
)
from nsa_gen.verification.running import InProcess
from tests.support import GPU, small_spec
from tests.verification.test_verify import package
from tests.verification.verification_specs import spec_of


def too_wide(spec: Spec) -> SimpleNamespace:
    """The oracle with a window one key too wide."""
    return package(spec, change=lambda p: replace(p, window=p.window + 1) if p.window else p)


def runner(spec: Spec, device: torch.device, build: Callable[[Spec], Any]) -> InProcess:
    return InProcess(spec, build(spec), device, build)


def shrunk(case: Case, build: Callable[[Spec], Any] = too_wide, name: str = "oracle", **more: Any) -> Shrunk:
    spec = more.pop("spec", None) or spec_of()
    failed = run_example(spec, build(spec), Example(name, case, 3), "cpu", build)
    assert not failed.ok
    packages = {spec: build(spec)}

    def run(other: Spec, example: Example) -> ExampleResult:
        if other not in packages:
            packages[other] = build(other)
        return run_example(other, packages[other], example, "cpu", build)

    return shrink(spec, failed, "cpu", run, **more)


def test_a_call_shrinks_to_the_length_at_which_the_mistake_begins() -> None:
    spec = spec_of(branches="win", window=10)
    found = shrunk(Case(60, batch=2, kind="strided", twice=False), spec=spec)
    assert found.result.example.text == "oracle: B=1 T=11" and found.result.example.seed == 3
    assert not found.result.ok and found.spec is spec and found.tries > 5


def test_a_packed_call_shrinks_to_one_sequence_and_then_to_a_plain_one() -> None:
    found = shrunk(Case((9, 0, 33, 1), kind="spread", twice=False), spec=spec_of(branches="win", window=10))
    assert found.result.example.text == "oracle: B=1 T=11"
    found = shrunk(Case((9, 0, 33, 1), twice=False), name="packed", build=depends_on_the_batch)
    assert found.result.example.text == "packed: packed 1"


def depends_on_the_batch(spec: Spec) -> SimpleNamespace:
    return package(spec, tamper=lambda o, aux: o * (1 + 0.01 * (o.dim() == 3)))


def test_late_queries_stay_late_where_the_mistake_needs_them() -> None:
    def aligned_to_the_start(spec: Spec) -> SimpleNamespace:
        right = package(spec)

        def nsa_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Any:
            return right.nsa_attention(q, k[:, : q.shape[1]], v[:, : q.shape[1]], *rest, **more)

        return SimpleNamespace(nsa_attention=nsa_attention)

    spec = spec_of(branches="win", window=10)
    found = shrunk(Case(5, tokens_kv=40, batch=2, kind="hot", twice=False), aligned_to_the_start, spec=spec)
    assert found.result.example.text == "oracle: B=1 Tq=1 Tkv=2"


def test_a_spec_shrinks_to_the_branch_that_is_wrong() -> None:
    found = shrunk(Case(40, batch=2, twice=False), vary_spec=True, spec=spec_of(kv="per_branch", phi="linear"))
    assert found.spec.branches == ("win",) and found.spec.combine.gate == "none" and found.spec.window.size == 1
    assert (found.spec.heads.query, found.spec.heads.kv, found.spec.head_dim.v) == (1, 1, 16)
    assert found.result.example.text == "oracle: B=1 T=2"
    assert parse_spec(found.spec.resolved_yaml()) == found.spec


def test_a_package_of_unknown_making_keeps_its_spec() -> None:
    spec = spec_of()
    found = shrunk(Case(40, batch=2, twice=False), spec=spec)
    assert found.spec is spec


def test_shrinking_does_not_slip_to_another_mistake() -> None:
    def two_mistakes(spec: Spec) -> SimpleNamespace:
        def tamper(o: Tensor, aux: dict[str, Tensor]) -> Tensor:
            if o.shape[-3] < 20:
                aux["lse_win"] = aux["lse_win"] + 0.5
            else:
                aux["o_win"] = 1.1 * aux["o_win"]
            return o

        return package(spec, tamper=tamper)

    found = shrunk(Case(60, twice=False), two_mistakes, spec=spec_of(branches="win"))
    assert found.result.failing == {"o_win"} and found.result.example.case.tokens == 20


def test_an_exception_shrinks_to_a_smaller_call_that_raises_the_same() -> None:
    def raises(spec: Spec) -> SimpleNamespace:
        def tamper(o: Tensor, aux: dict[str, Tensor]) -> Tensor:
            if o.shape[-3] > 12:
                raise LookupError("too many tokens")
            return o

        return package(spec, tamper=tamper)

    found = shrunk(Case(50, twice=False), raises, spec=spec_of(branches="win"))
    assert found.result.failing == {"LookupError"} and found.result.example.case.tokens == 13
    assert "too many tokens" in found.result.rows[0].problem


def test_no_time_means_no_tries_and_the_example_as_it_was() -> None:
    found = shrunk(Case(40, twice=False), spec=spec_of(branches="win"), seconds=0.0)
    assert found.tries == 0 and found.result.example.text == "oracle: B=2 T=40"


@pytest.mark.parametrize(
    "case",
    [Case(21, kind="hot"), Case(0, batch=0), Case(3, tokens_kv=90), Case((5, 0, 7), kind="nan"), Case((0,)), Case(())],
    ids=lambda case: case.label,
)
def test_smaller_calls_are_smaller_so_that_shrinking_ends(case: Case) -> None:
    def size(case: Case) -> tuple[int, int, int, int]:
        packed = isinstance(case.tokens, tuple)
        lengths = case.tokens if packed else (case.tokens,) * case.batch
        more = 0 if case.tokens_kv is None else 1 + case.tokens_kv
        return (int(case.kind != "gaussian"), int(packed) * (1 + len(lengths)), more, sum(lengths))

    def smaller(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    for other in smaller_cases(case):
        assert smaller(size(other), size(case)), other


def test_simpler_specs_end_at_one_that_has_none() -> None:
    spec, steps = spec_of(phi="mlp", position="learned", kv="per_branch", count=5, dtype="float32"), 0
    while following := list(simpler_specs(spec)):
        assert all(parse_spec(each.resolved_yaml()) == each for each in following)
        spec, steps = following[-1], steps + 1
        assert steps < 60
    assert (spec.heads.query, spec.combine.gate, len(spec.branches)) == (1, "none", 1)


def test_a_report_ends_with_the_smallest_example_and_the_command_that_repeats_it() -> None:
    spec = spec_of(branches="win", window=3)
    wrong = too_wide(spec)
    report = verify(spec, package=wrong, device="cpu", examples=12, seed=0, source="my.yaml")
    smallest = report.reproduction
    assert not report.ok and smallest is not None and len(report.examples) == 12
    assert smallest.example.endswith(": B=1 T=4")
    assert smallest.command == (
        f"nsa-gen verify my.yaml --example '{smallest.example}' --seed {smallest.seed} --device cpu"
    )
    (note,) = report.notes
    assert smallest.command in note and "examples failed" in note
    again = verify(spec, package=wrong, device="cpu", example=smallest.example, seed=smallest.seed)
    assert not again.ok and again.reproduction is None
    assert spec.resolved_yaml() in verify(spec, package=wrong, device="cpu", examples=12).notes[0]


@pytest.mark.skipif(GPU, reason="the mistake keeps within its tensors for the interpreter's tile sizes alone")
def test_a_broken_generated_package_shrinks_to_a_minimal_spec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(spec: Spec) -> Any:
        folder = generate(spec, tmp_path / spec.digest())
        path = folder / "kernels/banded.py"
        if path.exists():
            text = path.read_text()
            assert "end = position + 1 if" in text
            path.write_text(text.replace("end = position + 1 if", "end = position if"))  # a query does not see itself
        return import_package(folder)

    module = sys.modules["nsa_gen.verification.verify"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "_runner", lambda spec, package, folder, device: runner(spec, device, broken))
    report = verify(small_spec(), device="cpu", examples=3, seed=2)
    smallest = report.reproduction
    assert smallest is not None and smallest.example.endswith(": B=1 T=1")
    minimal = parse_spec(smallest.spec)
    assert minimal.branches == ("win",) and minimal.heads.query == 1 and minimal.window.size == 1
    assert "nsa-gen verify minimal.yaml --example" in smallest.command and smallest.spec in smallest.command


def test_an_example_without_rows_is_not_ok() -> None:
    assert not ExampleResult(Example("oracle", Case(3), 0), ()).ok
