"""The steps alone: equal to what the whole operator does of them, and differentiable on their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support import DEVICE, Operator, call, call_with_gradients, inputs_of, operator_of


def steps(op: Operator, inputs, *, k_slc: Tensor | None = None) -> dict[str, Tensor]:
    """The operator by its steps, in the order of the whole."""
    packed = {} if inputs.cu_seqlens is None else {"cu_seqlens": inputs.cu_seqlens}
    tokens = {} if packed else {"tokens": inputs.k.shape[1]}
    parameters = op.CompressionParameters(**inputs.compression) if inputs.compression else None
    k_cmp, v_cmp = op.compress(inputs.k, inputs.v, parameters, **packed)
    o_cmp, lse_cmp = op.compressed_attention(inputs.q, k_cmp, v_cmp, **tokens, **packed)
    indices, counts = op.select_blocks(inputs.q, k_cmp, lse_cmp, **tokens, **packed)
    o_slc, lse_slc = op.selected_attention(inputs.q, inputs.k, inputs.v, indices, counts, **packed)
    o_win, lse_win = op.window_attention(inputs.q, inputs.k, inputs.v, **packed)
    o = op.combine((o_cmp, o_slc, o_win), inputs.gates)
    return {
        "k_cmp": k_cmp, "v_cmp": v_cmp, "o_cmp": o_cmp, "lse_cmp": lse_cmp, "indices": indices, "counts": counts,
        "o_slc": o_slc, "lse_slc": lse_slc, "o_win": o_win, "lse_win": lse_win, "o": o,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gate", "lengths"), [("sigmoid", None), ("given", None), ("none", None), ("sigmoid", (13, 0, 1))]
)
def test_the_steps_make_the_whole_and_so_do_their_gradients(gate: str, lengths: tuple[int, ...] | None) -> None:
    op = operator_of(gate=gate, count=2, phi="weighted", position=("learned", "learned"))
    inputs = inputs_of(op, lengths, seed=1) if lengths else inputs_of(op, 2, tokens_kv=37, seed=1)
    whole = call_with_gradients(op, inputs)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
    found = steps(op, inputs.replace_differentiable(leaves))
    for name, x in found.items():
        if lengths and name in ("k_cmp", "v_cmp"):
            continue  # rows between two sequences are padding
        assert torch.equal(x.detach(), whole[name]), name
    for name in ("lse_cmp", "lse_slc", "lse_win", "indices", "counts"):
        assert not found[name].requires_grad, name
    gradients = torch.autograd.grad(found["o"], list(leaves.values()), inputs.do)
    for name, gradient in zip(leaves, gradients, strict=True):
        expected = whole[f"d{name}"]
        # Gradients of a position of keys are 0 but for rounding: softmax does not see a shift of all its logits.
        assert (gradient - expected).norm() <= 1e-5 * max(expected.norm().item(), 1.0), name


def test_aux_is_detached_and_has_the_fields_of_the_branches() -> None:
    op = operator_of(count=2)
    inputs = inputs_of(op, 3, tokens_kv=20, seed=2)
    inputs.q.requires_grad_()
    o, aux = call(op, inputs, return_aux=True)
    assert o.requires_grad
    assert set(aux._fields) == {
        "o_cmp", "lse_cmp", "o_slc", "lse_slc", "o_win", "lse_win", "indices", "counts", "k_cmp", "v_cmp"
    }  # fmt: skip
    assert not any(x.requires_grad for x in aux)
    assert aux.indices.dtype == aux.counts.dtype == torch.int32
    assert aux.indices.shape == (1, 3, 1, 2) and aux.counts.shape == (1, 3, 1) and aux.lse_win.shape == (1, 3, 2)
    assert torch.equal(call(op, inputs).detach(), o.detach())


@pytest.mark.parametrize(
    ("branches", "changes", "fields"),
    [
        ("win", {}, {"o_win", "lse_win"}),
        ("cmp", {}, {"o_cmp", "lse_cmp", "k_cmp", "v_cmp"}),
        ("cmp", {"phi": "external"}, {"o_cmp", "lse_cmp"}),
        ("slc win", {"indices": "input"}, {"o_slc", "lse_slc", "o_win", "lse_win"}),
    ],
)
def test_aux_has_no_field_of_what_the_operator_does_not_compute(branches: str, changes: dict, fields: set) -> None:
    op = operator_of(branches, gate="none", count=2, **changes)
    _, aux = call(op, inputs_of(op, 3, seed=3), return_aux=True)
    assert set(aux._fields) == fields


def test_combine_is_the_gated_sum_and_takes_packed_outputs() -> None:
    op = operator_of("cmp win")
    outputs = [torch.randn(5, 2, 16, device=DEVICE, requires_grad=True) for _ in range(2)]
    gates = torch.randn(5, 2, 2, device=DEVICE, requires_grad=True)
    o = op.combine(outputs, gates)
    values = torch.sigmoid(gates)
    expected = values[..., 0, None] * outputs[0] + values[..., 1, None] * outputs[1]
    torch.testing.assert_close(o, expected)
    do = torch.randn_like(o)
    actual = torch.autograd.grad(o, [*outputs, gates], do)
    wanted = torch.autograd.grad(expected, [*outputs, gates], do)
    for x, y in zip(actual, wanted, strict=True):
        torch.testing.assert_close(x, y)


def test_a_branch_alone_ignores_the_gates_of_the_whole() -> None:
    op = operator_of("win", gate="given")
    inputs = inputs_of(op, 6, seed=4)
    _, aux = call(op, inputs, return_aux=True)
    o, lse = op.window_attention(inputs.q, inputs.k, inputs.v)
    assert torch.equal(o, aux.o_win) and torch.equal(lse, aux.lse_win)


def test_steps_pass_gradients_on_to_compressed_keys_of_the_callers_own() -> None:
    op = operator_of("cmp", gate="none")
    q = torch.randn(1, 9, 2, 16, device=DEVICE)
    k_cmp, v_cmp = (torch.randn(1, 6, 1, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    o, _ = op.compressed_attention(q, k_cmp, v_cmp, tokens=30)
    dk, dv = torch.autograd.grad(o.square().sum(), [k_cmp, v_cmp])
    assert dk.abs().sum((0, 2, 3)).all() and dv.abs().sum((0, 2, 3)).all()


def test_no_branch_output_in_use_means_no_gradient() -> None:
    op = operator_of("win", gate="none")
    q, k, v = (torch.randn(1, 4, h, 16, device=DEVICE, requires_grad=True) for h in (2, 1, 1))
    _, lse = op.window_attention(q, k, v)
    assert not lse.requires_grad


@pytest.mark.parametrize("branches", ["cmp slc win", "win"])
def test_a_second_derivative_is_refused_clearly(branches: str) -> None:
    op = operator_of(branches, gate="none", count=2)
    inputs = inputs_of(op, 9, seed=5)
    leaf = inputs.q.detach().requires_grad_()
    o = call(op, inputs.replace_differentiable(inputs.differentiable() | {"q": leaf}))
    (gradient,) = torch.autograd.grad(o.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()
