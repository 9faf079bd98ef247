"""Softmax in pieces: spread logits, moving maxima, the scale, the base of lse, rows that see nothing, padded groups."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support import DEVICE, assert_matches_oracle, call, inputs_of, operator_of, uniform_keys


def test_logits_forty_nats_apart_between_tokens_leave_every_row_its_own_maximum() -> None:
    op = operator_of(count=2)
    found = assert_matches_oracle(op, 6, tokens_kv=36, kind="spread", seed=1)
    assert {"o_cmp", "o_slc", "o_win", "dq", "dk", "dv"} <= found.keys()


@pytest.mark.parametrize("offset", [-40.0, -14.0, 21.0, 40.0])
def test_one_token_far_above_or_below_the_rest_disturbs_no_other_row(offset: float) -> None:
    op = operator_of("slc win", indices="input", count=2, gate="none", window=20)
    inputs = inputs_of(op, 4, tokens_kv=36, seed=2)
    assert inputs.k is not None
    direction = torch.nn.functional.normalize(inputs.q.mean((0, 1, 2)), dim=0)
    inputs.q.add_(4 * direction)  # every query has about 4 / sqrt(Dk) of it
    inputs.k[:, 20] += direction * offset  # the logit moves by about as many nats
    inputs.q[:, 2] *= 10  # and one query is ten times as sure as its neighbours in the tile
    indices = torch.tensor([1, 2], dtype=torch.int32, device=DEVICE).expand(1, 4, 1, 2).contiguous()
    assert inputs.indices is not None
    inputs.indices.copy_(indices)
    assert_matches_oracle(op, 4, inputs=inputs)


@pytest.mark.parametrize("kind", ["rising", "falling"])
def test_accumulators_are_rescaled_when_blocks_come_in_order_of_their_logits(kind: str) -> None:
    op = operator_of(count=4, initial=0, window=40)
    assert_matches_oracle(op, 4, tokens_kv=64, kind=kind, seed=3)


def test_a_scale_of_the_caller_reaches_all_three_branches_and_the_selection() -> None:
    op = operator_of(scale=0.37, dims=(24, 16), gate="given")
    assert_matches_oracle(op, 6, tokens_kv=50, seed=4)


def test_every_lse_is_the_natural_logarithm_of_the_number_of_equal_keys() -> None:
    op = operator_of(gate="none", count=2, initial=0, passes=("forward",))
    p, tokens = op.parameters, 36
    q, k, v = uniform_keys(op, tokens)
    o, aux = op.nsa_attention(q, k, v, return_aux=True)
    t = torch.arange(tokens, device=DEVICE)
    compressed = torch.tensor([p.compressed_blocks(int(x) + 1) for x in t], device=DEVICE)
    # n = 2 with equal importances: the own block (forced), and block 0 below it.
    selected = t % 16 + 1 + torch.where(t >= 16, 16, 0)
    numbers = {"cmp": compressed, "slc": selected, "win": torch.clamp(t + 1, max=10)}
    assert o.isfinite().all()
    for branch, number in numbers.items():
        lse = getattr(aux, f"lse_{branch}")
        assert lse.dtype == torch.float32
        expected = torch.log(number.double())[None, :, None].expand(lse.shape)
        torch.testing.assert_close(lse.double(), expected, atol=1e-6, rtol=1e-6)


def test_the_lse_of_a_logit_of_forty_is_forty() -> None:
    op = operator_of("win", gate="none", scale=1.0, window=10, passes=("forward",))
    q, k, v = uniform_keys(op, 1)
    q[..., 0], k[..., 0] = 8.0, 5.0
    _, lse = op.window_attention(q, k, v)
    torch.testing.assert_close(lse, torch.full_like(lse, 40.0), atol=1e-5, rtol=0)


def test_queries_before_the_first_complete_block_get_zero_minus_infinity_and_zero_gradients() -> None:
    op = operator_of("cmp", gate="none")
    first = op.parameters.compression_block - 1
    for tokens in (first, first + 13):
        inputs = inputs_of(op, tokens, seed=tokens)
        leaves = {name: x.requires_grad_() for name, x in inputs.differentiable().items()}
        o, aux = call(op, inputs, return_aux=True)
        assert not o[:, :first].any() and (aux.lse_cmp[:, :first] == -math.inf).all()
        assert aux.lse_cmp[:, first:].isfinite().all()
        gradients = dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), inputs.do), strict=True))
        assert all(x.isfinite().all() for x in gradients.values())
        assert not gradients["q"][:, :first].any()
        assert gradients["q"][:, first + 4 :].any() == (tokens > first)
        if tokens == first:
            assert not gradients["k"].any() and not gradients["v"].any()


def test_rows_that_name_no_block_get_zero_minus_infinity_and_zero_gradients() -> None:
    op = operator_of("slc", indices="input", gate="none", count=2)
    inputs = inputs_of(op, 5, tokens_kv=20, seed=5)
    assert inputs.indices is not None and inputs.k is not None and inputs.v is not None
    for empty in (slice(None), slice(1, 4)):
        inputs.indices.copy_(torch.tensor([0, 1], dtype=torch.int32))
        inputs.indices[:, empty] = -1
        leaves = [inputs.q.requires_grad_(), inputs.k.requires_grad_(), inputs.v.requires_grad_()]
        o, aux = call(op, inputs, return_aux=True)
        assert not o[:, empty].any() and (aux.lse_slc[:, empty] == -math.inf).all()
        dq, dk, dv = torch.autograd.grad(o, leaves, inputs.do)
        assert not dq[:, empty].any()
        for gradient in (dq, dk, dv):
            assert gradient.isfinite().all()
            assert gradient.any() == (empty != slice(None))
        assert o[:, 4].any() == (empty != slice(None))


@pytest.mark.parametrize(
    ("group", "kv_heads"), [(1, 2), (2, 2), (3, 2), (5, 2), (7, 1), (8, 1), (12, 1), (16, 1), (32, 1)]
)
def test_groups_of_any_size_share_one_kv_head(group: int, kv_heads: int) -> None:
    op = operator_of(group=group, kv_heads=kv_heads, count=2)
    assert_matches_oracle(op, 2 if group < 16 else 1, tokens_kv=35 if group < 8 else 18, seed=group)
