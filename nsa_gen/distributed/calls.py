"""One call of context parallelism: the packages that it runs, what it gathers, and its pieces."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_gen.distributed.collectives import Anchor, Gather, Part, Reduction, Route, start
from nsa_gen.distributed.sharding import Piece, Shards, blocks_in
from nsa_gen.loading import load
from nsa_gen.lowering import Plan, lower
from nsa_gen.spec import Spec
from nsa_gen.spec.fields import MAX_NAME

ROWS = ("q", "gates", "indices", "counts", "q_idx")
"""Arguments that belong to queries. A rank has those of its own queries."""
INDEX_KEYS = "k_idx"
"""The argument that belongs to keys and has one head for all. It may be missing if the blocks are given."""
LOSS = "alignment_loss"
"""The auxiliary output that belongs to sequences and not to queries."""


class Names(NamedTuple):
    """Names of arguments. Made once: torch.compile would follow how a plan finds them.

    Attributes:
        known: all that a call may have.
        sinks: those that have no tokens.
        required: those that every call must have.
        gathered: those that belong to keys.
        compressed: of these, the ones that are compressed and gathered again; empty if compressed blocks do not travel.
        sources: for a piece with a span, each of its arguments that belong to keys, and the gathered one it is part of.
    """

    known: frozenset[str]
    sinks: tuple[str, ...]
    required: tuple[str, ...]
    gathered: tuple[str, ...]
    compressed: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]

    @staticmethod
    def of(plan: Plan, given: Plan | None) -> Names:
        """The names of a spec's plan, and of its plan with given blocks where compressed blocks travel."""
        known = frozenset((*(argument.name for argument in plan.arguments), "gates", "k", "v"))
        index_keys = (INDEX_KEYS,) if plan.index_dim else ()
        sources = {name: name for name in (*(plan.raw_names if given is None else ()), *index_keys)}
        for branch in () if given is None else given.raw_branches:
            sources |= zip(given.kv(branch), plan.kv(branch), strict=True)
        compressed = () if given is None else plan.kv("cmp")
        gathered = (*plan.raw_names, *index_keys)
        return Names(known, plan.sinks, ("q", *plan.raw_names), gathered, compressed, tuple(sources.items()))


@dataclass(frozen=True)
class Operators:
    """The packages that a spec's pieces run.

    `whole` is the spec's own package, `given` is the same operator with compressed keys and values as arguments; it is
    None if they are computed within. `auxiliary` is a named tuple of the outputs besides o that belong to queries.
    """

    plan: Plan
    names: Names
    whole: ModuleType
    given_plan: Plan | None
    given: ModuleType | None
    auxiliary: Any

    @property
    def travelling(self) -> tuple[int, int] | None:
        """Block and stride, if compressed blocks travel between ranks."""
        compression = self.plan.spec.compression
        return None if self.given is None or compression is None else (compression.block, compression.stride)


