"""The bounds of the alignment loss and its gradients let honest rounding pass, and catch what is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsa_gen.verification import Inputs, OracleParameters, Reference, make_inputs
from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import compare_result
from nsa_gen.verification.properties import PROPERTIES
from nsa_gen.verification.reference.alignment import reference_alignment
from nsa_gen.verification.reference.gradients import reference_gradients, truth_and_baseline
from tests.support import small_spec
from tests.verification.test_properties import WHERE, failing
from tests.verification.test_verify import package

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
QUANTITIES = ("alignment_loss", "dq_idx", "dk_idx")
TOKENS, KEYS = 60, 150


def indexed(**more):
    return small_spec("slc", gate="none", initial=0, index=16, kv_heads=2, count=4, **more)


@functools.cache
def call_of(dtype: torch.dtype, kind: str, tokens: int = TOKENS, keys: int = KEYS):
    """Parameters, inputs, the blocks chosen, truth and baseline."""
    spec = indexed()
    p = OracleParameters.from_spec(spec)
    inputs = make_inputs(spec, batch=1, tokens=tokens, tokens_kv=keys, dtype=dtype, seed=1, kind=kind)  # type: ignore[arg-type]
    base = reference_gradients(p, inputs, with_gradients=False)
    chosen = base.outputs.indices, base.outputs.counts
    return p, inputs, chosen[0], *truth_and_baseline(p, inputs, chosen, with_gradients=True)


def summed(x: Tensor) -> Tensor:
    """The sum over the last dimension, term by term."""
    return x.cumsum(-1)[..., -1]


def by_hand(
    p: OracleParameters,
    inputs: Inputs,
    indices: Tensor,
    *,
    heads: int | None = None,
    weights: Callable[[Tensor], Tensor] = lambda x: x,
    student_of: str = "selected",
) -> dict[str, Tensor]:
    """The loss and its gradients of one sequence by sums one by one in float32, as a kernel may compute them."""
    assert inputs.k is not None and inputs.q_idx is not None and inputs.k_idx is not None and inputs.dloss is not None
    q, k, q_idx, k_idx = (x[0].float() for x in (inputs.q, inputs.k, inputs.q_idx, inputs.k_idx))
    assert p.selection_block is not None
    tokens, dtype = q.shape[0], inputs.q.dtype
    loss, dq, dk = torch.zeros(()), torch.zeros_like(q_idx), torch.zeros_like(k_idx)
    weight = (inputs.dloss.float() / tokens)[0]
    for t in range(tokens):
        position = k.shape[0] - tokens + t
        for scope in range(p.scopes):
            blocks = [block for block in indices[0, t, scope].tolist() if block >= 0]
            seen = [i for i in range(position + 1) if i // p.selection_block in blocks]
            members = slice(scope * p.group, scope * p.group + (heads or p.group))
            s = summed(q[t, members, None] * k[None, seen, scope]) * p.scale
            total = summed((s - s.amax(-1, keepdim=True)).exp())
            lse = s.amax(-1) + total.log()
            teacher = weights((s - lse[:, None]).exp()).T
            teacher = summed(teacher)
            mass = summed(teacher)
            scores = summed(q_idx[t, scope] * k_idx[seen, 0])
            considered = scores if student_of == "selected" else summed(q_idx[t, scope] * k_idx[: position + 1, 0])
            index_lse = considered.max() + summed((considered - considered.max()).exp()).log()
            used = teacher > 0
            entropy = summed(torch.where(used, teacher * teacher.masked_fill(~used, 1.0).log(), 0.0))
            loss = loss + ((entropy - summed(teacher * scores)) / mass - mass.log() + index_lse)
            student = (scores - index_lse).exp()
            dq[t, scope] = summed(student * k_idx[seen, 0].T) - summed(teacher * k_idx[seen, 0].T) / mass
            di = ((student - teacher / mass) * weight).to(dtype).float()
            dk[seen, 0] += di[:, None] * q_idx[t, scope]
    return {
        "alignment_loss": (loss / tokens)[None],
        "dq_idx": (dq * weight)[None].to(dtype),
        "dk_idx": dk[None].to(dtype),
    }


def judged(name: str, x: Tensor, p: OracleParameters, inputs: Inputs, truth: Reference, base: Reference):
    return compare_result(p, inputs, name, x, truth, base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "spread", "hot"])
def test_sums_one_by_one_in_float32_pass(kind: str, dtype: torch.dtype) -> None:
    p, inputs, indices, truth, base = call_of(dtype, kind)
    found = by_hand(p, inputs, indices)
    for name in QUANTITIES:
        result = judged(name, found[name], p, inputs, truth, base)
        assert result.ok, (name, result.describe())


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_a_query_that_sees_few_tokens_passes(tokens: int) -> None:
    p, inputs, indices, truth, base = call_of(torch.float32, "gaussian", tokens, tokens)
    found = by_hand(p, inputs, indices)
    for name in QUANTITIES:
        result = judged(name, found[name], p, inputs, truth, base)
        assert result.ok, (name, result.describe())


@pytest.mark.parametrize("name", QUANTITIES)
def test_drift_is_about_what_sums_one_by_one_drift(name: str) -> None:
    p, inputs, indices, truth, _ = call_of(torch.float32, "gaussian")
    error = (by_hand(p, inputs, indices)[name].double() - truth.tensors()[name]).norm()
    share = (error / (2.0**-24 * truth.drift[name].double().norm())).item()
    # First-order bounds of a chain of sums: what enters several of them counts as independent.
    assert 0.1 < share < 1.5


def shares_of(change: dict) -> set[str]:
    p, inputs, indices, truth, base = call_of(torch.float32, "gaussian")
    found = by_hand(p, inputs, indices, **change)
    return {name for name in QUANTITIES if not judged(name, found[name], p, inputs, truth, base).ok}


def test_another_teacher_or_student_is_found() -> None:
    assert shares_of({}) == set()
    assert shares_of({"heads": 1}) == {*QUANTITIES}
    assert shares_of({"student_of": "all"}) == {*QUANTITIES}
    assert shares_of({"weights": lambda x: x.bfloat16().float()}) == {*QUANTITIES}


def last_row_zeroed(x: Tensor) -> Tensor:
    x[:, -1, -1] = 0
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", QUANTITIES)
def test_a_factor_and_a_row_left_out_are_found(name: str, dtype: torch.dtype) -> None:
    p, inputs, _, truth, base = call_of(dtype, "gaussian")
    honest = base.tensors()[name]
    assert judged(name, honest, p, inputs, truth, base).usage <= 0.5
    factor = 1.0001 if dtype == torch.float32 else 1.02
    assert not judged(name, (honest.double() * factor).to(honest.dtype), p, inputs, truth, base).ok
    if name != "alignment_loss":
        assert not judged(name, last_row_zeroed(honest.clone()), p, inputs, truth, base).ok


def test_chunks_of_rows_change_nothing_but_rounding() -> None:
    p, inputs, indices, truth, _ = call_of(torch.float32, "gaussian")
    exact = inputs.to(torch.float64)
    again = reference_gradients(p, exact, indices, noise_unit=2.0**-24, chunk_bytes=1)
    for name in QUANTITIES:
        torch.testing.assert_close(again.tensors()[name], truth.tensors()[name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(again.noise[name], truth.noise[name])
        torch.testing.assert_close(again.drift[name], truth.drift[name])


def test_noise_and_loss_are_zero_where_nothing_is_seen() -> None:
    p, inputs, indices, _, _ = call_of(torch.float32, "gaussian")
    exact = inputs.to(torch.float64)
    found = reference_gradients(p, exact, torch.full_like(indices, -1), noise_unit=2.0**-24)
    for name in QUANTITIES:
        assert not bool(found.tensors()[name].any() or found.noise[name].any() or found.drift[name].any())


def test_the_loss_reaches_who_sees_a_nan_and_no_other_sequence() -> None:
    spec = indexed()
    p = OracleParameters.from_spec(spec)
    inputs = make_inputs(spec, tokens=(40, 40), dtype=torch.float64, kind="nan")
    assert inputs.k is not None
    outputs = reference_gradients(p, inputs, with_gradients=False).outputs
    assert outputs.alignment_loss is not None
    assert outputs.alignment_loss.isnan().tolist() == [False, True]
    assert outputs.indices is not None
    again = reference_alignment(p, inputs, outputs.indices, outputs.counts)
    torch.testing.assert_close(again, outputs.alignment_loss, equal_nan=True)


LISTED = ("batch order", "replay again")
"""Rows that name what differs in their problem."""
ALIGNED = (
    "oracle",
    "future",
    "packed",
    "padded",
    "chunks",
    "batch",
    "neighbours",
    "doubled",
    "bits",
    "replay",
    "guards",
)


@pytest.mark.parametrize("name", ALIGNED)
def test_a_right_package_with_the_loss_has_the_property(name: str) -> None:
    assert name in PROPERTIES
    spec = indexed(scope={"packed": "all", "chunks": "head"}.get(name, "group"))
    assert failing(name, spec, package(spec)) == []


@pytest.mark.parametrize("name", ["packed", "chunks", "batch", "replay"])
def test_a_loss_that_depends_on_its_surroundings_is_found(name: str) -> None:
    def tamper(o: Tensor, aux: dict) -> Tensor:
        calls.append(0)
        aux["alignment_loss"] = aux["alignment_loss"] * (o.shape[-3] if name in ("packed", "chunks") else len(calls))
        return o

    calls: list[int] = []
    spec = indexed()
    found = failing(name, spec, package(spec, tamper=tamper), WHERE[name] if name != "chunks" else Case(21, batch=1))
    assert found and all(quantity.endswith(QUANTITIES) or quantity in LISTED for quantity in found)
