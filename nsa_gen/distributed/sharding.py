"""Which rank holds which tokens, and which keys it needs for which queries. Only integers, no tensors.

Words used here: a *chunk* is a run of tokens that one rank holds. A *span* is a sequence that lies in chunks of several
ranks. A *piece* is one call of the operator. A *segment* is the rows of a span that one chunk holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Order = Literal["head_tail", "contiguous"]


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of the batch, rows [offset, offset + end - start) of the shard of `rank`."""

    rank: int
    start: int
    end: int
    offset: int


@dataclass(frozen=True)
class Segment:
    """Rows [first, first + count) of a span, which are rows [offset, offset + count) of those of `rank`."""

    rank: int
    first: int
    count: int
    offset: int


@dataclass(frozen=True)
class Piece:
    """One call of the operator: queries are rows [begin, end) of the shard.

    With `span`, the keys are the first `keys` of that span, and the queries are the last of these. Without `span`, the
    keys are the rows' own. `bounds` separates their sequences like cu_seqlens; with None, each batch entry is one
    sequence. `sequence` is the number of the first one in a packed batch. `share` is the piece's part of the queries of
    each.
    """

    begin: int
    end: int
    span: int | None = None
    keys: int = 0
    bounds: tuple[int, ...] | None = None
    sequence: int = 0
    share: float = 1.0


