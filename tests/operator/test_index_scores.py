"""Blocks chosen by an indexer (MSA), against a naive version that looks at one query, block and token at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nsa_gen.spec import Spec
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

BLOCK, COUNT, DIM = 16, 3, 16
PLAIN = {"group": 3, "kv_heads": 2, "dims": (24, 40), "initial": 0, "local": 1, "index": DIM, "count": COUNT}
RANDOM = torch.Generator().manual_seed(7)


def msa(**changes: object) -> Operator:
    return operator_of("slc", gate="none", **(PLAIN | changes))  # type: ignore[arg-type]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM).to(DEVICE)


def index_of(rows: int, tokens: int, scopes: int = 2, batch: int = 1) -> tuple[Tensor, Tensor]:
    return draw(batch, rows, scopes, DIM), draw(batch, tokens, 1, DIM)


def naive_choice(q_idx: Tensor, k_idx: Tensor, count: int, initial: int = 0, local: int = 1) -> Tensor:
    """The blocks of one sequence's index queries (Tq, S, Di) at the end of its index keys (Tkv, 1, Di): (Tq, S, n)."""
    q, k = q_idx.double().cpu(), k_idx.double().cpu()[:, 0]
    rows, scopes, _ = q.shape
    tokens = k.shape[0]
    chosen = torch.full((rows, scopes, count), -1)
    for row, scope in itertools.product(range(rows), range(scopes)):
        own = (tokens - rows + row) // BLOCK
        forced = {j for j in range(own + 1) if j < initial or j > own - local}
        scores = {}
        for j in set(range(own)) - forced:
            products = [float(q[row, scope] @ k[i]) for i in range(j * BLOCK, (j + 1) * BLOCK)]
            scores[j] = math.nan if any(map(math.isnan, products)) else max(products)
        ranked = sorted(scores, key=lambda j: (math.isnan(scores[j]), -scores[j] if scores[j] == scores[j] else 0.0, j))
        blocks = sorted(forced | set(ranked[: count - len(forced)]))
        chosen[row, scope, : len(blocks)] = torch.tensor(blocks)
    return chosen


@pytest.mark.parametrize(("rows", "tokens"), [(100, 100), (21, 117), (1, 16 * 9), (5, 16 * 9 + 1), (BLOCK, BLOCK)])
@pytest.mark.parametrize(("count", "initial", "local"), [(3, 0, 1), (4, 1, 2), (5, 2, 1)])
def test_the_choice_is_that_of_one_query_and_token_at_a_time(
    rows: int, tokens: int, count: int, initial: int, local: int
) -> None:
    op = msa(count=count, initial=initial, local=local)
    q_idx, k_idx = index_of(rows, tokens, batch=2)
    indices, counts = op.select_blocks(q_idx, k_idx)
    for entry in range(2):
        expected = naive_choice(q_idx[entry], k_idx[entry], count, initial, local)
        assert torch.equal(indices[entry].cpu().long(), expected)
        assert torch.equal(counts[entry].cpu().long(), (expected >= 0).sum(-1))
    assert indices.dtype == counts.dtype == torch.int32


@pytest.mark.parametrize(("scope", "scopes"), [("group", 2), ("head", 6), ("all", 1)])
def test_each_scope_has_index_queries_of_its_own(scope: str, scopes: int) -> None:
    op = msa(scope=scope)
    q_idx, k_idx = index_of(30, 110, scopes)
    q, k, v = draw(1, 30, 6, 24), draw(1, 110, 2, 24), draw(1, 110, 2, 40)
    _, aux = op.nsa_attention(q, k, v, q_idx=q_idx, k_idx=k_idx, return_aux=True)
    assert torch.equal(aux.indices[0].cpu().long(), naive_choice(q_idx[0], k_idx[0], COUNT))
    assert_matches_oracle(op, 9, tokens_kv=75)


