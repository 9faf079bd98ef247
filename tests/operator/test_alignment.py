"""The indexer's loss and its gradients, against a dense form by autograd in float64."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.verification import Inputs
from nsa_gen.verification.checking import compare_result
from nsa_gen.verification.reference.alignment import LOSS
from nsa_gen.verification.reference.gradients import truth_and_baseline
from tests.support import DEVICE, Operator, call, call_with_gradients, inputs_of, operator_of

PLAIN: dict[str, Any] = {"gate": "none", "index": 16, "initial": 0, "group": 3, "kv_heads": 2, "dims": (24, 40)}
SPECS: dict[str, dict[str, Any]] = {
    "each KV head": PLAIN,
    "each head": PLAIN | {"scope": "head"},
    "all heads": PLAIN | {"scope": "all"},
    "joint with a sink": {
        "branches": "slc win",
        "index": 16,
        "joint": True,
        "sink_joint": "learned",
        "initial": 0,
        "kv_heads": 2,
    },
    "local blocks in the window, a sink": {
        "branches": "slc win",
        "index": 32,
        "sink_slc": "learned",
        "count": 4,
        "local": 2,
        "window": 40,
        "kv": "shared",
    },
    "keys of each branch": {"index": 16, "kv": "per_branch", "kv_heads": 2, "count": 4},
    "half precision": {"gate": "none", "index": 64, "dtype": "float16", "block": 32, "group": 1},
}
CALLS: dict[str, dict[str, Any]] = {
    "batched": {"tokens": 45, "batch": 2},
    "more keys than queries": {"tokens": 9, "tokens_kv": 77},
    "packed": {"tokens": (23, 0, 1, 44)},
}


def operator(name: str, **changes: Any) -> Operator:
    fields = SPECS[name] | changes
    return operator_of(fields.pop("branches", "slc" if name not in ("keys of each branch",) else "slc win"), **fields)


def aligned(op: Operator, inputs: Inputs, **more: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    """The loss of each sequence, leaves that might learn of it, and the auxiliary outputs."""
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in ("q_idx", "k_idx", "q", "k", "v")}
    _, aux = call(op, replace(inputs, **leaves), return_aux=True, **more)
    return aux.alignment_loss, leaves, aux


def assert_aligned(op: Operator, inputs: Inputs, **more: Any) -> Tensor:
    """Loss and gradients are those of the dense form; returns the loss."""
    loss, leaves, aux = aligned(op, inputs, **more)
    found = torch.autograd.grad(loss, list(leaves.values()), inputs.dloss, allow_unused=True)
    assert all(gradient is None for gradient in found[2:])
    chosen = aux.indices, aux.counts
    truth, base = truth_and_baseline(op.parameters, replace(inputs, **more), chosen, with_gradients=True)
    for name, x in zip((LOSS, "dq_idx", "dk_idx"), (loss.detach(), *found[:2]), strict=True):
        comparison = compare_result(op.parameters, inputs, name, x, truth, base)
        assert comparison.ok, (name, comparison.describe())
    return loss


@pytest.mark.parametrize("shape", CALLS)
@pytest.mark.parametrize("name", SPECS)
def test_loss_and_gradients_are_those_of_the_dense_form(name: str, shape: str) -> None:
    op = operator(name)
    loss = assert_aligned(op, inputs_of(op, **CALLS[shape]))
    assert bool((loss > 0).any())


def test_a_block_that_every_query_selects_is_summed_over_pieces_and_chunks() -> None:
    op = operator("each KV head", initial=1, kv_heads=1, group=1, count=3)
    inputs = inputs_of(op, 130)
    with op.configs.override("selected_attention", CHUNK_TOKENS=64):
        assert_aligned(op, inputs)


def test_a_small_gradient_loses_nothing_in_half_precision() -> None:
    # As of a mean over many tokens: what it multiplies is rounded to float16 without it.
    op = operator("each KV head", dtype="float16")
    inputs = inputs_of(op, 40)
    assert inputs.q_idx is not None and inputs.k_idx is not None
    # The gradient by index keys itself is large enough for float16.
    loss, leaves, _ = aligned(op, replace(inputs, q_idx=inputs.q_idx * 64, k_idx=inputs.k_idx / 64))
    one, small = (
        torch.autograd.grad(loss.float().sum() * factor, leaves["k_idx"], retain_graph=True)[0].float()
        for factor in (1.0, 2.0**-11)
    )
    assert ((small * 2**11 - one).norm() / one.norm()).item() < 2**-10


def test_a_given_choice_is_aligned_and_a_call_without_the_indexer_has_no_loss() -> None:
    op = operator("each KV head")
    inputs = inputs_of(op, 5, tokens_kv=77)
    indices = torch.tensor([[4, 0, -1], [-1, -1, -1], [9, 2, 1], [0, 1, 2], [4, 3, 0]], dtype=torch.int32)
    indices = indices[None, :, None].expand(1, 5, 2, 3).contiguous().to(DEVICE)
    counts = torch.tensor([2, 3, 3, 1, 0], dtype=torch.int32)[None, :, None].expand(1, 5, 2).contiguous().to(DEVICE)
    assert_aligned(op, inputs, indices=indices, counts=counts)
    bare = replace(inputs, q_idx=None, k_idx=None)
    assert call(op, bare, indices=indices, return_aux=True)[1].alignment_loss is None


def test_without_a_gradient_of_the_loss_nothing_of_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = operator("each KV head")
    inputs = inputs_of(op, 20)
    before = call_with_gradients(op, inputs)

    def refuse(*_: object) -> None:
        raise AssertionError("the loss was differentiated")

    monkeypatch.setattr(sys.modules[f"{op.module.__name__}.ops"], "alignment_backward", refuse)
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in ("q", "k", "v", "q_idx", "k_idx")}
    o, aux = call(op, replace(inputs, **leaves), return_aux=True)
    found = torch.autograd.grad(o, list(leaves.values()), inputs.do, allow_unused=True, retain_graph=True)
    assert found[3] is None and found[4] is None
    for name, gradient in zip(("dq", "dk", "dv"), found, strict=False):
        assert torch.equal(gradient, before[name])
    with pytest.raises(AssertionError, match="the loss was differentiated"):
        aux.alignment_loss.sum().backward()


def test_the_loss_changes_no_bit_of_attention_nor_of_its_gradients_and_has_the_same_bits_again() -> None:
    op = operator("each KV head")
    inputs = inputs_of(op, 20, batch=2)
    plain = call_with_gradients(op, inputs)
    found = []
    for _ in range(2):
        leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in ("q", "k", "v", "q_idx", "k_idx")}
        o, aux = call(op, replace(inputs, **leaves), return_aux=True)
        ((o * inputs.do).sum() + aux.alignment_loss.sum()).backward()
        found.append([aux.alignment_loss.detach(), *(x.grad for x in leaves.values())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    for name, gradient in zip(("dq", "dk", "dv"), found[0][1:], strict=False):
        assert torch.equal(gradient, plain[name])
    one = replace(
        inputs, **{name: x[1:] for name in ("q", "k", "v", "q_idx", "k_idx", "do") for x in [getattr(inputs, name)]}
    )
    assert torch.equal(call(op, one, return_aux=True)[1].alignment_loss, found[0][0][1:])


def test_rows_behind_the_last_sequence_have_no_part_in_it() -> None:
    op = operator("each KV head")
    inputs = inputs_of(op, (23, 40))
    bounds = torch.tensor([0, 23, 50], dtype=torch.int32, device=DEVICE)
    loss, leaves, _ = aligned(op, replace(inputs, cu_seqlens=bounds))
    loss.sum().backward()
    for name in ("q_idx", "k_idx"):
        assert not bool(leaves[name].grad[50:].any()) and bool(leaves[name].grad[:50].any())
    cut = {name: getattr(inputs, name)[:50] for name in ("q", "k", "v", "q_idx", "k_idx", "do")}
    assert torch.equal(aligned(op, replace(inputs, **cut, cu_seqlens=bounds))[0], loss)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 20), (2, 0)])
def test_no_query_has_no_loss(batch: int, tokens: int) -> None:
    op = operator("each KV head")
    loss, leaves, _ = aligned(op, inputs_of(op, tokens, batch=batch))
    assert loss.shape == (batch,) and not bool(loss.any())
    loss.sum().backward()
    assert leaves["q_idx"].grad.shape == leaves["q_idx"].shape


def test_the_operator_of_the_loss_keeps_pytorchs_rules() -> None:
    op = operator("each KV head")
    operator_of_loss = op.registration.operator("alignment_loss")
    for shape in ({"tokens": 9, "tokens_kv": 60}, {"tokens": (9, 30)}):
        inputs = inputs_of(op, **shape)
        _, aux = call(op, inputs, return_aux=True)
        packed = inputs.cu_seqlens is not None
        given = (inputs.q, inputs.k, inputs.q_idx, inputs.k_idx, aux.lse_slc, aux.indices, aux.counts)
        given = tuple(x[None] if packed else x for x in given)
        for x in given[2:4]:
            x.requires_grad_()
        found = torch.library.opcheck(operator_of_loss, (*given, inputs.cu_seqlens, 64))
        assert set(found.values()) == {"SUCCESS"} and len(found) >= 4


def test_a_package_without_a_backward_has_no_loss() -> None:
    op = operator("each KV head", passes=("forward", "decode"))
    assert "alignment_loss" not in op.Auxiliary._fields
    assert "alignment_loss" not in dir(op.ops)
