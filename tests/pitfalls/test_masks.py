"""Who sees what: the window's width, the causal edge inside a block, tails that fit no tile."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.support import DEVICE, assert_matches_oracle, inputs_of, operator_of, uniform_keys


@pytest.mark.parametrize("window", [1, 10, 16, 17])
def test_a_query_sees_exactly_window_keys_itself_included(window: int) -> None:
    op = operator_of("win", gate="none", window=window, passes=("forward",))
    tokens = window + 21
    o, lse = op.window_attention(*uniform_keys(op, tokens))
    t = torch.arange(tokens, device=DEVICE)
    number = torch.clamp(t + 1, max=window).double()
    torch.testing.assert_close(lse[0, :, 0].double().exp(), number, rtol=1e-5, atol=0)
    oldest = torch.clamp(t - window + 1, min=0)
    torch.testing.assert_close(o[0, :, 0, 0].double(), (oldest + t).double() / 2, rtol=1e-5, atol=1e-5)


def test_the_last_queries_of_a_long_call_equal_a_call_of_the_last_queries_alone() -> None:
    op = operator_of(window=17, gate="none", passes=("forward",))
    inputs = inputs_of(op, 35, seed=1)
    whole, aux = op.nsa_attention(inputs.q, inputs.k, inputs.v, return_aux=True)
    for rows in (1, 3):
        part, few = op.nsa_attention(inputs.q[:, -rows:], inputs.k, inputs.v, return_aux=True)
        torch.testing.assert_close(part, whole[:, -rows:], rtol=1e-5, atol=1e-6)
        assert torch.equal(few.indices, aux.indices[:, -rows:])
        for branch in ("cmp", "slc", "win"):
            name = f"lse_{branch}"
            torch.testing.assert_close(getattr(few, name), getattr(aux, name)[:, -rows:], rtol=1e-5, atol=1e-6)


def test_keys_after_the_query_in_its_own_block_are_masked_at_every_place_in_the_block() -> None:
    op = operator_of("slc", indices="input", gate="none", count=1, passes=("forward",))
    tokens = 32
    q, k, v = uniform_keys(op, tokens)
    own = torch.arange(tokens, device=DEVICE, dtype=torch.int32) // 16
    o, lse = op.selected_attention(q, k, v, own[None, :, None, None].contiguous())
    t = torch.arange(tokens, device=DEVICE)
    torch.testing.assert_close(lse[0, :, 0].double().exp(), (t % 16 + 1).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(o[0, :, 0, 0].double(), (t // 16 * 16 + t).double() / 2, rtol=1e-5, atol=1e-5)


def test_keys_after_the_query_in_its_own_block_get_no_gradient_from_it() -> None:
    op = operator_of("slc", indices="input", gate="none", count=1)
    k_of, v_of = (torch.randn(1, 32, 1, 16, device=DEVICE) for _ in range(2))
    for place in (0, 7, 15):
        q = torch.randn(1, 16 - place, 2, 16, device=DEVICE)  # positions 16 + place .. 31
        indices = torch.full((1, 16 - place, 1, 1), -1, dtype=torch.int32, device=DEVICE)
        indices[:, 0] = 1
        k, v = k_of.clone().requires_grad_(), v_of.clone().requires_grad_()
        o, _ = op.selected_attention(q, k, v, indices)
        dk, dv = torch.autograd.grad(o.sum(), [k, v])
        seen = dv.abs().sum((0, 2, 3)) > 0
        assert seen.nonzero().flatten().tolist() == list(range(16, 17 + place))
        assert not dk[:, :16].any() and not dk[:, 17 + place :].any()


def test_a_compressed_block_is_seen_from_its_last_position_on() -> None:
    op = operator_of("cmp", gate="none", passes=("forward",))
    q, k, v = uniform_keys(op, 41)
    k_cmp, v_cmp = op.compress(k, v)
    torch.testing.assert_close(v_cmp[0, :, 0, 0], torch.arange(9, device=DEVICE) * 4 + 3.5)
    o, lse = op.compressed_attention(q, k_cmp, v_cmp)
    for t in range(41):
        visible = [i for i in range(9) if i * 4 + 8 - 1 <= t]
        assert round(lse[0, t, 0].double().exp().item()) == len(visible)
        mean = sum(4 * i + 3.5 for i in visible) / max(len(visible), 1)
        assert abs(o[0, t, 0, 0].item() - mean) < 1e-4


# l = 8, l' = 16, w = 10: each, its neighbours, and primes.
LENGTHS = [1, 7, 8, 9, 10, 11, 15, 16, 17, 23, 37]


@pytest.mark.parametrize("tokens", LENGTHS)
def test_lengths_around_every_boundary_are_exact(tokens: int) -> None:
    op = operator_of(count=2)
    assert_matches_oracle(op, tokens, seed=tokens)


@pytest.mark.parametrize(("tokens", "tokens_kv"), [(1, 1), (1, 67), (5, 64), (3, 8), (2, 7), (13, 41)])
def test_queries_align_to_the_end_of_more_keys(tokens: int, tokens_kv: int) -> None:
    op = operator_of(count=3)
    assert_matches_oracle(op, tokens, tokens_kv=tokens_kv, seed=tokens_kv)


def test_tiles_of_other_sizes_give_the_same_result() -> None:
    op = operator_of(block=32, count=2, window=33)
    inputs = inputs_of(op, 5, tokens_kv=75, seed=2)
    sizes = {
        "window_forward": {"QUERY_BLOCK": 32, "KEY_BLOCK": 32},
        "window_backward_dq": {"QUERY_BLOCK": 16, "KEY_BLOCK": 32},
        "window_backward_dkdv": {"QUERY_BLOCK": 32, "KEY_BLOCK": 16},
        "compressed_forward": {"QUERY_BLOCK": 16, "KEY_BLOCK": 32},
        "selected_forward": {"KEY_BLOCK": 32},
        "selected_backward_dq": {"KEY_BLOCK": 32},
    }
    with contextlib.ExitStack() as stack:
        for kernel, values in sizes.items():
            stack.enter_context(op.configs.override(kernel, **values))
        assert_matches_oracle(op, 5, inputs=inputs)
    assert_matches_oracle(op, 5, inputs=inputs)
