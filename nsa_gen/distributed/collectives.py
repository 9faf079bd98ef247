"""Gather the rows of sequences that several ranks hold, and return their gradients, as one autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nsa_gen.distributed.sharding import Segment, gathered_rows

Reduction = Literal["exchange", "reduce_scatter"]
_ops = torch.ops._c10d_functional


class Like(NamedTuple):
    """What is kept of a tensor to make its gradient."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Part:
    """Rows [first, end) of a span."""

    span: int
    first: int
    end: int


@dataclass(frozen=True)
class Route:
    """How rows of one kind, tokens or compressed blocks, travel between the ranks of a group.

    Attributes:
        rank, ranks: this rank, and the number of ranks.
        group: name of the process group.
        reduction: how gradients are summed; see `ContextParallel`.
        rows: rows that each rank sends: as many as the rank with the most has; others pad.
        own: this rank's segments, in the order in which it sends them.
        places: for each span, its segments in order, with the row of the gathered buffer at which each begins.
    """

    rank: int
    ranks: int
    group: str
    reduction: Reduction
    rows: int
    own: tuple[Segment, ...]
    places: tuple[tuple[tuple[Segment, int], ...], ...]

    @staticmethod
    def of(segments: Sequence[Sequence[Segment]], rank: int, ranks: int, group: str, reduction: Reduction) -> Route:
        """The route of the segments of each span: which rows each rank has, in order and without gaps."""
        rows = gathered_rows(segments, ranks)
        sent = [0] * ranks
        places = []
        for span in segments:
            some = []
            for each in span:
                some.append((each, each.rank * rows + sent[each.rank]))
                sent[each.rank] += each.count
            places.append(tuple(some))
        own = tuple(each for span in segments for each in span if each.rank == rank)
        return Route(rank, ranks, group, reduction, rows, own, tuple(places))

    def pack(self, x: Tensor) -> Tensor:
        """The rows (`rows`, B, ...) of x (B, rows, ...) that this rank sends."""
        parts = [x[:, each.offset : each.offset + each.count].transpose(0, 1) for each in self.own]
        padding = self.rows - sum(part.shape[0] for part in parts)
        if padding or not parts:
            parts.append(x.new_zeros(padding, x.shape[0], *x.shape[2:]))
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def unpack(self, rows: Tensor, local_rows: int) -> Tensor:
        """The gradient (B, local_rows, ...) of x from that (`rows`, B, ...) of `pack`'s result; 0 for rows not sent."""
        whole = rows.new_zeros(local_rows, *rows.shape[1:])
        at = 0
        for each in self.own:
            whole[each.offset : each.offset + each.count] = rows[at : at + each.count]
            at += each.count
        return whole.transpose(0, 1)

    def spans(self, gathered: Tensor, ends: Sequence[int]) -> list[Tensor]:
        """The first `ends` rows of each span (B, end, ...), from the gathered buffer (ranks * `rows`, B, ...).

        They are views if the rows are in order.
        """
        found = []
        for placed, end in zip(self.places, ends, strict=True):
            runs: list[list[int]] = []
            for each, at in placed:
                count = min(each.count, end - each.first)
                if count <= 0:
                    continue
                if runs and runs[-1][1] == at:
                    runs[-1][1] = at + count
                else:
                    runs.append([at, at + count])
            parts = [gathered[first:last] for first, last in runs] or [gathered[:0]]
            found.append((parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1))
        return found

    def scatter(self, gradients: Sequence[tuple[Part, Tensor]], into: Tensor) -> None:
        """Add gradients (B, end - first, ...) of parts to `into`, the gradient of the gathered buffer."""
        for part, gradient in gradients:
            for each, at in self.places[part.span]:
                first, last = max(each.first, part.first), min(each.first + each.count, part.end)
                if first < last:
                    rows = gradient[:, first - part.first : last - part.first].transpose(0, 1)
                    into[at + first - each.first : at + last - each.first] += rows

    def reduce(self, gradients: Sequence[tuple[Part, Tensor]], like: Like) -> Tensor:
        """The gradient of `like`, this rank's rows (B, rows, ...), summed over all ranks' gathered copies of them."""
        exchanges = self.reduction == "exchange"
        batch, local_rows, *row = like.shape
        if not self.rows:
            return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        dtype = like.dtype if exchanges else torch.float32
        sent = torch.zeros((self.ranks * self.rows, batch, *row), dtype=dtype, device=like.device)
        self.scatter(gradients, sent)
        if exchanges:
            splits = [self.rows] * self.ranks
            received = _ops.wait_tensor(_ops.all_to_all_single(sent, splits, splits, self.group))
            rows = received.unflatten(0, (self.ranks, self.rows)).sum(0, dtype=torch.float32)
        else:
            rows = _ops.wait_tensor(_ops.reduce_scatter_tensor(sent, "sum", self.ranks, self.group))
        return self.unpack(rows.to(like.dtype), local_rows)


def start(route: Route, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Start to gather each of the tensors (B, rows, ...). Returns the buffers that `Gather` waits for."""
    packed = [route.pack(x.detach()) for x in tensors]
    if not route.rows:  # no rank has any: nothing travels
        return packed
    return [_ops.all_gather_into_tensor(x, route.ranks, route.group) for x in packed]


class Gather(torch.autograd.Function):
    """Parts of spans, each (B, end - first, ...), of tensors whose rows are spread over the ranks.

    The last output is empty. Its gradient makes the backward, a collective, run on every rank.
    """

    @staticmethod
    def forward(
        ctx: Any, route: Route, parts: tuple[tuple[Part, ...], ...], started: list[Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Parts of each tensor in turn, from the buffers that `start` returned.

        Args:
            ctx: autograd's context.
            route: how rows travel.
            parts: the wanted parts of each tensor.
            started: what `start` returned.
            tensors: this rank's rows of each.
        """
        ctx.route, ctx.parts = route, parts
        ctx.like = [Like(x.shape, x.dtype, x.device) for x in tensors]
        ctx.set_materialize_grads(False)
        found: list[Tensor] = []
        for wanted, buffer in zip(parts, started, strict=True):
            gathered = _ops.wait_tensor(buffer) if route.rows else buffer
            ends = [max([0, *(x.end for x in wanted if x.span == span)]) for span in range(len(route.places))]
            spans = route.spans(gathered, ends)
            found += [spans[x.span][:, x.first : x.end] for x in wanted]
        return (*found, tensors[0].new_empty(0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Sums over the ranks, for the rows that this rank holds."""
        at, found = 0, []
        for wanted, like in zip(ctx.parts, ctx.like, strict=True):
            given = zip(wanted, gradients[at : at + len(wanted)], strict=True)
            found.append(ctx.route.reduce([(part, x) for part, x in given if x is not None], like))
            at += len(wanted)
        return (None, None, None, *found)


class Anchor(torch.autograd.Function):
    """Returns x. Its gradient also reaches the empty tensors, so that their backward runs on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *empty: Tensor) -> Tensor:
        """The tensor x."""
        ctx.save_for_backward(*empty)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The gradient unchanged, and empty ones."""
        return (gradients[0], *(torch.empty_like(each) for each in ctx.saved_tensors))