@dataclass(frozen=True)
class Shards:
    """How a batch's tokens are assigned to ranks.

    `head_tail` cuts the tokens into 2 * ranks chunks and gives rank r the chunks r and 2 * ranks - 1 - r, so that all
    ranks see equally many keys in causal attention. `contiguous` gives each rank one chunk. Chunks differ by at most
    one token, and any number of tokens is possible.

    Attributes:
        tokens: tokens of a sequence (B, T, H, D), or T_total of packed ones (T_total, H, D).
        ranks: number of ranks.
        order: see above.
        bounds: bounds of packed sequences, like cu_seqlens: N + 1 numbers that rise from 0 to at most `tokens`.
        chunks: in the order of tokens; neighbours of one rank are one chunk, and none is empty.
        spans: first and end token of each sequence that lies in several chunks.
        segments: for each span, the tokens that the chunks hold; offsets refer to the ranks' shards.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what was given.
    """

    tokens: int
    ranks: int
    order: Order = "head_tail"
    bounds: tuple[int, ...] | None = None
    chunks: tuple[Chunk, ...] = field(init=False, repr=False, compare=False)
    spans: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    segments: tuple[tuple[Segment, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("tokens", 0), ("ranks", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.order not in get_args(Order):
            raise ValueError(f"order: expected {' or '.join(get_args(Order))}, got {self.order!r}")
        if self.bounds is not None:
            self._check_bounds(self.bounds)
        # Computed now, because torch.compile does not follow a cached property.
        object.__setattr__(self, "chunks", self._chunks())
        object.__setattr__(self, "spans", self._spans())
        object.__setattr__(self, "segments", tuple(self._segments(start, end) for start, end in self.spans))

    def _check_bounds(self, bounds: object) -> None:
        if not isinstance(bounds, tuple) or any(isinstance(x, bool) or not isinstance(x, int) for x in bounds):
            raise TypeError(f"bounds: expected a tuple of ints, got {type(bounds).__name__} {bounds!r:.80}")
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] > self.tokens or list(bounds) != sorted(bounds):
            raise ValueError(
                f"bounds: expected two or more, rising from 0 to at most tokens={self.tokens}, got {bounds!r:.80}"
            )

    def _chunks(self) -> tuple[Chunk, ...]:
        count = self.ranks if self.order == "contiguous" else 2 * self.ranks
        rows, found = [0] * self.ranks, []
        for number in range(count):
            start, end = (each * self.tokens // count for each in (number, number + 1))
            rank = min(number, 2 * self.ranks - 1 - number)
            if found and found[-1].rank == rank:
                last = found.pop()
                start, offset = last.start, last.offset
            else:
                offset = rows[rank]
            rows[rank] = offset + end - start
            found.append(Chunk(rank, start, end, offset))
        return tuple(chunk for chunk in found if chunk.end > chunk.start)

    def chunks_of(self, rank: int) -> tuple[Chunk, ...]:
        """The chunks of a rank, in the order of tokens, which is also the order of its shard's rows."""
        return tuple(chunk for chunk in self.chunks if chunk.rank == rank)

    def rows(self, rank: int) -> int:
        """The number of tokens that a rank holds."""
        return sum(chunk.end - chunk.start for chunk in self.chunks_of(rank))

    def _spans(self) -> tuple[tuple[int, int], ...]:
        bounds = (0, self.tokens) if self.bounds is None else self.bounds
        return tuple(
            (start, end)
            for start, end in itertools.pairwise(bounds)
            if start < end and not any(chunk.start <= start and end <= chunk.end for chunk in self.chunks)
        )

    def _segments(self, start: int, end: int) -> tuple[Segment, ...]:
        found = []
        for chunk in self.chunks:
            first, last = max(start, chunk.start), min(end, chunk.end)
            if first < last:
                offset = chunk.offset + first - chunk.start
                found.append(Segment(chunk.rank, first - start, last - first, offset))
        return tuple(found)

    def positions(self, rank: int) -> list[int]:
        """The position in its sequence of each token of a rank. After the last sequence, they count from its end."""
        bounds = (0,) if self.bounds is None else self.bounds
        found, number = [], 0
        for chunk in self.chunks_of(rank):
            for token in range(chunk.start, chunk.end):
                while number + 1 < len(bounds) and bounds[number + 1] <= token:
                    number += 1
                found.append(token - bounds[number])
        return found

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The calls of a rank, in the order of its rows. Each row is a query of exactly one of them."""
        return tuple(piece for chunk in self.chunks_of(rank) for piece in self._pieces(chunk))

    def _pieces(self, chunk: Chunk) -> Iterator[Piece]:
        """A chunk's pieces: of the span in which it begins, of the sequences within, of the span in which it ends."""

        def local(token: int) -> int:
            return chunk.offset + token - chunk.start

        done = chunk.start
        for number, (start, end) in enumerate(self.spans):
            first, last = max(start, chunk.start), min(end, chunk.end)
            if first >= last:
                continue
            if done < first:
                yield Piece(local(done), local(first), None, 0, *self._sequences_within(done, first))
            share = (last - first) / (end - start)
            sequence = sum(bound <= start for bound in self.bounds or (0,)) - 1
            yield Piece(local(first), local(last), number, last - start, None, sequence, share)
            done = last
        if done < chunk.end:
            yield Piece(local(done), local(chunk.end), None, 0, *self._sequences_within(done, chunk.end))

    def _sequences_within(self, first: int, end: int) -> tuple[tuple[int, ...] | None, int]:
        """cu_seqlens of the sequences that lie in tokens [first, end), and the number of the first.

        Tokens after the last sequence are padding. If all are, they follow one empty sequence.
        """
        if self.bounds is None:
            return None, 0
        inside = [bound - first for bound in self.bounds if first <= bound <= end]
        number = min(sum(bound < first for bound in self.bounds), len(self.bounds) - 2)
        return tuple(inside) if len(inside) > 1 else (0, 0), number

    def block_segments(self, block: int, stride: int) -> tuple[tuple[Segment, ...], ...]:
        """For each span, the compressed blocks whose first token a chunk holds; offsets count the rank's own blocks.

        Block i covers tokens [i * stride, i * stride + block) of the span, and extends into the next chunks if it
        crosses their bounds. Only complete blocks exist.
        """
        rows = [0] * self.ranks
        found = []
        for (start, end), segments in zip(self.spans, self.segments, strict=True):
            complete = blocks_in(end - start, block, stride)
            some = []
            for each in segments:
                first = min(complete, -(-each.first // stride))
                count = min(complete, -(-(each.first + each.count) // stride)) - first
                some.append(Segment(each.rank, first, count, rows[each.rank]))
                rows[each.rank] += count
            found.append(tuple(each for each in some if each.count))
        return tuple(found)


def blocks_in(tokens: int, block: int, stride: int) -> int:
    """The number of complete blocks of a sequence: max(0, (tokens - block) // stride + 1)."""
    return max(0, (tokens - block) // stride + 1)


def gathered_rows(segments: Sequence[Sequence[Segment]], ranks: int) -> int:
    """The largest number of rows of `segments` that a rank has. In a gather, each rank sends this many."""
    rows = [0] * ranks
    for each in (segment for span in segments for segment in span):
        rows[each.rank] += each.count
    return max(rows)