def test_more_slots_than_a_thread_sorts_are_filled_with_scores_of_either_sign() -> None:
    count = 36
    op = msa(count=count, group=1, kv_heads=1)
    tokens = BLOCK * (count + 9) + 3
    for shift in (9.0, -9.0):  # thresholds above 0 and below it
        q_idx, k_idx = index_of(3, tokens, 1)
        k_idx += shift * q_idx[:, :1] / q_idx[:, :1].norm()
        indices, _ = op.select_blocks(q_idx, k_idx)
        assert torch.equal(indices[0].cpu().long(), naive_choice(q_idx[0], k_idx[0], count))
    # Equal scores of zeros of either sign, and unknown ones among negative ones.
    q_idx, k_idx = torch.ones(1, 3, 1, DIM), torch.zeros(1, tokens, 1, DIM)
    k_idx[:, : 20 * BLOCK] = -0.0
    k_idx[:, 30 * BLOCK :] = -1.0
    for torn in ((3 * BLOCK, 31 * BLOCK + 5), range(0, 40 * BLOCK, BLOCK)):  # the latter leaves fewer than slots
        k_idx[:, list(torn)] = math.nan
        indices, _ = op.select_blocks(q_idx.to(DEVICE), k_idx.to(DEVICE))
        assert torch.equal(indices[0].cpu().long(), naive_choice(q_idx[0], k_idx[0], count))


def test_infinities_rank_by_their_sign_and_nan_below_all() -> None:
    op = msa(group=1, kv_heads=1)
    q_idx, k_idx = torch.ones(1, 1, 1, DIM), torch.zeros(1, 8 * BLOCK, 1, DIM)
    for block, value in enumerate((-5.0, -1.0, -3.0, -2.0, -4.0, -6.0, -7.0)):
        k_idx[:, block * BLOCK : (block + 1) * BLOCK] = value

    def chosen() -> list[int]:
        return op.select_blocks(q_idx.to(DEVICE), k_idx.to(DEVICE))[0].flatten().tolist()

    assert chosen() == [1, 3, 7]
    k_idx[:, 5 * BLOCK + 7] = math.inf  # of one token is enough
    assert chosen() == [1, 5, 7]
    k_idx[:, 5 * BLOCK + 3] = math.nan  # and so is NaN of another
    k_idx[:, BLOCK + 15, 0, 2] = math.nan
    assert chosen() == [2, 3, 7]
    k_idx[:, :BLOCK] = k_idx[:, 3 * BLOCK : 5 * BLOCK] = k_idx[:, 6 * BLOCK : 7 * BLOCK] = -math.inf
    assert chosen() == [0, 2, 7]  # minus infinity before NaN, and the lowest of the equal
    k_idx[:, : 7 * BLOCK] = math.nan
    assert chosen() == [0, 1, 7]


def test_equal_scores_go_to_the_lower_blocks_wherever_their_token_is() -> None:
    op = msa()
    q_idx, _ = index_of(40, 0)
    k_idx = 0.01 * draw(1, 7 * BLOCK, 1, DIM)
    for block, place in enumerate((3, 0, 15, 8, 1, 2, 4)):
        k_idx[:, block * BLOCK + place] = q_idx[:, -1, :1]  # the last query's best token of each block is the same
    indices, _ = op.select_blocks(q_idx, k_idx)
    assert indices[0, -1, 0].tolist() == [0, 1, 6]


def test_products_are_exact_where_the_spec_rounds_its_products_to_tf32() -> None:
    op = operator_of_spec(msa().spec.replace(fp32_precision="tf32"))
    q_idx, k_idx = torch.ones(1, 1, 2, DIM), torch.zeros(1, 7 * BLOCK, 1, DIM)
    k_idx[..., 0] = 1.0
    k_idx[:, 3 * BLOCK + 1, :, 0] = 1.0 + 2.0**-20  # the same number in tf32
    k_idx[:, 5 * BLOCK + 9, :, 0] = 1.0 + 2.0**-19
    indices, _ = op.select_blocks(q_idx.to(DEVICE), k_idx.to(DEVICE))
    assert indices[0, 0].tolist() == [[3, 5, 6]] * 2


