"""verify passes a right package and finds each kind of fault in a wrong one."""

from __future__ import annotations

import io
import json
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor

from nsa_gen.rendering import generate
from nsa_gen.verification import Inputs, OracleParameters, print_report, reference_attention, verify
from nsa_gen.verification.cases import boundary_lengths, default_cases
from nsa_gen.verification.reference.alignment import reference_alignment
from nsa_gen.verification.verify import adapt
from tests.support import GPU, small_spec
from tests.verification.verification_specs import spec_of

LENGTHS = [1, 7, 60]
AUX = ("o_cmp", "lse_cmp", "o_slc", "lse_slc", "o_win", "lse_win", "o_joint", "lse_joint", "indices", "counts",
       "k_cmp", "v_cmp")  # fmt: skip


def package(spec, *, change: Callable | None = None, tamper: Callable | None = None) -> SimpleNamespace:
    """A package made of the float32 oracle. `change` alters its parameters, `tamper` (o, aux) after the fact."""
    p = OracleParameters.from_spec(spec)
    p = change(p) if change else p
    names = ("q", "k", "v", "gates", "compression", "k_slc", "v_slc", "k_win", "v_win", "k_cmp", "v_cmp",
             "indices", "counts", "q_idx", "k_idx", "sink_slc", "sink_win", "sink", "cu_seqlens")  # fmt: skip

    def nsa_attention(q, k, v, *, return_aux: bool, recompute: tuple[str, ...] = (), **more):
        assert return_aux and set(more) <= set(names) and set(recompute) <= set(p.branches)
        result = reference_attention(p, q, k, v, **more)
        aux = {name: x.detach() for name, x in result.tensors().items() if name in AUX}
        if p.aligned and more.get("q_idx") is not None:
            given = {name: x for name, x in more.items() if name not in ("indices", "counts")}
            inputs = Inputs(q=q, do=q, k=k, v=v, **given)
            aux["alignment_loss"] = reference_alignment(p, inputs, result.indices, result.counts)
        o = result.o
        if q.requires_grad and not o.requires_grad:  # a batch of none
            o = o + 0 * q.sum()
        if tamper:
            o = tamper(o, aux)
        return o, namedtuple("Aux", aux)(**aux)

    return SimpleNamespace(nsa_attention=nsa_attention, CompressionParameters=lambda **x: x)


def outcome(spec, **changes):
    return verify(spec, package=package(spec, **changes), lengths=LENGTHS, device="cpu")


@pytest.mark.parametrize("phi", ["mean", "mlp", "external"])
@pytest.mark.parametrize("kv", ["shared", "per_branch"])
def test_a_right_package_passes(phi: str, kv: str) -> None:
    spec = spec_of(phi=phi, kv=kv, position="none" if phi == "external" else "learned")
    report = outcome(spec)
    assert report.ok, report.failures
    quantities = {row.quantity for row in report.rows}
    assert {"o", "o_cmp", "lse_slc", "dq", "dgates", "selection", "determinism", "k_cmp"} <= quantities
    assert {"packed 19+0+1+11", "T=7"} <= set(report.cases) and any("Tkv" in case for case in report.cases)


@pytest.mark.parametrize("branches", ["cmp", "slc", "win"])
def test_single_branches_and_given_indices_pass(branches: str) -> None:
    report = outcome(spec_of(branches=branches, indices_given=True, gate="none"))
    assert report.ok, report.failures
    external = outcome(spec_of(branches="cmp", phi="external"))
    assert external.ok and not any("Tkv" in case for case in external.cases)


def failing(spec, **changes) -> set[str]:
    return {row.quantity for row in outcome(spec, **changes).failures}


def test_a_window_one_too_wide_is_found() -> None:
    found = failing(spec_of(), change=lambda p: replace(p, window=p.window + 1))
    assert {"o", "o_win", "lse_win", "dk"} <= found and "o_cmp" not in found


def test_a_forgotten_scale_is_found() -> None:
    found = failing(spec_of(scale=0.37), change=lambda p: replace(p, scale=0.25))
    assert {"o_cmp", "o_slc", "o_win", "dq"} <= found


def test_selection_that_forgets_the_local_block_is_found() -> None:
    found = failing(spec_of(count=2, initial=0, local=2), change=lambda p: replace(p, local=0))
    assert "selection" in found and "o_slc" not in found


def test_a_choice_that_ignores_importance_is_found_though_attention_on_it_is_right() -> None:
    spec = spec_of(count=2, initial=0, local=1)
    found = failing(spec, change=lambda p: replace(p, initial=1))
    assert found == {"selection"}


def test_a_wrong_gradient_behind_a_right_output_is_found() -> None:
    def tamper(o: Tensor, aux: dict) -> Tensor:
        return o * 0.98 + o.detach() * 0.02

    found = failing(spec_of(), tamper=tamper)
    assert {"dq", "dk", "dv", "dgates"} <= found and "o" not in found


def test_results_that_change_from_call_to_call_are_found() -> None:
    calls = iter(range(1000))

    def tamper(o: Tensor, aux: dict) -> Tensor:
        return o * (1 + 2.0**-23 * (next(calls) % 2))

    assert failing(spec_of(), tamper=tamper) == {"determinism"}


def test_rows_that_nobody_wrote_are_found() -> None:
    def tamper(o: Tensor, aux: dict) -> Tensor:
        return torch.where(torch.arange(o.shape[-1]) < 23, o, torch.empty_like(o))

    report = outcome(spec_of(), tamper=tamper)
    assert any("NaN" in row.problem for row in report.failures if row.quantity == "o")


