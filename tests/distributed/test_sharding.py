"""Which rank holds which tokens and makes which call, against definitions that look at one token at a time."""

from __future__ import annotations

import itertools
import random

import pytest

from nsa_gen.distributed.sharding import Shards, blocks_in, gathered_rows


def drawn(seed: int) -> Shards:
    """Any number of tokens and ranks, packed or not; sequences may be empty, and the last tokens padding."""
    draw = random.Random(seed)
    tokens, ranks = draw.randrange(0, 60), draw.randrange(1, 7)
    bounds = None
    if draw.random() < 0.6:
        inner = sorted(draw.randrange(0, tokens + 1) for _ in range(draw.randrange(1, 6)))
        bounds = (0, *inner)
    return Shards(tokens, ranks, draw.choice(("head_tail", "contiguous")), bounds)


def tokens_of(shards: Shards, rank: int) -> list[int]:
    return [token for chunk in shards.chunks_of(rank) for token in range(chunk.start, chunk.end)]


def sequence_of(shards: Shards, token: int) -> tuple[int, int] | None:
    """First and end token of the sequence of a token, None for padding."""
    bounds = (0, shards.tokens) if shards.bounds is None else shards.bounds
    return next(((first, end) for first, end in itertools.pairwise(bounds) if first <= token < end), None)


@pytest.mark.parametrize("seed", range(40))
def test_every_token_is_held_by_one_rank_in_order(seed: int) -> None:
    shards = drawn(seed)
    held = [tokens_of(shards, rank) for rank in range(shards.ranks)]
    assert sorted(token for each in held for token in each) == list(range(shards.tokens))
    for rank, each in enumerate(held):
        assert each == sorted(each) and len(each) == shards.rows(rank)
        wanted = []
        for token in each:
            sequence = sequence_of(shards, token)
            wanted.append(token - (sequence[0] if sequence else (shards.bounds or (0,))[-1]))
        assert shards.positions(rank) == wanted


def test_head_tail_gives_each_rank_as_many_visible_keys_and_contiguous_does_not() -> None:
    tokens, ranks = 96, 4
    seen = {
        order: [sum(token + 1 for token in tokens_of(Shards(tokens, ranks, order), rank)) for rank in range(ranks)]
        for order in ("head_tail", "contiguous")
    }
    assert len(set(seen["head_tail"])) == 1
    assert max(seen["contiguous"]) == 1176 + 3 * 576 - 876 == 2028  # sum of 73 .. 96, and 876 of 1 .. 24 at the least
    assert min(seen["contiguous"]) == 300


@pytest.mark.parametrize("seed", range(120))
def test_pieces_cover_a_ranks_rows_and_see_what_precedes_them_in_their_sequence(seed: int) -> None:
    shards = drawn(seed)
    for rank in range(shards.ranks):
        held = tokens_of(shards, rank)
        row = 0
        for piece in shards.pieces(rank):
            assert piece.begin == row < piece.end
            row = piece.end
            queries = held[piece.begin : piece.end]
            if piece.span is not None:
                first, _ = shards.spans[piece.span]
                assert queries == list(range(first + piece.keys - len(queries), first + piece.keys))
                assert all(sequence_of(shards, token) == shards.spans[piece.span] for token in queries)
                continue
            assert queries == list(range(queries[0], queries[-1] + 1))
            bounds = (0, len(queries)) if piece.bounds is None else piece.bounds
            for place, token in enumerate(queries):
                sequence = sequence_of(shards, token)
                within = [(a, b) for a, b in itertools.pairwise(bounds) if a <= place < b]
                if sequence is None:
                    assert not within
                else:
                    assert [(sequence[0] - queries[0], sequence[1] - queries[0])] == within
        assert row == len(held)


@pytest.mark.parametrize("seed", range(120))
def test_segments_and_blocks_of_a_span_are_each_ranks_once_and_in_order(seed: int) -> None:
    shards = drawn(seed)
    block, stride = ((8, 4), (4, 4), (6, 2), (1, 1))[seed % 4]
    offsets = [0] * shards.ranks
    blocks = shards.block_segments(block, stride)
    for (first, end), segments, runs in zip(shards.spans, shards.segments, blocks, strict=True):
        assert [each.first for each in segments] == [0, *(each.first + each.count for each in segments[:-1])]
        assert sum(each.count for each in segments) == end - first
        for each in segments:
            wanted = list(range(first + each.first, first + each.first + each.count))
            assert tokens_of(shards, each.rank)[each.offset : each.offset + each.count] == wanted
        assert [i for each in runs for i in range(each.first, each.first + each.count)] == list(
            range(blocks_in(end - first, block, stride))
        )
        for each in runs:
            assert each.offset == offsets[each.rank] and each.count > 0
            offsets[each.rank] += each.count
            for number in range(each.first, each.first + each.count):
                assert first + number * stride in tokens_of(shards, each.rank)
    assert gathered_rows(blocks, shards.ranks) == max(offsets)


def test_blocks_in_counts_complete_blocks() -> None:
    for tokens in range(40):
        for block, stride in ((8, 4), (5, 5), (32, 16)):
            whole = [i for i in range(tokens) if i % stride == 0 and i + block <= tokens]
            assert blocks_in(tokens, block, stride) == len(whole)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": -1, "ranks": 2}, ValueError, "tokens: expected at least 0, got -1"),
        ({"tokens": 4.0, "ranks": 2}, TypeError, "tokens: expected an int, got float 4.0"),
        ({"tokens": 4, "ranks": 0}, ValueError, "ranks: expected at least 1, got 0"),
        ({"tokens": 4, "ranks": True}, TypeError, "ranks: expected an int, got bool True"),
        ({"tokens": 4, "ranks": 2, "order": "zigzag"}, ValueError, "order: expected head_tail or contiguous"),
        ({"tokens": 4, "ranks": 2, "bounds": [0, 4]}, TypeError, "bounds: expected a tuple of ints, got list"),
        ({"tokens": 4, "ranks": 2, "bounds": (0,)}, ValueError, "bounds: expected two or more"),
        ({"tokens": 4, "ranks": 2, "bounds": (0, 5)}, ValueError, "at most tokens=4"),
        ({"tokens": 4, "ranks": 2, "bounds": (0, 3, 2)}, ValueError, "rising from 0"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused_by_name(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Shards(**arguments)
