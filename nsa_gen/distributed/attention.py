"""A generated operator on a sequence that is dealt out to the ranks of a process group."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from nsa_gen.distributed.collectives import Anchor, Gather, Part, Reduction, Route, name_of, start
from nsa_gen.distributed.sharding import Order, Piece, Shards
from nsa_gen.loading import load
from nsa_gen.lowering import Plan, lower
from nsa_gen.spec import Spec, load_spec

ROWS = ("q", "gates", "indices", "counts")
"""Arguments that belong to queries: a rank has those of its own."""


@dataclass(frozen=True)
class _Operators:
    """The packages that a spec's pieces run.

    `whole` is the spec's own, `given` the same operator with compressed keys and values as arguments; None where they
    are computed within. `auxiliary` is a named tuple of the outputs besides o that belong to queries.
    """

    plan: Plan
    whole: ModuleType
    given_plan: Plan | None
    given: ModuleType | None
    auxiliary: Any


class ContextParallel:
    """A spec's operator for sequences of which every rank of a group holds a shard.

    Each rank calls `attention` with its queries, keys and values. Sequences that lie in one chunk are computed there.
    Of the others, each rank gathers keys and values, compresses the blocks that begin in its chunks (with the next
    rank's tokens where they straddle a bound), gathers the compressed ones, and attends with its own queries at their
    place. The backward sums the gradients of what was gathered and hands each rank those of its rows. Parameters
    (phi's, sinks, and those of the layers around) get each rank's part of the gradient: sum them over the ranks, or
    take the mean, as DistributedDataParallel and FSDP2 do.

    Outputs and gradients are those of one process up to rounding. The same blocks are chosen, as long as the compressed
    attention has the same tiles for a part of the keys as for all: tuned tiles may differ between buckets of lengths,
    and then the choice between blocks of almost equal importance may.

    Args:
        spec: a Spec, a spec's path or shipped name, or a generated package.
        mesh: a DeviceMesh of one dim, such as mesh["cp"], or a process group; the default group if None.
        order: how shards of `shards` are dealt out, see `Shards`.
        head_groups: in how many groups of KV heads a call runs; the keys of the next group are gathered while one is
            computed. A divisor of the KV heads.
        reduction: how gradients of keys and values are summed over the ranks. "exchange" sends each part in the
            inputs' dtype to the rank that it belongs to, which adds up in float32, in the order of ranks: equal bits
            on every run. "reduce_scatter" leaves the sum to the backend, in float32, which costs fewer bytes between
            nodes of several GPUs.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        spec: Spec | ModuleType | str | os.PathLike[str],
        mesh: DeviceMesh | ProcessGroup | None = None,
        *,
        order: Order = "head_tail",
        head_groups: int = 1,
        reduction: Reduction = "exchange",
    ) -> None:
        self.spec = _spec_of(spec)
        self.group = _group_of(mesh)
        self.rank, self.ranks = self.group.rank(), self.group.size()
        Shards(0, self.ranks, order)
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction: expected {' or '.join(get_args(Reduction))}, got {reduction!r}")
        kv_heads = self.spec.heads.kv
        if isinstance(head_groups, bool) or not isinstance(head_groups, int):
            raise TypeError(f"head_groups: expected an int, got {type(head_groups).__name__} {head_groups!r}")
        if head_groups < 1 or kv_heads % head_groups:
            raise ValueError(f"head_groups: expected a divisor of the {kv_heads} KV heads, got {head_groups}")
        if self.spec.external:
            raise ValueError(
                "compression.phi: expected a phi that the operator computes, got external; blocks that straddle ranks "
                "are compressed from gathered keys"
            )
        self.order: Order = order
        self.head_groups, self.reduction = head_groups, reduction
        self._operators = _operators_of(self.spec, head_groups, self.ranks)
        self._bounds: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def shards(self, tokens: int, cu_seqlens: Sequence[int] | Tensor | None = None) -> Shards:
        """How sequences of `tokens` tokens, or packed ones of that many in all, are dealt out in this group.

        cu_seqlens (N + 1,) are the bounds of packed sequences in the whole batch, the same on every rank; the values of
        a tensor on a GPU are waited for. Make it once for all layers of a step.
        """
        if isinstance(cu_seqlens, Tensor):
            if cu_seqlens.is_floating_point() or cu_seqlens.dim() != 1:
                found = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
                raise TypeError(f"cu_seqlens: expected integers (N + 1,), got {found}")
            cu_seqlens = cu_seqlens.tolist()
        return Shards(tokens, self.ranks, self.order, None if cu_seqlens is None else tuple(cu_seqlens))

    def shard(self, x: Tensor, shards: Shards, dim: int | None = None) -> Tensor:
        """This rank's rows of x, whose dim `dim` has all tokens: 1 as in (B, T, ...), packed 0, if None."""
        dim = self._token_dim(shards, dim)
        if x.shape[dim] != shards.tokens:
            raise ValueError(f"x: expected {shards.tokens} tokens in dim {dim}, got shape {tuple(x.shape)}")
        parts = [x.narrow(dim, chunk.start, chunk.end - chunk.start) for chunk in shards.chunks_of(self.rank)]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def unshard(self, x: Tensor, shards: Shards, dim: int | None = None) -> Tensor:
        """All ranks' rows of x in the order of tokens, on every rank; without a gradient."""
        dim = self._token_dim(shards, dim)
        if x.shape[dim] != shards.rows(self.rank):
            raise ValueError(f"x: expected {shards.rows(self.rank)} tokens in dim {dim}, got shape {tuple(x.shape)}")
        rows = x.detach().movedim(dim, 0)
        most = max(shards.rows(rank) for rank in range(self.ranks))
        sent = torch.cat((rows, rows.new_zeros(most - rows.shape[0], *rows.shape[1:])))
        found = [torch.empty_like(sent) for _ in range(self.ranks)]
        dist.all_gather(found, sent, group=self.group)
        parts = [found[chunk.rank][chunk.offset : chunk.offset + chunk.end - chunk.start] for chunk in shards.chunks]
        return (torch.cat(parts) if parts else sent).movedim(0, dim)

    def positions(self, shards: Shards, device: torch.device | str | None = None) -> Tensor:
        """The position in its sequence of each of this rank's tokens, (rows,) int64, for the rotary embedding."""
        return torch.tensor(shards.positions(self.rank), dtype=torch.int64, device=device)

    @staticmethod
    def _token_dim(shards: Shards, dim: int | None) -> int:
        return dim if dim is not None else int(shards.bounds is None)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor | None = None,
        *,
        shards: Shards,
        compression: tuple[Tensor, ...] | None = None,
        return_aux: bool = False,
        recompute: Sequence[str] = (),
        **more: Tensor | None,
    ) -> Any:
        """`nsa_attention` of a package of the spec, for this rank's queries; every rank of the group has to call it.

        Every rank also has to run its backward, if one does.

        Args:
            q: this rank's queries (B, rows, Hq, Dk), packed (rows, Hq, Dk), in the order of `shards`.
            k: its keys (B, rows, Hkv, Dk).
            v: its values (B, rows, Hkv, Dv).
            gates: of its queries (B, rows, Hq, branches), where the spec has some.
            shards: how the tokens are dealt out, as `ContextParallel.shards` says.
            compression: phi's parameters, the same on every rank.
            return_aux: also return, of this rank's queries, the branches' outputs, lse, indices and counts.
            recompute: branches whose forward the backward runs again, see `nsa_attention`.
            more: the spec's other arguments: k_slc, v_slc, k_win and v_win, indices and counts of its queries, sinks.

        Returns:
            o (B, rows, Hq, Dv), and with `return_aux` a named tuple of the others.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if not isinstance(shards, Shards):
            raise TypeError(f"shards: expected Shards, got {type(shards).__name__}")
        if shards.ranks != self.ranks:
            raise ValueError(f"shards: expected those of {self.ranks} ranks, got {shards.ranks}")
        given = {"q": q, "k": k, "v": v, "gates": gates, **more}
        tensors = self._checked(given, shards)
        pieces = shards.pieces(self.rank)
        call = _Call(self, shards, pieces, bool(return_aux), tuple(recompute), self._bounds_of(pieces, q.device))
        count = self.head_groups
        several = [_group_arguments(tensors, compression, self.spec, number, count) for number in range(count)]
        waiting = [call.start(several[0][0])] if shards.spans else [None]
        found = []
        for number, (some, parameters) in enumerate(several):
            if shards.spans and number + 1 < count:
                waiting.append(call.start(several[number + 1][0]))
            found.append(call.run(some, parameters, waiting[number]))
        outputs = [torch.cat(each, 2) if count > 1 else each[0] for each in zip(*found, strict=True)]
        outputs = [each if shards.bounds is None else each[0] for each in outputs]
        return (outputs[0], self._operators.auxiliary(*outputs[1:])) if return_aux else outputs[0]

    def _checked(self, given: Mapping[str, Any], shards: Shards) -> dict[str, Tensor]:
        """The tensors that are given, as (B, rows, ...), after checks of their tokens; sinks as they are."""
        plan, rows = self._operators.plan, shards.rows(self.rank)
        known = {argument.name for argument in plan.arguments} | {"gates", "k", "v"}
        found = {}
        for name, x in given.items():
            if name not in known:
                if x is None:
                    continue
                raise TypeError(f"{name}: expected one of {', '.join(sorted(known))}")
            if x is None:
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
            if name not in plan.sinks:
                x = x if shards.bounds is None else x[None]
                dims = {"gates": 4, "counts": 3}.get(name, 4)
                if x.dim() != dims or x.shape[1] != rows:
                    shape = tuple(x.shape if shards.bounds is None else x.shape[1:])
                    layout = "(B, rows, ...)" if shards.bounds is None else "(rows, ...)"
                    raise ValueError(f"{name}: expected this rank's {rows} rows of {layout}, got shape {shape}")
            found[name] = x
        for name in ("q", *plan.raw_names):
            if name not in found:
                raise TypeError(f"{name}: expected a torch.Tensor, got None")
        return found

    def _bounds_of(self, pieces: Sequence[Piece], device: torch.device) -> dict[tuple[int, ...], Tensor]:
        """cu_seqlens on the device of the pieces that lie in one chunk, kept from call to call."""
        found = {}
        for piece in pieces:
            if piece.bounds is None:
                continue
            key = piece.bounds, device
            if key not in self._bounds:
                if len(self._bounds) >= 256:
                    self._bounds.clear()
                self._bounds[key] = torch.tensor(piece.bounds, dtype=torch.int32, device=device)
            found[piece.bounds] = self._bounds[key]
        return found


class _Started(NamedTuple):
    """Gathers under way: the names of the tensors, the parts wanted of each, and the buffers."""

    names: list[str]
    parts: tuple[tuple[Part, ...], ...]
    buffers: list[Tensor]


class _Call:
    """One call of `ContextParallel.attention`: what it wants of other ranks, and its pieces."""

    def __init__(
        self,
        parallel: ContextParallel,
        shards: Shards,
        pieces: Sequence[Piece],
        return_aux: bool,
        recompute: tuple[str, ...],
        bounds: Mapping[tuple[int, ...], Tensor],
    ) -> None:
        self._spec, self._operators = parallel.spec, parallel._operators
        self._shards, self._pieces, self._rank = shards, pieces, parallel.rank
        self._return_aux, self._bounds = return_aux, bounds
        self._recompute = {"recompute": recompute} if recompute else {}
        where = parallel.rank, parallel.ranks, name_of(parallel.group), parallel.reduction
        self._route = Route(shards.segments, *where)
        self._spanning = [piece for piece in pieces if piece.span is not None]
        self._block_route = None
        if self._operators.given is not None:
            compression = self._spec.compression
            assert compression is not None
            self._block, self._stride = compression.block, compression.stride
            self._block_route = Route(shards.block_segments(self._block, self._stride), *where)

    def start(self, tensors: Mapping[str, Tensor]) -> _Started:
        """Begin to gather raw keys and values."""
        plan, given = self._operators.plan, self._operators.given_plan
        whole = [Part(piece.span, 0, piece.keys) for piece in self._spanning if piece.span is not None]
        blocks = self._tokens_of_blocks()
        read = plan.raw_names if given is None else [name for branch in given.raw_branches for name in plan.kv(branch)]
        compressed = () if given is None else plan.kv("cmp")
        parts = tuple(
            (*(whole if name in read else ()), *(blocks if name in compressed else ()), Part(0, 0, 0))
            for name in plan.raw_names
        )
        names = list(plan.raw_names)
        return _Started(names, parts, start(self._route, [tensors[name] for name in names]))

    def _tokens_of_blocks(self) -> list[Part]:
        """The tokens of each run of compressed blocks that this rank makes."""
        if self._block_route is None:
            return []
        return [
            Part(span, each.first * self._stride, (each.first + each.count - 1) * self._stride + self._block)
            for span, segments in enumerate(self._block_route.segments)
            for each in segments
            if each.rank == self._rank
        ]

    def run(
        self, tensors: Mapping[str, Tensor], parameters: tuple[Tensor, ...] | None, started: _Started | None
    ) -> list[Tensor]:
        """o, and with return_aux the other outputs, of this rank's queries (B, rows, H, ...)."""
        anchors: list[Tensor] = []
        gathered: dict[str, list[Tensor]] = {}
        if started is not None:
            own = [tensors[name] for name in started.names]
            *parts, anchor = Gather.apply(self._route, started.parts, started.buffers, *own)
            anchors.append(anchor)
            for name, wanted in zip(started.names, started.parts, strict=True):
                gathered[name], parts = parts[: len(wanted)], parts[len(wanted) :]
            if self._block_route is not None:
                anchors.append(self._compress(gathered, parameters))
        found, spanning = [], 0
        for piece in self._pieces:
            if piece.span is None:
                found.append(self._within(piece, tensors, parameters))
            else:
                found.append(self._across(piece, spanning, tensors, parameters, gathered))
                spanning += 1
        if not found:  # a rank without a token
            found.append(self._within(Piece(0, 0), tensors, parameters))
        outputs = [each[0] if len(found) == 1 else torch.cat(each, 1) for each in zip(*found, strict=True)]
        if anchors:
            outputs[0] = Anchor.apply(outputs[0], *anchors)
        return outputs

    def _compress(self, gathered: dict[str, list[Tensor]], parameters: tuple[Tensor, ...] | None) -> Tensor:
        """Compress the blocks that are this rank's and gather all: `gathered` gets k_cmp and v_cmp of each piece."""
        assert self._block_route is not None
        runs = len(self._tokens_of_blocks())
        own = []
        names = self._operators.plan.kv("cmp")
        # The last part of each is empty: it leads the gradient on where a rank has no block.
        keys, values = (gathered[name][len(gathered[name]) - 1 - runs :] for name in names)
        compressed = [(keys[-1], values[-1])]
        for k, v in zip(keys[:-1], values[:-1], strict=True):
            compressed.append(self._operators.whole.compress(k, v, parameters))
        own = [torch.cat(each, 1) for each in zip(*compressed, strict=True)]
        wanted = []
        for piece in self._spanning:
            assert piece.span is not None
            wanted.append(Part(piece.span, 0, max(0, (piece.keys - self._block) // self._stride + 1)))
        found = Gather.apply(self._block_route, (tuple(wanted),) * 2, start(self._block_route, own), *own)
        count = len(wanted)
        gathered["k_cmp"], gathered["v_cmp"] = list(found[:count]), list(found[count : 2 * count])
        return found[-1]

    def _within(
        self, piece: Piece, tensors: Mapping[str, Tensor], parameters: tuple[Tensor, ...] | None
    ) -> list[Tensor]:
        """Sequences of which this rank holds every token."""
        plan = self._operators.plan
        whole = piece.begin == 0 and piece.end == tensors["q"].shape[1]
        some = {
            name: x if whole or name in plan.sinks else x[:, piece.begin : piece.end] for name, x in tensors.items()
        }
        if piece.bounds is not None:
            some = {name: x if name in plan.sinks else x[0] for name, x in some.items()}
            some["cu_seqlens"] = self._bounds[piece.bounds]
        if parameters is not None:
            some["compression"] = parameters
        found = self._attend(self._operators.whole, some)
        return found if piece.bounds is None else [x[None] for x in found]

    def _across(
        self,
        piece: Piece,
        number: int,
        tensors: Mapping[str, Tensor],
        parameters: tuple[Tensor, ...] | None,
        gathered: Mapping[str, list[Tensor]],
    ) -> list[Tensor]:
        """Queries of a sequence that other ranks hold tokens of."""
        plan, given = self._operators.plan, self._operators.given_plan
        some = {name: tensors[name][:, piece.begin : piece.end] for name in ROWS if name in tensors}
        some |= {name: tensors[name] for name in plan.sinks if name in tensors}
        if given is None:
            some |= {name: gathered[name][number] for name in plan.raw_names}
            if parameters is not None:
                some["compression"] = parameters
            return self._attend(self._operators.whole, some)
        for branch in given.raw_branches:
            for name, source in zip(given.kv(branch), plan.kv(branch), strict=True):
                some[name] = gathered[source][number]
        some["k_cmp"], some["v_cmp"] = gathered["k_cmp"][number], gathered["v_cmp"][number]
        assert self._operators.given is not None
        return self._attend(self._operators.given, some)

    def _attend(self, package: ModuleType, arguments: dict[str, Any]) -> list[Tensor]:
        q, k, v = (arguments.pop(name, None) for name in ("q", "k", "v"))
        found = package.nsa_attention(q, k, v, return_aux=self._return_aux, **arguments, **self._recompute)
        if not self._return_aux:
            return [found]
        o, auxiliary = found
        return [o, *(getattr(auxiliary, name) for name in self._operators.auxiliary._fields)]


def _group_arguments(
    tensors: Mapping[str, Tensor], parameters: tuple[Tensor, ...] | None, spec: Spec, number: int, count: int
) -> tuple[dict[str, Tensor], tuple[Tensor, ...] | None]:
    """The arguments of one group of heads of `count`."""
    if count == 1:
        return dict(tensors), parameters
    query, kv = spec.heads.query // count, spec.heads.kv // count
    of_query = ("q", "gates")
    found = {}
    for name, x in tensors.items():
        if x.dim() == 1:
            found[name] = x[number * query : (number + 1) * query]
        else:
            heads = query if name in of_query else kv
            found[name] = x[:, :, number * heads : (number + 1) * heads]
    if parameters is not None:
        parameters = tuple(x[number * kv : (number + 1) * kv] for x in parameters)
    return found, parameters


def _spec_of(spec: Any) -> Spec:
    if isinstance(spec, ModuleType):
        if not hasattr(spec, "SPEC"):
            raise TypeError(f"spec: expected a generated package, got the module {spec.__name__}")
        return Spec.model_validate(dict(spec.SPEC))
    return spec if isinstance(spec, Spec) else load_spec(spec)


def _group_of(mesh: Any) -> ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("mesh: expected a process group; call torch.distributed.init_process_group first")
    if mesh is None:
        group = dist.group.WORLD
        assert group is not None
        return group
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f'mesh: expected one dim, such as mesh["cp"], got {mesh.ndim} ({mesh.mesh_dim_names})')
        return mesh.get_group()
    if isinstance(mesh, ProcessGroup):
        return mesh
    raise TypeError(f"mesh: expected a DeviceMesh of one dim or a process group, got {type(mesh).__name__}")


def _operators_of(spec: Spec, head_groups: int, ranks: int) -> _Operators:
    """The packages of a spec, for a group of its heads."""
    some = spec
    if head_groups > 1:
        heads = {"query": spec.heads.query // head_groups, "kv": spec.heads.kv // head_groups}
        some = spec.replace(name=f"{spec.name}_heads_{heads['query']}", heads=heads)
    plan = lower(some)
    given = _with_given_blocks(some) if plan.compresses and ranks > 1 else None
    given_plan = None if given is None else lower(given)
    if given_plan is not None and not given_plan.raw_names:  # nothing would say how many keys there are
        given = given_plan = None
    whole = load(some)
    of_queries = [name for name in whole.Auxiliary._fields if name not in ("k_cmp", "v_cmp")]
    auxiliary = NamedTuple("Auxiliary", [(name, Tensor) for name in of_queries])
    return _Operators(plan, whole, given_plan, None if given is None else load(given), auxiliary)


def _with_given_blocks(spec: Spec) -> Spec:
    """The spec whose compressed keys and values are arguments."""
    assert spec.compression is not None
    compression = {"block": spec.compression.block, "stride": spec.compression.stride, "phi": "external"}
    passes = tuple(each for each in spec.passes if each != "decode")
    return spec.replace(name=f"{spec.name}_given_blocks", compression=compression, passes=passes)