def test_a_nan_that_reaches_rows_which_do_not_see_it_is_found() -> None:
    def tamper(o: Tensor, aux: dict) -> Tensor:
        return o + 0 * o.sum(-3, keepdim=True)

    problems = [row for row in outcome(spec_of(), tamper=tamper).failures if row.problem]
    assert {row.quantity for row in problems} == {"o"} and all(row.case.endswith("nan") for row in problems)


def test_an_lse_of_the_wrong_dtype_and_misshapen_indices_are_found() -> None:
    def half(o: Tensor, aux: dict) -> Tensor:
        aux["lse_win"] = aux["lse_win"].double()
        return o

    def narrow(o: Tensor, aux: dict) -> Tensor:
        aux["indices"] = aux["indices"][..., :-1]
        return o

    assert failing(spec_of(), tamper=half) == {"lse_win"}
    assert failing(spec_of(), tamper=narrow) == {"selection"}


def test_forward_alone_compares_no_gradients() -> None:
    spec = spec_of()
    report = verify(spec, package=package(spec), lengths=[9], passes=["forward"], device="cpu", packed=False)
    assert report.ok and not any(row.quantity.startswith("d") for row in report.rows if row.quantity != "determinism")
    with pytest.raises(ValueError, match="decode"):
        verify(spec, package=package(spec), passes=["decode"], device="cpu")


def test_bfloat16_and_many_heads_are_changed_on_the_cpu_and_the_notes_say_so() -> None:
    spec = spec_of(dtype="bfloat16", query_heads=12, kv_heads=4)
    changed, notes = adapt(spec, interpreted=True, dtype=None, fixed=False)
    assert (changed.dtype, changed.heads.query, changed.heads.kv) == ("float32", 6, 2)
    assert len(notes) == 2 and "bfloat16" in notes[0] and "12 query and 4 KV" in notes[1]
    assert adapt(spec, interpreted=False, dtype=None, fixed=False) == (spec, ())
    with pytest.raises(ValueError, match="bfloat16"):
        adapt(spec, interpreted=True, dtype="bfloat16", fixed=False)
    with pytest.raises(ValueError, match="float64"):
        adapt(spec, interpreted=True, dtype="float64", fixed=False)
    with pytest.raises(ValueError, match="package"):
        adapt(spec, interpreted=True, dtype=None, fixed=True)


def test_default_lengths_lie_around_every_boundary() -> None:
    spec = spec_of(window=50, count=3)
    lengths = boundary_lengths(OracleParameters.from_spec(spec))
    assert {1, 7, 8, 9, 15, 16, 17, 49, 50, 51, 37} <= set(lengths)
    cases, notes = default_cases(spec, interpreted=True, lengths=None, packed=True, batch=2)
    rows = [sum(c.tokens) if isinstance(c.tokens, tuple) else c.tokens for c in cases]
    assert max(rows) <= 130 and {1, 8, 17, 51, 37} <= set(rows) and "1021" in notes[0]
    assert {c.kind for c in cases} >= {"gaussian", "strided", "spread", "nan"}
    everywhere, notes = default_cases(spec, interpreted=False, lengths=None, packed=True, batch=2)
    assert notes == () and any(c.tokens == 1021 for c in everywhere) and all(c.twice for c in everywhere)


def test_the_report_reads_when_piped_and_as_json() -> None:
    report = outcome(spec_of(), tamper=lambda o, aux: o * 1.1)
    text = io.StringIO()
    print_report(report, Console(file=text, width=120))
    assert "failed" in text.getvalue() and "under_test" in text.getvalue() and "\x1b" not in text.getvalue()
    document = json.loads(report.to_json())
    assert document["ok"] is False and document["rows"][0]["quantity"] == "o" and document["digest"] == report.digest
    assert document["environment"]["torch"] == torch.__version__


def test_a_report_without_comparisons_is_not_ok() -> None:
    assert not replace(outcome(spec_of(branches="win")), rows=()).ok


def test_progress_is_told_before_each_case() -> None:
    spec = spec_of(branches="win")
    lines: list[str] = []
    report = verify(spec, package=package(spec), lengths=[5], device="cpu", progress=lines.append)
    assert len(lines) == len(report.cases) and "T=5" in lines[0]


def test_an_exception_of_a_package_is_a_failure_of_its_case_and_the_others_are_run() -> None:
    def tamper(o: Tensor, aux: dict) -> Tensor:
        if o.shape[-3] == 7:
            raise LookupError("no sevens")
        return o

    report = outcome(spec_of(branches="win"), tamper=tamper)
    (row,) = report.failures
    assert (row.case, row.quantity) == ("T=7", "LookupError") and "no sevens" in row.problem
    assert {"T=1", "T=60"} <= {row.case for row in report.rows}


@pytest.mark.skipif(GPU, reason="on a GPU a fault is an exception")
def test_a_read_out_of_bounds_that_ends_the_process_is_a_failure_of_its_case(tmp_path) -> None:
    spec = small_spec("win", gate="none", group=1)
    folder = generate(spec, tmp_path)
    path, old = folder / "kernels/banded.py", "row_base(k_ptr, batch, first_key, head // GROUP"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, old.replace("k_ptr", "k_ptr + tl.where(tokens_q == 2, 1 << 44, 0)")))
    report = verify(spec, package=folder, lengths=[1, 2, 3], packed=False, passes=["forward"], device="cpu")
    (row,) = report.failures
    assert (row.case, row.quantity) == ("T=2", "process") and "SIGSEGV" in row.problem
    assert {"T=1", "T=3"} <= {row.case for row in report.rows if row.ok}
    one = verify(spec, package=folder, example="oracle: B=1 T=2", device="cpu")
    assert not one.ok and one.rows[0].quantity == "process"
