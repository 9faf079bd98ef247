"""Gradients: wide values, any number of blocks, sums over the group, the same bits twice."""

from __future__ import annotations

import pytest
import torch

from nsa_gen.verification import reference_gradients
from tests.support import DEVICE, assert_matches_oracle, call, call_with_gradients, inputs_of, operator_of


@pytest.mark.parametrize("head_dim_v", [192, 256])
def test_gradients_are_right_for_values_wider_than_128(head_dim_v: int) -> None:
    op = operator_of(dims=(16, head_dim_v))
    found = assert_matches_oracle(op, 5, tokens_kv=40, seed=head_dim_v)
    assert {"dq", "dk", "dv", "dgates"} <= found.keys()


@pytest.mark.parametrize("count", [1, 3, 5, 13])
def test_any_number_of_selected_blocks_is_used_in_forward_and_backward(count: int) -> None:
    op = operator_of("cmp slc", count=count, initial=min(1, count - 1), gate="given")
    inputs = inputs_of(op, 2, tokens_kv=16 * (count + 1) + 3, seed=count)
    assert_matches_oracle(op, 2, inputs=inputs)
    _, aux = call(op, inputs, return_aux=True)
    assert (aux.counts == count).all() and (aux.indices >= 0).all()


def test_every_one_of_five_selected_blocks_gets_its_key_and_value_gradients() -> None:
    op = operator_of("slc", indices="input", count=5, gate="none")
    k, v = (torch.randn(1, 100, 1, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    q = torch.randn(1, 1, 2, 16, device=DEVICE)
    indices = torch.tensor([0, 1, 3, 4, 6], dtype=torch.int32, device=DEVICE)[None, None, None]
    o, _ = op.selected_attention(q, k, v, indices)
    for gradient in torch.autograd.grad(o.square().sum(), [k, v]):
        blocks = gradient.abs().sum((0, 2, 3))
        reached = {j for j in range(7) if blocks[j * 16 : (j + 1) * 16].all()}
        assert reached == {0, 1, 3, 4, 6}
        assert not blocks[32:48].any() and not blocks[80:96].any()


def test_key_and_value_gradients_are_summed_over_the_group_in_float32_and_rounded_once() -> None:
    op = operator_of("slc win", indices="input", group=16, count=2, dtype="float16", gate="none", window=20)
    inputs = inputs_of(op, 8, tokens_kv=32, seed=6)
    assert inputs.indices is not None
    inputs.indices.copy_(torch.tensor([0, 1], dtype=torch.int32))
    inputs.do.copy_(inputs.do.abs())  # the heads' contributions to dv add up rather than cancel
    found = assert_matches_oracle(op, 8, inputs=inputs)
    assert found["dk"].ok and found["dv"].ok  # at most twice the error of plain PyTorch
    actual = call_with_gradients(op, inputs)["dv"].double()
    exact = inputs.to(torch.float64)
    truth = reference_gradients(op.parameters, exact).gradients["v"]
    # What rounding each head's part to half precision before the sum would give.
    rounded = torch.zeros_like(inputs.v)
    for head in range(16):
        do = torch.zeros_like(exact.do)
        do[:, :, head] = exact.do[:, :, head]
        exact_of_head = reference_gradients(op.parameters, exact.__class__(**{**vars(exact), "do": do}))
        rounded += exact_of_head.gradients["v"].to(torch.float16)
    error, error_if_rounded = (actual - truth).norm(), (rounded.double() - truth).norm()
    assert error < 0.6 * error_if_rounded, (error, error_if_rounded)


def test_branches_sum_their_shared_gradients_in_float32_and_round_once() -> None:
    op = operator_of(dtype="float16", count=2, gate="given")
    assert_matches_oracle(op, 8, tokens_kv=33, seed=7)


def test_the_same_call_gives_the_same_bits_forward_and_backward() -> None:
    op = operator_of(group=3, count=2, phi="weighted", position=("learned", "none"))
    inputs = inputs_of(op, (12, 0, 1), seed=8)
    first, second = call_with_gradients(op, inputs), call_with_gradients(op, inputs)
    assert len(first) >= 15
    for name, x in first.items():
        if name not in ("k_cmp", "v_cmp"):  # their rows between two sequences are padding
            assert torch.equal(x, second[name]), name