def operators_of(spec: Spec, head_groups: int, ranks: int, package: ModuleType | None) -> Operators:
    """The packages of a spec for a group of its heads; `package` is the spec's own, if the caller has one."""
    some = spec
    if head_groups > 1:
        heads = {"query": spec.heads.query // head_groups, "kv": spec.heads.kv // head_groups}
        some = spec.replace(name=_named(spec, f"heads_{heads['query']}"), heads=heads)
    plan = lower(some)
    # Compressed keys that only select blocks do not travel: they have no gradient, and each rank computes its own.
    given = _with_given_blocks(some) if plan.compresses and plan.compressed_output and ranks > 1 else None
    given_plan = None if given is None else lower(given)
    if given_plan is not None and not given_plan.raw_names:  # the number of keys would be unknown
        given = given_plan = None
    whole = load(some) if package is None or head_groups > 1 else package
    of_queries = [name for name in whole.Auxiliary._fields if name not in ("k_cmp", "v_cmp")]
    auxiliary = namedtuple("Auxiliary", of_queries, defaults=(None,) if of_queries[-1:] == [LOSS] else ())
    return Operators(
        plan, Names.of(plan, given_plan), whole, given_plan, None if given is None else load(given), auxiliary
    )


def _with_given_blocks(spec: Spec) -> Spec:
    """The spec whose compressed keys and values are arguments."""
    assert spec.compression is not None
    compression = {"block": spec.compression.block, "stride": spec.compression.stride, "phi": "external"}
    passes = tuple(each for each in spec.passes if each != "decode")
    return spec.replace(name=_named(spec, "given_blocks"), compression=compression, passes=passes)


def _named(spec: Spec, ending: str) -> str:
    """A name for a spec derived from another, whose own name may already have the maximum length."""
    return f"{spec.name[: MAX_NAME - len(ending) - 1]}_{ending}"


class Started(NamedTuple):
    """Gathers in flight: the names of the tensors, the wanted parts of each, and the buffers."""

    names: list[str]
    parts: tuple[tuple[Part, ...], ...]
    buffers: list[Tensor]


@dataclass(frozen=True)
class Routes:
    """What a rank computes of a batch, and what it needs from other ranks for it.

    Attributes:
        pieces: its calls.
        tokens: the route of tokens.
        blocks: the route of compressed blocks; None if they do not travel.
        whole: for each piece that has a span, its keys.
        whole_blocks: for each such piece, the compressed blocks among its keys.
        tokens_of_blocks: the tokens of each run of blocks that this rank compresses.
        sequences: the number of packed sequences; None for a batch.
    """

    pieces: tuple[Piece, ...]
    tokens: Route
    blocks: Route | None
    whole: tuple[Part, ...]
    whole_blocks: tuple[Part, ...]
    tokens_of_blocks: tuple[Part, ...]
    sequences: int | None


@functools.lru_cache(maxsize=64)
def routes_of(
    shards: Shards, rank: int, group: str, reduction: Reduction, compression: tuple[int, int] | None
) -> Routes:
    """The routes of a rank; `compression` is block and stride if compressed blocks travel."""
    pieces = shards.pieces(rank)
    sequences = None if shards.bounds is None else len(shards.bounds) - 1
    where = rank, shards.ranks, group, reduction
    tokens = Route.of(shards.segments, *where)
    whole = tuple(Part(piece.span, 0, piece.keys) for piece in pieces if piece.span is not None)
    if compression is None:
        return Routes(pieces, tokens, None, whole, (), (), sequences)
    block, stride = compression
    segments = shards.block_segments(block, stride)
    return Routes(
        pieces,
        tokens,
        Route.of(segments, *where),
        whole,
        tuple(Part(each.span, 0, blocks_in(each.end, block, stride)) for each in whole),
        tuple(
            Part(span, each.first * stride, (each.first + each.count - 1) * stride + block)
            for span, some in enumerate(segments)
            for each in some
            if each.rank == rank
        ),
        sequences,
    )


class Call:
    """One call of `ContextParallel.attention`: its gathers and its pieces."""

    def __init__(
        self,
        operators: Operators,
        routes: Routes,
        return_aux: bool,
        recompute: tuple[str, ...],
        bounds: Mapping[tuple[int, ...], Tensor],
    ) -> None:
        self._operators, self._routes = operators, routes
        self._return_aux, self._bounds = return_aux, bounds
        self._recompute = {"recompute": recompute} if recompute else {}

    def start(self, tensors: Mapping[str, Tensor]) -> Started:
        """Start to gather raw keys and values."""
        known, whole, blocks = self._operators.names, self._routes.whole, self._routes.tokens_of_blocks
        names = [name for name in known.gathered if name in tensors]
        read = [source for _, source in known.sources]
        parts = tuple(
            (*(whole if name in read else ()), *(blocks if name in known.compressed else ()), Part(0, 0, 0))
            for name in names
        )
        return Started(names, parts, start(self._routes.tokens, [tensors[name] for name in names]))

    def run(
        self, tensors: Mapping[str, Tensor], parameters: tuple[Tensor, ...] | None, started: Started | None
    ) -> list[Tensor]:
        """o of this rank's queries (B, rows, H, ...) and, with return_aux, the other outputs."""
        anchors: list[Tensor] = []
        gathered: dict[str, list[Tensor]] = {}
        if started is not None:
            own = [tensors[name] for name in started.names]
            *parts, anchor = Gather.apply(self._routes.tokens, started.parts, started.buffers, *own)
            anchors.append(anchor)
            for name, wanted in zip(started.names, started.parts, strict=True):
                gathered[name], parts = parts[: len(wanted)], parts[len(wanted) :]
            if self._routes.blocks is not None:
                anchors.append(self._compress(gathered, parameters))
        found, losses, spanning = [], [], 0
        for piece in self._routes.pieces:
            if piece.span is None:
                found.append(self._within(piece, tensors, parameters))
            else:
                found.append(self._across(piece, spanning, tensors, parameters, gathered))
                spanning += 1
            losses.append(self._shared_loss(found[-1], piece))
        if not found:  # a rank without tokens
            nothing = Piece(0, 0, share=0.0)
            found.append(self._within(nothing, tensors, parameters))
            losses.append(self._shared_loss(found[-1], nothing))
        outputs = [each[0] if len(found) == 1 else torch.cat(each, 1) for each in zip(*found, strict=True)]
        outputs += [sum(losses[1:], losses[0])] if losses[0] is not None else []
        if anchors:
            outputs = [Anchor.apply(x, *anchors) if x.requires_grad else x for x in outputs]
        return outputs

    def _shared_loss(self, found: list[Any], piece: Piece) -> Any:
        """Remove the indexer's loss from a piece's outputs; return its part of each sequence's mean over queries."""
        if LOSS not in self._operators.auxiliary._fields or not self._return_aux:
            return None
        loss = found.pop()
        if loss is None or self._routes.sequences is None:
            return None if loss is None else loss * piece.share
        return pad(loss * piece.share, (piece.sequence, self._routes.sequences - piece.sequence - len(loss)))

    def _compress(self, gathered: dict[str, list[Tensor]], parameters: tuple[Tensor, ...] | None) -> Tensor:
        """Compress this rank's blocks and gather all. Adds k_cmp and v_cmp of each piece to `gathered`."""
        route, wanted = self._routes.blocks, self._routes.whole_blocks
        assert route is not None
        runs = len(self._routes.tokens_of_blocks)
        names = self._operators.names.compressed
        # The last part of each is empty. It carries the gradient on if a rank has no block.
        keys, values = (gathered[name][len(gathered[name]) - 1 - runs :] for name in names)
        compressed = [(keys[-1], values[-1])]
        for k, v in zip(keys[:-1], values[:-1], strict=True):
            compressed.append(self._operators.whole.compress(k, v, parameters))
        own = [torch.cat(each, 1) for each in zip(*compressed, strict=True)]
        found = Gather.apply(route, (wanted, wanted), start(route, own), *own)
        count = len(wanted)
        gathered["k_cmp"], gathered["v_cmp"] = list(found[:count]), list(found[count : 2 * count])
        return found[-1]

    def _within(
        self, piece: Piece, tensors: Mapping[str, Tensor], parameters: tuple[Tensor, ...] | None
    ) -> list[Tensor]:
        """Compute sequences of which this rank holds every token."""
        sinks = self._operators.names.sinks
        whole = piece.begin == 0 and piece.end == tensors["q"].shape[1]
        some = {name: x if whole or name in sinks else x[:, piece.begin : piece.end] for name, x in tensors.items()}
        if piece.bounds is not None:
            some = {name: x if name in sinks else x[0] for name, x in some.items()}
            some["cu_seqlens"] = self._bounds[piece.bounds]
        if parameters is not None:
            some["compression"] = parameters
        found = self._attend(self._operators.whole, some)
        if piece.bounds is None:
            return found
        return [x if x is None or x.dim() == 1 else x[None] for x in found]

    def _across(
        self,
        piece: Piece,
        number: int,
        tensors: Mapping[str, Tensor],
        parameters: tuple[Tensor, ...] | None,
        gathered: Mapping[str, list[Tensor]],
    ) -> list[Tensor]:
        """Compute queries of a sequence of which other ranks hold tokens too."""
        names, given = self._operators.names, self._operators.given
        some = {name: tensors[name][:, piece.begin : piece.end] for name in ROWS if name in tensors}
        some |= {name: tensors[name] for name in names.sinks if name in tensors}
        some |= {name: gathered[source][number] for name, source in names.sources if source in gathered}
        if given is not None:
            some["k_cmp"], some["v_cmp"] = gathered["k_cmp"][number], gathered["v_cmp"][number]
        elif parameters is not None:
            some["compression"] = parameters
        return self._attend(self._operators.whole if given is None else given, some)

    def _attend(self, package: ModuleType, arguments: dict[str, Any]) -> list[Tensor]:
        q, k, v = (arguments.pop(name, None) for name in ("q", "k", "v"))
        found = package.nsa_attention(q, k, v, return_aux=self._return_aux, **arguments, **self._recompute)
        if not self._return_aux:
            return [found]
        o, auxiliary = found
        return [o, *(getattr(auxiliary, name) for name in self._operators.auxiliary._fields)]
