"""Importance and the choice of blocks: Eq. 9's weights, float32 throughout, underflow, ties, NaN."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nsa_gen.verification import check_selection, reference_attention
from nsa_gen.verification.reference.dense import overlap_weights
from tests.support import DEVICE, Operator, assert_matches_oracle, call, inputs_of, operator_of, set_constants

RATIOS = [(16, 16, 16), (8, 4, 16), (32, 16, 64), (16, 8, 32), (4, 4, 16), (12, 4, 16), (1, 1, 16), (16, 2, 32)]


def select_with_probabilities(op: Operator, probabilities: Tensor, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """The choice of `rows` queries at the end of `tokens` keys where head g of row r gives compressed block i the
    probability probabilities[r, g, i]: its logarithm is a coordinate of K_cmp that this row alone looks at."""
    p = op.parameters
    blocks = probabilities.shape[-1]
    q = torch.zeros(1, rows, p.query_heads, p.head_dim_qk)
    k_cmp = torch.zeros(1, blocks, 1, p.head_dim_qk)
    for number, (row, head) in enumerate(itertools.product(range(rows), range(p.group))):
        q[0, row, head, number] = 1.0
        k_cmp[0, :, 0, number] = probabilities[row, head].clamp(min=1e-38).log()
    lse = torch.zeros(1, rows, p.query_heads)
    indices, counts = op.select_blocks(q.to(DEVICE), k_cmp.to(DEVICE), lse.to(DEVICE), tokens=tokens)
    return indices[0, :, 0].cpu(), counts[0, :, 0].cpu()


def enumerated_importance(
    probabilities: Sequence[float], block: int, stride: int, selection: int, t: int
) -> list[float]:
    """Eq. 9 for one row: every raw position of every visible compressed block adds p / d to the block it lies in."""
    importance = [0.0] * (t // selection + 1)
    for i, p in enumerate(probabilities):
        if i * stride + block - 1 > t:
            continue
        for position in range(i * stride, i * stride + block):
            importance[position // selection] += p / stride
    return importance


@pytest.mark.parametrize(("block", "stride", "selection"), RATIOS)
def test_overlap_weights_are_those_of_positions_counted_one_by_one(block: int, stride: int, selection: int) -> None:
    count, rows, group = 3, 8, 2
    op = operator_of(
        "cmp slc", gate="none", scale=1.0, compression=(block, stride), block=selection, count=count, initial=0,
        local=0, passes=("forward",),
    )  # fmt: skip
    tokens = 7 * selection + 5
    blocks = op.parameters.compressed_blocks(tokens)
    generator = torch.Generator().manual_seed(block + stride)
    # Most of the mass in few blocks, so that a weight off by one block changes the choice.
    probabilities = torch.rand(rows, group, blocks, generator=generator).pow(6)
    probabilities /= probabilities.sum(-1, keepdim=True)
    indices, counts = select_with_probabilities(op, probabilities, rows, tokens)
    decided = 0
    for row in range(rows):
        t = tokens - rows + row
        importance = enumerated_importance(probabilities[row].sum(0).tolist(), block, stride, selection, t)
        order = sorted(range(len(importance)), key=lambda j: (-importance[j], j))
        assert counts[row] == count
        if importance[order[count - 1]] - importance[order[count]] > 1e-4:
            decided += 1
            assert indices[row].tolist() == sorted(order[:count]), (importance, indices[row].tolist())
    assert decided >= rows // 2


def test_all_the_mass_on_one_compressed_block_selects_the_block_it_lies_in() -> None:
    op = operator_of("cmp slc", gate="none", scale=1.0, count=1, initial=0, local=0, passes=("forward",))
    rows, tokens = 8, 87  # l = 8, d = 4, l' = 16: compressed block 3 lies half in block 0, half in block 1
    blocks = op.parameters.compressed_blocks(tokens)
    for first in range(0, 16, rows):
        probabilities = torch.zeros(rows, 2, blocks)
        for row in range(rows):
            probabilities[row, :, first + row] = 1.0
        indices, _ = select_with_probabilities(op, probabilities, rows, tokens)
        assert indices[:, 0].tolist() == [(first + row) * 4 // 16 for row in range(rows)]


def test_visible_blocks_whose_probability_underflows_still_fill_the_slots() -> None:
    op = operator_of("cmp slc", gate="none", scale=1.0, count=4, initial=0, local=1, passes=("forward",))
    tokens, rows = 87, 3
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, rows, 2, 16)
    q[..., 0] = 1.0
    k = torch.randn(1, tokens, 1, 16, generator=generator)
    k[..., 0] = -200.0
    k[:, 48:64, :, 0] = 200.0  # block 3 takes it all; exp(-400) is 0 in float32
    v = torch.randn(1, tokens, 1, 16, generator=generator)
    _, aux = op.nsa_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), return_aux=True)
    importance = reference_attention(op.parameters, q, k, v).importance
    assert importance is not None and (importance[..., 3] > 1.9).all()
    assert (importance[..., [0, 1, 2, 4, 5]] == 0).all()  # visible, and 0 in float32
    # The own block 5, the hot block 3, and of the rest, which tie at 0, the lower two.
    assert (aux.counts == 4).all() and aux.indices.flatten(0, 2).tolist() == [[0, 1, 3, 5]] * rows


def test_a_float16_operator_ranks_by_float32_importance() -> None:
    op = operator_of(
        "cmp slc", gate="none", dtype="float16", phi="external", count=3, initial=0, local=0, passes=("forward",)
    )
    p, rows, tokens = op.parameters, 16, 167
    generator = torch.Generator().manual_seed(1)
    blocks = p.compressed_blocks(tokens)
    q = (torch.randn(1, rows, 2, 16, generator=generator) * 2e-3).half()  # nearly uniform attention
    k_cmp = torch.randn(1, blocks, 1, 16, generator=generator).half()
    v_cmp = torch.randn(1, blocks, 1, 16, generator=generator).half()
    logits = torch.einsum("rhd,id->rhi", q[0].double(), k_cmp[0, :, 0].double()) * p.scale
    last_key = torch.arange(blocks) * p.compression_stride + p.compression_block - 1
    visible = last_key <= torch.arange(tokens - rows, tokens)[:, None, None]
    probabilities = torch.softmax(logits.masked_fill(~visible, -math.inf), -1)
    importance = (probabilities.sum(1) @ overlap_weights(p, blocks, p.selection_blocks(tokens)))[None, :, None]
    _, lse = op.compressed_attention(q.to(DEVICE), k_cmp.to(DEVICE), v_cmp.to(DEVICE), tokens=tokens)
    indices, counts = op.select_blocks(q.to(DEVICE), k_cmp.to(DEVICE), lse, tokens=tokens)
    tolerance = 64 * 2.0**-24
    found = check_selection(p, indices, counts, importance, tolerance=tolerance, tokens=tokens)
    assert found.ok, found
    # The same choice from importance rounded to half precision is wrong by this measure: the test can fail.
    coarse = importance.half().double()
    order = torch.sort(coarse, dim=-1, descending=True, stable=True).indices[..., :3].sort(-1).values
    wrong = check_selection(p, order.to(torch.int32), counts, importance, tolerance=tolerance, tokens=tokens)
    assert not wrong.problems and wrong.shortfall > 10


def test_equal_importances_go_to_the_lower_block() -> None:
    op = operator_of("cmp slc", gate="none", scale=1.0, compression=(16, 16), count=3, initial=0, local=1,
                     passes=("forward",))  # fmt: skip
    probabilities = torch.full((8, 2, 6), 0.125)
    probabilities[4:, :, 4] = 0.25  # the rows after the first four prefer block 4
    indices, counts = select_with_probabilities(op, probabilities, 8, 104)
    assert (counts == 3).all()
    assert indices.tolist() == [[0, 1, 6]] * 4 + [[0, 4, 6]] * 4


def test_blocks_of_unknown_importance_rank_after_all_others() -> None:
    op = operator_of("cmp slc", gate="none", scale=1.0, compression=(16, 16), count=3, initial=0, local=0,
                     passes=("forward",))  # fmt: skip
    probabilities = torch.tensor([0.3, 0.2, math.nan, 0.0, 0.1, math.nan]).expand(8, 2, 6).clone()
    indices, _ = select_with_probabilities(op, probabilities, 8, 104)
    assert indices.tolist() == [[0, 1, 4]] * 8
    probabilities[..., [0, 1]] = math.nan  # four of seven unknown: 3, 4 and 6 (which no compressed block covers)
    indices, _ = select_with_probabilities(op, probabilities, 8, 104)
    assert indices.tolist() == [[3, 4, 6]] * 8
    probabilities[..., :] = math.nan  # only 6 is known, then the lower indices
    indices, _ = select_with_probabilities(op, probabilities, 8, 104)
    assert indices.tolist() == [[0, 1, 6]] * 8


def test_a_forced_block_that_is_both_initial_and_local_takes_one_slot() -> None:
    op = operator_of("cmp slc", gate="none", scale=1.0, compression=(16, 16), count=4, initial=2, local=2,
                     passes=("forward",))  # fmt: skip
    probabilities = torch.full((1, 2, 6), 0.125)
    for tokens, expected in ((16, [0, -1, -1, -1]), (32, [0, 1, -1, -1]), (48, [0, 1, 2, -1]), (96, [0, 1, 4, 5])):
        blocks = op.parameters.compressed_blocks(tokens)
        indices, counts = select_with_probabilities(op, probabilities[..., :blocks], 1, tokens)
        assert indices[0].tolist() == expected and counts[0] == sum(j >= 0 for j in expected)


def test_probabilities_are_normalised_a_head_before_they_are_summed_over_the_group() -> None:
    op = operator_of("cmp slc", gate="none", compression=(16, 16), count=1, initial=0, local=0, passes=("forward",))
    assert op.parameters.group == 2
    q = torch.zeros(1, 1, 2, 16)
    q[0, 0, 0, 0], q[0, 0, 1, 1] = 60.0, 8.0  # the first head has much larger logits, and is undecided
    k = torch.zeros(1, 48, 1, 16)
    k[0, :, 0, 0] = 1.0
    k[0, 16:32, 0, 1] = 1.0  # the second head wants block 1
    inputs = (q.to(DEVICE), k.to(DEVICE), torch.randn_like(k).to(DEVICE))
    _, aux = op.nsa_attention(*inputs, return_aux=True)
    assert aux.indices.flatten().tolist() == [1]


@pytest.mark.parametrize(("tokens", "tokens_kv"), [(130, None), ((37, 0, 66, 1), None), (40, 140)], ids=str)
def test_tokens_whose_scores_are_held_a_share_at_a_time_get_the_same_blocks(
    tokens: int | tuple[int, ...], tokens_kv: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = operator_of("cmp slc", gate="none", count=3, passes=("forward",))
    inputs = inputs_of(op, tokens, tokens_kv=tokens_kv)
    at_once = call(op, inputs, return_aux=True)[1]
    selection = importlib.import_module(f"{op.module.__name__}.kernels.selection")
    shares: list[int] = []
    tiles_at_once = selection.tiles_at_once

    def recorded(tiles: int, *rest: object) -> int:
        shares.append(tiles // tiles_at_once(tiles, *rest))
        return tiles_at_once(tiles, *rest)

    set_constants(monkeypatch, op, "selection", SCORE_BYTES=0, SCORE_TOKENS=1, tiles_at_once=recorded)
    in_shares = call(op, inputs, return_aux=True)[1]
    assert shares and shares[0] > 1
    assert torch.equal(in_shares.indices, at_once.indices) and torch.equal(in_shares.counts, at_once.counts)


@pytest.mark.parametrize("count", [70])
def test_lists_too_long_for_registers_are_chosen_rightly(count: int) -> None:
    op = operator_of("cmp slc", gate="none", compression=(16, 16), count=count, initial=1, local=1, passes=("forward",))
    assert_matches_oracle(op, 2, tokens_kv=16 * (count + 30) + 5, gradients=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of 0 * inf in rows past the last token
def test_an_infinite_key_that_every_head_of_an_odd_group_shuns_does_not_spoil_its_block() -> None:
    op = operator_of("cmp slc", gate="none", scale=1.0, group=3, count=1, initial=0, local=0, passes=("forward",))
    tokens, blocks = 104, 25
    q = torch.zeros(1, 1, 3, 16)
    q[..., 0], q[..., 1] = 1.0, -1.0
    k_cmp = torch.zeros(1, blocks, 1, 16)
    k_cmp[..., 0] = math.log(0.01)
    k_cmp[0, [4, 6], 0, 0] = math.log(0.4)  # in block 1, and so is the infinite one, of probability 0
    k_cmp[0, 5, 0, 1] = math.inf
    indices, _ = op.select_blocks(q.to(DEVICE), k_cmp.to(DEVICE), torch.zeros(1, 1, 3, device=DEVICE), tokens=tokens)
    assert indices.flatten().tolist() == [1]
