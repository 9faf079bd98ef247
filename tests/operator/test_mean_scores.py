"""Blocks chosen by their mean keys (MoBA), against a naive version that looks at one query and block at a time."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nsa_gen.spec import Spec
from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.schedules import Variation
from tests.support import (
    DEVICE,
    Operator,
    assert_matches_oracle,
    call,
    call_with_gradients,
    inputs_of,
    operator_of,
    operator_of_spec,
    set_constants,
    small_spec,
)

BLOCK, COUNT = 16, 3
#: Head dims that are no powers of two, a group of three, two KV heads: MoBA's own choice of forced blocks.
PLAIN = {"group": 3, "kv_heads": 2, "dims": (24, 40), "initial": 0, "local": 1, "scores": "mean", "count": COUNT}
RANDOM = torch.Generator().manual_seed(7)


def moba(**changes: object) -> Operator:
    return operator_of("slc", gate="none", **(PLAIN | changes))  # type: ignore[arg-type]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM).to(DEVICE)


def naive_choice(q: Tensor, k: Tensor, scale: float, count: int, initial: int, local: int) -> Tensor:
    """The blocks of one sequence's queries (Tq, Hq, Dk) at the end of its keys (Tkv, Hkv, Dk): (Tq, Hkv, n)."""
    q, k = q.double().cpu(), k.double().cpu()
    rows, heads, _ = q.shape
    tokens, kv_heads, _ = k.shape
    group = heads // kv_heads
    chosen = torch.full((rows, kv_heads, count), -1)
    for row, head in itertools.product(range(rows), range(kv_heads)):
        own = (tokens - rows + row) // BLOCK
        forced = {j for j in range(own + 1) if j < initial or j > own - local}
        scores = {}
        for j in set(range(own)) - forced:
            mean = k[j * BLOCK : (j + 1) * BLOCK, head].sum(0) / BLOCK
            scores[j] = sum(scale * float(q[row, head * group + g] @ mean) for g in range(group))
        ranked = sorted(scores, key=lambda j: (math.isnan(scores[j]), -scores[j] if scores[j] == scores[j] else 0.0, j))
        blocks = sorted(forced | set(ranked[: count - len(forced)]))
        chosen[row, head, : len(blocks)] = torch.tensor(blocks)
    return chosen


