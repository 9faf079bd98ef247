"""The arithmetic of what several ranks are predicted to take, against counts of one token at a time."""

from __future__ import annotations

import dataclasses

import pytest

from nsa_gen import load_spec, lower
from nsa_gen.distributed.prediction import Fabric, predict_ranks, shares, table, visible_blocks
from nsa_gen.distributed.sharding import Shards

LLAMA = lower(load_spec("llama3_8b"))


def test_visible_blocks_are_those_that_end_at_or_before_each_query() -> None:
    for block, stride in ((8, 4), (5, 5), (32, 16), (1, 1)):
        for first, end in ((0, 0), (0, 41), (3, 40), (39, 77)):
            seen = [i for t in range(first, end) for i in range(t + 1) if i * stride + block - 1 <= t]
            assert visible_blocks(first, end, block, stride) == len(seen)


@pytest.mark.parametrize("order", ["head_tail", "contiguous"])
def test_shares_are_what_the_ranks_have_of_all_tokens_and_of_all_visible_blocks(order: str) -> None:
    shards = Shards(331, 3, order)  # type: ignore[arg-type]
    block, stride = LLAMA.spec.compression.block, LLAMA.spec.compression.stride  # type: ignore[union-attr]
    found = [shares(LLAMA, shards, rank) for rank in range(3)]
    seen = [max(0, (t + 1 - block) // stride + 1) for t in range(331)]
    for rank, (tokens, blocks) in enumerate(found):
        held = [t for chunk in shards.chunks_of(rank) for t in range(chunk.start, chunk.end)]
        assert tokens == pytest.approx(len(held) / 331)
        assert blocks == pytest.approx(sum(seen[t] for t in held) / sum(seen))
    assert [sum(each) for each in zip(*found, strict=True)] == pytest.approx([1, 1])


def test_one_rank_takes_the_time_of_one_gpu_and_sends_nothing() -> None:
    found = predict_ranks(LLAMA, tokens=8192, ranks=1)
    assert found.seconds == pytest.approx(found.alone) and found.speedup == pytest.approx(1)
    assert (found.gathered, found.summed, found.exposed) == (0, 0, 0)


def test_bytes_are_those_of_the_other_ranks_keys_values_and_blocks() -> None:
    tokens, ranks = 65_536, 4
    found = predict_ranks(LLAMA, tokens=tokens, ranks=ranks)
    spec = LLAMA.spec
    row = 2 * spec.heads.kv * (spec.head_dim.qk + spec.head_dim.v)  # bytes of a key and a value of bfloat16
    shards = Shards(tokens, ranks)
    (runs,) = shards.block_segments(spec.compression.block, spec.compression.stride)  # type: ignore[union-attr]
    most = max(sum(each.count for each in runs if each.rank == rank) for rank in range(ranks))
    assert found.gathered == (ranks - 1) * row * (tokens // ranks + most)
    assert found.summed == found.gathered
    assert predict_ranks(LLAMA, tokens=tokens, ranks=ranks, reduction="reduce_scatter").summed == 2 * found.gathered
    assert predict_ranks(LLAMA, tokens=tokens, ranks=ranks, batch=3).gathered == 3 * found.gathered


def test_what_travels_takes_the_slower_of_the_links_within_and_between_nodes() -> None:
    fabric = Fabric(ranks_per_node=2, link=100.0, network=1.0, latency=(0.0, 0.0))
    found = predict_ranks(LLAMA, tokens=4096, ranks=4, fabric=fabric)
    outside = found.gathered * 2 / 3  # of the three others, two are in the other node
    assert found.gathering == pytest.approx(outside / 2)  # a node's two ranks share what they gather
    assert found.summing == pytest.approx(outside)  # and get their own parts of an exchange
    within = predict_ranks(LLAMA, tokens=4096, ranks=2, fabric=fabric)
    assert within.gathering == pytest.approx(within.gathered / 100) == within.summing
    late = predict_ranks(LLAMA, tokens=4096, ranks=2, fabric=dataclasses.replace(fabric, latency=(0.5, 0.25)))
    assert late.gathering - within.gathering == pytest.approx(4 * (0.5 + 2 * 0.25))  # k, v and both compressed


def test_head_tail_balances_what_contiguous_leaves_to_the_last_rank() -> None:
    by_order = {
        order: predict_ranks(LLAMA, tokens=262_144, ranks=8, order=order)  # type: ignore[arg-type]
        for order in ("head_tail", "contiguous")
    }
    balanced, unbalanced = by_order["head_tail"], by_order["contiguous"]
    assert balanced.forward + balanced.backward == pytest.approx(balanced.alone / 8, rel=1e-3)
    assert unbalanced.forward > 1.3 * balanced.forward
    assert balanced.gathered == unbalanced.gathered


def test_groups_of_heads_hide_all_gathers_but_the_first_if_the_forward_is_longer() -> None:
    whole, groups = (predict_ranks(LLAMA, tokens=262_144, ranks=4, head_groups=count) for count in (1, 4))
    assert whole.exposed == pytest.approx(whole.gathering + whole.summing)
    assert groups.exposed == pytest.approx(groups.gathering / 4 + groups.summing)
    slow = Fabric(link=1e6, network=1e6)
    found = predict_ranks(LLAMA, tokens=262_144, ranks=4, head_groups=4, fabric=slow)
    assert found.exposed == pytest.approx(found.gathering - 0.75 * found.forward + found.summing)


def test_a_line_of_the_table_has_the_numbers_of_its_call() -> None:
    found = predict_ranks(LLAMA, tokens=65_536, ranks=2)
    line = table(LLAMA, [(65_536, 2)]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["65536", "2"] and cells[4] == f"{found.gathered / 1e6:.0f}"
    assert cells[7] == f"{1e3 * found.seconds:.1f}" and cells[9] == f"{50 * found.speedup:.0f}%"


def test_no_tokens_and_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens: expected at least 1, got 0"):
        predict_ranks(LLAMA, tokens=0, ranks=2)
    with pytest.raises(ValueError, match="ranks: expected at least 1, got 0"):
        predict_ranks(LLAMA, tokens=64, ranks=0)