@pytest.mark.parametrize("lengths", [(23, 0, 1, 69, 0), (15, 85), (0, 0), (16, 48, 33)])
def test_sequences_alone_batched_and_packed_choose_the_same(lengths: tuple[int, ...]) -> None:
    op = msa(count=2)
    total, bounds = sum(lengths), [0, *itertools.accumulate(lengths)]
    q, k, v = draw(total, 6, 24), draw(total, 2, 24), draw(total, 2, 40)
    q_idx, k_idx = draw(total, 2, DIM), draw(total, 1, DIM)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    o, aux = op.nsa_attention(q, k, v, q_idx=q_idx, k_idx=k_idx, cu_seqlens=cu_seqlens, return_aux=True)
    step, counts = op.select_blocks(q_idx, k_idx, cu_seqlens=cu_seqlens)
    assert torch.equal(aux.indices, step) and torch.equal(aux.counts, counts)
    for start, stop in itertools.pairwise(bounds):
        mine = [x[None, start:stop] for x in (q, k, v, q_idx, k_idx)]
        alone, seen = op.nsa_attention(*mine[:3], q_idx=mine[3], k_idx=mine[4], return_aux=True)
        twice = op.select_blocks(*(x.expand(2, -1, -1, -1) for x in mine[3:]))[0]
        for found in (seen.indices[0], *twice):
            assert torch.equal(aux.indices[start:stop], found)
        torch.testing.assert_close(o[start:stop], alone[0], rtol=1e-5, atol=1e-5)


def test_the_main_attention_and_its_gradients_ignore_the_indexer() -> None:
    op = msa()
    inputs = inputs_of(op, 20, tokens_kv=90)
    whole = call_with_gradients(op, inputs)
    indices = naive_choice(inputs.q_idx[0], inputs.k_idx[0], COUNT)[None].int().to(DEVICE)
    given = operator_of("slc", gate="none", indices="input", **{n: PLAIN[n] for n in ("group", "kv_heads", "dims")})
    for name, x in zip(("q", "k", "v"), (inputs.q, inputs.k, inputs.v), strict=True):
        assert x.shape == getattr(inputs, name).shape
    o = given.nsa_attention(inputs.q, inputs.k, inputs.v, indices=indices)
    assert torch.equal(whole["o"], o) and torch.equal(whole["indices"], indices)


@pytest.mark.parametrize(
    "spec",
    [
        small_spec("slc win", index=32, count=2, initial=0, kv="per_branch", dims=(24, 16), group=3),
        small_spec("slc win", index=16, count=4, local=2, window=33, gate="given"),
        small_spec("cmp slc", index=64, count=3, gate="none", dims=(16, 80)),
        small_spec(index=16, count=3, kv="per_branch", phi="external", dtype="float16"),
        small_spec("slc", index=128, count=2, initial=0, dtype="float16", group=1, kv_heads=2, dims=(96, 16), block=32),
        small_spec("slc win", index=256, count=3, passes=("forward",), joint=True, sink_joint="learned"),
    ],
    ids=lambda spec: f"{' '.join(spec.branches)} {spec.kv} {spec.dtype} {spec.selection.index_dim}",
)
def test_with_other_branches_everything_is_the_oracles(spec: Spec) -> None:
    op = operator_of_spec(spec)
    gradients = "backward" in op.spec.passes
    assert_matches_oracle(op, 7, tokens_kv=5 * spec.selection.block + 6, gradients=gradients, seed=2)
    assert_matches_oracle(op, (15, 0, 5 * BLOCK + 2, 1), gradients=False, seed=3)


@pytest.mark.parametrize("kind", ["nan", "ties", "spread"])
def test_hard_inputs_are_the_oracles(kind: str) -> None:
    assert_matches_oracle(msa(), 9, tokens_kv=7 * BLOCK + 5, gradients=kind == "spread", kind=kind)


def test_strided_index_queries_and_keys_need_no_copy() -> None:
    op = msa()
    fused = draw(1, 90, 3 * DIM + 8)
    q_idx, k_idx = fused[..., : 2 * DIM].unflatten(-1, (2, DIM)), fused[..., None, 2 * DIM : 3 * DIM]
    found = op.select_blocks(q_idx, k_idx)[0]
    assert torch.equal(found, op.select_blocks(q_idx.contiguous(), k_idx.contiguous())[0])