def naive_attention(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Attention of one sequence to the chosen blocks (Tq, Hkv, n), by torch and differentiable: (Tq, Hq, Dv)."""
    rows, tokens = q.shape[0], k.shape[0]
    group = q.shape[1] // k.shape[1]
    key = torch.arange(tokens, device=q.device)
    position = torch.arange(tokens - rows, tokens, device=q.device)
    seen = (chosen.to(q.device)[..., None] == key // BLOCK).any(-2) & (key <= position[:, None])[:, None]
    mask = seen.transpose(0, 1).repeat_interleave(group, 0)
    heads = (x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    return functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).transpose(0, 1)


@pytest.mark.parametrize(("rows", "tokens"), [(100, 100), (21, 117), (1, 16 * 9), (5, 16 * 9 + 1), (BLOCK, BLOCK)])
@pytest.mark.parametrize(("count", "initial", "local"), [(3, 0, 1), (4, 1, 2), (5, 2, 1), (2, 1, 1), (1, 0, 1)])
def test_the_choice_is_that_of_one_query_and_block_at_a_time(
    rows: int, tokens: int, count: int, initial: int, local: int
) -> None:
    op = moba(count=count, initial=initial, local=local)
    scale = op.parameters.scale
    q, k = draw(2, rows, 6, 24), draw(2, tokens, 2, 24) - 0.2
    indices, counts = op.select_blocks(q, k)
    for entry in range(2):
        expected = naive_choice(q[entry], k[entry], scale, count, initial, local)
        assert torch.equal(indices[entry].cpu().long(), expected)
        assert torch.equal(counts[entry].cpu().long(), (expected >= 0).sum(-1))
    assert indices.dtype == counts.dtype == torch.int32


def test_more_slots_than_a_thread_sorts_are_filled_with_scores_of_either_sign() -> None:
    count = 36
    op = moba(count=count, group=1, kv_heads=1)
    tokens = BLOCK * (count + 9) + 3
    for shift in (3.0, -3.0):  # thresholds above 0 and below it
        q, k = draw(1, 4, 1, 24), draw(1, tokens, 1, 24)
        k += shift * q[:, :1] / q[:, :1].norm()
        indices, _ = op.select_blocks(q, k)
        assert torch.equal(indices[0].cpu().long(), naive_choice(q[0], k[0], 1.0, count, 0, 1))
    # Equal scores of zeros of either sign, and unknown ones among negative ones.
    q, k = torch.ones(1, 4, 1, 24), torch.zeros(1, tokens, 1, 24)
    k[:, : 20 * BLOCK] = -0.0
    k[:, 30 * BLOCK :] = -1.0
    k[:, 3 * BLOCK] = k[:, 31 * BLOCK + 5] = math.nan
    indices, _ = op.select_blocks(q.to(DEVICE), k.to(DEVICE))
    assert torch.equal(indices[0].cpu().long(), naive_choice(q[0], k[0], 1.0, count, 0, 1))
    k[:, : 40 * BLOCK : BLOCK] = math.nan  # fewer known than slots
    indices, _ = op.select_blocks(q.to(DEVICE), k.to(DEVICE))
    assert torch.equal(indices[0].cpu().long(), naive_choice(q[0], k[0], 1.0, count, 0, 1))


def test_negative_scores_are_ranked_as_they_are() -> None:
    op = moba(group=1, kv_heads=1)
    q, k = torch.ones(1, 1, 1, 24), torch.zeros(1, 8 * BLOCK, 1, 24)
    for block, value in enumerate((-5.0, -1.0, -3.0, -2.0, -4.0, -6.0, -7.0)):
        k[:, block * BLOCK : (block + 1) * BLOCK] = value
    indices, _ = op.select_blocks(q.to(DEVICE), k.to(DEVICE))
    assert indices.flatten().tolist() == [1, 3, 7]
    k[:, 2 * BLOCK] = math.nan  # unknown, below the lowest
    k[:, :BLOCK] = k[:, 4 * BLOCK : 7 * BLOCK] = -math.inf
    indices, _ = op.select_blocks(q.to(DEVICE), k.to(DEVICE))
    assert indices.flatten().tolist() == [1, 3, 7]
    k[:, 3 * BLOCK : 4 * BLOCK] = math.nan
    indices, _ = op.select_blocks(q.to(DEVICE), k.to(DEVICE))
    assert indices.flatten().tolist() == [0, 1, 7]  # minus infinity before NaN, and the lowest of the equal


def test_equal_scores_go_to_the_lower_blocks() -> None:
    op = moba()
    period = draw(1, BLOCK, 2, 24)
    indices, _ = op.select_blocks(draw(1, 40, 6, 24), period.repeat(1, 7, 1, 1))
    assert indices[0, -1].tolist() == [[0, 1, 6]] * 2


def test_few_tokens_are_dense_causal_attention() -> None:
    op = moba()
    tokens = BLOCK * COUNT
    q, k, v = draw(1, tokens, 6, 24), draw(1, tokens, 2, 24), draw(1, tokens, 2, 40)
    o = op.nsa_attention(q, k, v)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    dense = functional.scaled_dot_product_attention(*heads, is_causal=True, scale=op.parameters.scale, enable_gqa=True)
    torch.testing.assert_close(o, dense.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "tokens"), [(90, 90), (19, 117)])
def test_outputs_and_gradients_are_those_of_attention_to_the_chosen_blocks_alone(rows: int, tokens: int) -> None:
    op = moba()
    scale = op.parameters.scale
    q, k, v = (x.requires_grad_() for x in (draw(1, rows, 6, 24), draw(1, tokens, 2, 24), draw(1, tokens, 2, 40)))
    do = draw(1, rows, 6, 40)
    o, aux = op.nsa_attention(q, k, v, return_aux=True)
    chosen = naive_choice(q[0].detach(), k[0].detach(), scale, COUNT, 0, 1)
    assert torch.equal(aux.indices[0].cpu().long(), chosen)
    assert not aux.indices.requires_grad and torch.equal(aux.counts.long(), (aux.indices >= 0).sum(-1))
    expected = naive_attention(q[0], k[0], v[0], chosen, scale)[None]
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(o, (q, k, v), do)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, (q, k, v), do), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(23, 0, 1, 69, 0), (15, 85), (0, 0), (16, 48, 33)])
def test_packed_sequences_have_blocks_of_their_own(lengths: tuple[int, ...]) -> None:
    op = moba(count=2)
    total = sum(lengths)
    bounds = [0, *itertools.accumulate(lengths)]
    q, k, v = draw(total, 6, 24), draw(total, 2, 24), draw(total, 2, 40)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    o, aux = op.nsa_attention(q, k, v, cu_seqlens=cu_seqlens, return_aux=True)
    alone, counts = op.select_blocks(q, k, cu_seqlens=cu_seqlens)
    assert torch.equal(aux.indices, alone) and torch.equal(aux.counts, counts)
    for start, stop in itertools.pairwise(bounds):
        mine = q[start:stop], k[start:stop], v[start:stop]
        chosen = naive_choice(*mine[:2], op.parameters.scale, 2, 0, 1)
        assert torch.equal(aux.indices[start:stop].cpu().long(), chosen)
        if stop > start:
            expected = naive_attention(*mine, chosen, op.parameters.scale)
            torch.testing.assert_close(o[start:stop], expected, rtol=1e-5, atol=1e-5)


def test_a_nan_key_reaches_who_sees_it_and_its_block_ranks_last_for_the_others() -> None:
    op = moba()
    tokens, torn = 8 * BLOCK + 5, 5 * BLOCK + 3
    q, k, v = draw(1, tokens, 6, 24), draw(1, tokens, 2, 24), draw(1, tokens, 2, 40)
    before = op.nsa_attention(q, k, v)
    k[0, torn, 0, 1] = math.nan
    o, aux = op.nsa_attention(q, k, v, return_aux=True)
    assert torch.equal(aux.indices[0].cpu().long(), naive_choice(q[0], k[0], 1.0, COUNT, 0, 1))
    own = torch.arange(tokens, device=DEVICE) // BLOCK
    # Later queries have blocks enough, and do not choose it; those of its own block see it from its token on.
    assert not (aux.indices[0, own > 5, 0] == 5).any()
    unknown = o[0, :, :3].isnan().any(-1).any(-1)
    assert torch.equal(unknown, (own == 5) & (torch.arange(tokens, device=DEVICE) >= torn))
    assert torch.equal(o[0, :, 3:], before[0, :, 3:]) and torch.equal(o[0, :torn], before[0, :torn])


@pytest.mark.parametrize(
    "spec",
    [
        small_spec("slc win", scores="mean", count=2, kv="per_branch", dims=(24, 16), group=3),
        small_spec("slc win", scores="mean", count=3, local=2, window=33, gate="given"),
        small_spec("cmp slc", scores="mean", count=3, gate="none", dims=(16, 80)),
        small_spec(scores="mean", count=3, kv="per_branch", phi="external", dtype="float16"),
        small_spec("slc", scores="mean", count=2, gate="sigmoid", dtype="float16", group=1, kv_heads=2, dims=(96, 16)),
        small_spec("slc", scores="mean", count=2, initial=1, local=1, passes=("forward",)),
    ],
    ids=lambda spec: f"{' '.join(spec.branches)} {spec.kv} {spec.dtype} {spec.head_dim.qk}",
)
def test_with_other_branches_everything_is_the_oracles(spec: Spec) -> None:
    op = operator_of_spec(spec)
    gradients = "backward" in op.spec.passes
    assert_matches_oracle(op, 7, tokens_kv=5 * BLOCK + 6, gradients=gradients, seed=2)
    assert_matches_oracle(op, (15, 0, 5 * BLOCK + 2, 1), gradients=False, seed=3)


def test_the_local_blocks_in_the_window_and_a_recomputed_branch_change_nothing_but_rounding() -> None:
    op = operator_of("slc win", scores="mean", count=3, local=2, window=33)
    inputs = inputs_of(op, 9, tokens_kv=5 * BLOCK + 6)
    for local, recompute in itertools.product((0, 1), ((), ("slc",), ("win", "slc"))):
        way = Variation(0, (("selected_attention", "LOCAL_IN_WINDOW", local),), recompute)
        case = Case(9, 5 * BLOCK + 6, batch=1, twice=True, variation=way)
        rows = check_case(op.module, op.parameters, case, inputs, with_gradients=True)
        assert not [row for row in rows if not row.ok], (local, recompute)
    plain = call_with_gradients(op, inputs)
    assert {"indices", "counts", "lse_slc", "o_win"} <= plain.keys()


def test_scores_are_exact_where_the_spec_rounds_its_products_to_tf32() -> None:
    op = operator_of_spec(moba().spec.replace(fp32_precision="tf32"))
    q, k = torch.ones(1, 1, 6, 24), torch.zeros(1, 7 * BLOCK, 2, 24)
    k[:, :, :, 0] = 1.0
    k[:, 3 * BLOCK : 4 * BLOCK, :, 0] = 1.0 + 2.0**-20  # the same number in tf32
    k[:, 5 * BLOCK : 6 * BLOCK, :, 0] = 1.0 + 2.0**-19
    indices, _ = op.select_blocks(q.to(DEVICE), k.to(DEVICE))
    assert indices[0, 0].tolist() == [[3, 5, 6]] * 2


def test_strided_queries_and_keys_need_no_copy() -> None:
    op = moba()
    fused = draw(1, 90, 6 * 24 + 2 * 24 + 2 * 40)
    q, k, v = fused.split((6 * 24, 2 * 24, 2 * 40), -1)
    views = q.unflatten(-1, (6, 24)), k.unflatten(-1, (2, 24)), v.unflatten(-1, (2, 40))
    assert torch.equal(op.nsa_attention(*views), op.nsa_attention(*(x.contiguous() for x in views)))


def test_select_blocks_names_what_is_wrong_with_its_keys() -> None:
    op = moba()
    q, k = draw(1, 20, 6, 24), draw(1, 20, 2, 24)
    with pytest.raises(ValueError, match="k: expected at least q's 20 tokens, got 19"):
        op.select_blocks(q, k[:, :19])
    with pytest.raises(ValueError, match=r"k: expected shape \(B=1, Tkv=20, Hkv=2, Dk=24\)"):
        op.select_blocks(q, k[:, :, :1])
    bounds = torch.tensor([0, 19], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="k: expected q's 19 tokens, got 20"):
        op.select_blocks(q[0, :19], k[0], cu_seqlens=bounds)
    with pytest.raises(TypeError, match="k: expected dtype"):
        op.select_blocks(q, k.half())
    assert call(op, inputs_of(op, 5)).shape == (1, 5, 6, 40)


@pytest.mark.parametrize("forced", [False, True])
def test_the_steps_make_the_whole_and_suit_compilers(forced: bool) -> None:
    op = moba(count=2, initial=1) if forced else moba(count=2)
    inputs = inputs_of(op, 4, tokens_kv=5 * BLOCK + 2)
    whole = call_with_gradients(op, inputs)
    indices, counts = op.select_blocks(inputs.q.requires_grad_(), inputs.k)
    o, lse = op.selected_attention(inputs.q, inputs.k, inputs.v, indices, counts)
    for name, x in {"indices": indices, "counts": counts, "o": o.detach(), "lse_slc": lse}.items():
        assert torch.equal(x, whole[name]), name
    assert not indices.requires_grad and not counts.requires_grad
    assert op.select_blocks.__module__.endswith("steps") and not hasattr(op.module, "compress")
    operator = op.registration.operator("select_blocks")
    packed = torch.tensor([0, 9, 40], dtype=torch.int32, device=DEVICE)
    for arguments in ((inputs.q, inputs.k, None), (draw(1, 40, 6, 24), draw(1, 40, 2, 24), packed)):
        found = torch.library.opcheck(operator, arguments)
        assert set(found.values()) == {"SUCCESS"} and len(found) >= 4


def test_an_empty_batch_and_no_token_are_empty() -> None:
    op = moba()
    for batch, tokens in ((0, 40), (2, 0)):
        q, k, v = draw(batch, tokens, 6, 24), draw(batch, tokens, 2, 24), draw(batch, tokens, 2, 40)
        assert op.select_blocks(q, k)[0].shape == (batch, tokens, 2, COUNT)
        assert op.nsa_attention(q, k, v).shape == (batch, tokens, 6, 40)


def test_memory_between_q_and_the_choice_is_bounded_by_shares_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    op = moba(group=1, kv_heads=1)
    q, k = draw(1, 100, 1, 24), draw(1, 9 * BLOCK, 1, 24)
    whole, _ = op.select_blocks(q, k)
    selection = sys.modules[f"{op.module.__name__}.kernels.selection"]
    set_constants(monkeypatch, op, "selection", SCORE_BYTES=4 * 9 * 32, SCORE_TOKENS=32)
    assert selection.tiles_at_once(4, 32, selection.Sequences(1, 100, 9 * BLOCK)) == 1
    assert torch.equal(op.select_blocks(q, k)[0], whole)