def test_what_is_wrong_with_index_queries_and_keys_is_named() -> None:
    op = msa()
    q, k, v = draw(1, 20, 6, 24), draw(1, 20, 2, 24), draw(1, 20, 2, 40)
    q_idx, k_idx = index_of(20, 20)
    for wrong, error, message in (
        ({}, TypeError, "q_idx: expected a torch.Tensor, got None"),
        ({"q_idx": q_idx}, TypeError, "k_idx: expected a torch.Tensor, got None"),
        ({"q_idx": q_idx[:, :, :1], "k_idx": k_idx}, ValueError, r"q_idx: expected shape \(B=1, Tq=20, S=2, Di=16\)"),
        ({"q_idx": q_idx, "k_idx": k_idx[:, :19]}, ValueError, r"k_idx: expected shape \(B=1, Tkv=20, Hi=1, Di=16\)"),
        ({"q_idx": q_idx.half(), "k_idx": k_idx}, TypeError, "q_idx: expected dtype"),
    ):
        with pytest.raises(error, match=message):
            op.nsa_attention(q, k, v, **wrong)
    with pytest.raises(ValueError, match="k_idx: expected at least q's 20 tokens, got 19"):
        op.select_blocks(q_idx, k_idx[:, :19])
    indices = op.select_blocks(q_idx, k_idx)[0]
    with pytest.raises(TypeError, match=r"k_idx: expected a torch\.Tensor, got None"):
        op.nsa_attention(q, k, v, indices=indices, q_idx=q_idx)
    # A call like one that was right is checked all the same.
    op.nsa_attention(q, k, v, indices=indices)
    with pytest.raises(TypeError, match="q_idx"):
        op.nsa_attention(q, k, v)
    other = operator_of("slc", gate="none", indices="input")
    with pytest.raises(TypeError, match="q_idx"):
        call(other, inputs_of(other, 5), q_idx=q_idx)


def test_the_steps_make_the_whole_and_suit_compilers() -> None:
    op = msa(count=2)
    inputs = inputs_of(op, 4, tokens_kv=5 * BLOCK + 2)
    whole = call_with_gradients(op, inputs)
    indices, counts = op.select_blocks(inputs.q_idx.requires_grad_(), inputs.k_idx)
    o, lse = op.selected_attention(inputs.q, inputs.k, inputs.v, indices, counts)
    for name, x in {"indices": indices, "counts": counts, "o": o.detach(), "lse_slc": lse}.items():
        assert torch.equal(x, whole[name]), name
    assert not indices.requires_grad and not counts.requires_grad
    operator = op.registration.operator("select_blocks")
    packed = torch.tensor([0, 9, 40], dtype=torch.int32, device=DEVICE)
    for arguments in ((inputs.q_idx, inputs.k_idx, None), (*index_of(40, 40), packed)):
        found = torch.library.opcheck(operator, arguments)
        assert set(found.values()) == {"SUCCESS"} and len(found) >= 4


def test_an_empty_batch_and_no_token_are_empty() -> None:
    op = msa()
    for batch, tokens in ((0, 40), (2, 0)):
        q, k, v = draw(batch, tokens, 6, 24), draw(batch, tokens, 2, 24), draw(batch, tokens, 2, 40)
        q_idx, k_idx = index_of(tokens, tokens, batch=batch)
        assert op.select_blocks(q_idx, k_idx)[0].shape == (batch, tokens, 2, COUNT)
        assert op.nsa_attention(q, k, v, q_idx=q_idx, k_idx=k_idx).shape == (batch, tokens, 6, 40)


def test_memory_between_the_index_queries_and_the_choice_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    op = msa(group=1, kv_heads=1)
    q_idx, k_idx = index_of(100, 9 * BLOCK, 1)
    whole, _ = op.select_blocks(q_idx, k_idx)
    set_constants(monkeypatch, op, "selection", SCORE_BYTES=4 * 9 * 32, SCORE_TOKENS=32)
    assert torch.equal(op.select_blocks(q_idx, k_idx)[0], whole)
