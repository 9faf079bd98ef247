"""A generated operator on a sequence that is sharded over the ranks of a process group."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from nsa_gen.distributed.calls import INDEX_KEYS, LOSS, Call, operators_of, routes_of
from nsa_gen.distributed.collectives import Reduction
from nsa_gen.distributed.sharding import Order, Piece, Shards
from nsa_gen.spec import Spec, load_spec


class ContextParallel:
    """A spec's operator for sequences of which every rank of a group holds a shard.

    Each rank calls `attention` with its queries, keys and values. A sequence that lies in one chunk is computed there.
    For the others, each rank gathers keys and values, compresses the blocks that begin in its chunks (using the next
    rank's tokens if a block extends into them), gathers the compressed blocks, and attends with its own queries at
    their positions. The backward sums the gradients of what was gathered, and gives each rank those of its rows.
    Parameters (phi's, sinks, and those of the surrounding layers) get each rank's part of the gradient. Sum these parts
    over the ranks, or take the mean, as DistributedDataParallel and FSDP2 do.

    Outputs and gradients are those of one process up to rounding. The selected blocks are the same, as long as
    compressed attention has the same tiles for a part of the keys as for all. Tuned tiles may differ between buckets of
    lengths. Then the choice between blocks of almost equal importance may differ too.

    Args:
        spec: a Spec, a spec's path or shipped name, or a generated package.
        mesh: a DeviceMesh with one dim, such as mesh["cp"], or a process group; None is the default group.
        order: how `shards` assigns tokens to ranks, see `Shards`.
        head_groups: in how many groups of KV heads a call runs. While one group is computed, the keys of the next are
            gathered. A divisor of the number of KV heads.
        reduction: how gradients of keys and values are summed over the ranks. "exchange" sends each part to the rank
            that owns it, in the inputs' dtype. That rank adds the parts in float32, in the order of ranks, so every
            run gives equal bits. "reduce_scatter" leaves the sum to the backend, in float32, and sends fewer bytes
            between nodes of several GPUs.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what was given.
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
        if head_groups > 1 and self.spec.selection is not None and self.spec.selection.scope == "all":
            raise ValueError(f"head_groups: expected 1 with selection.scope: all, got {head_groups}; all heads choose")
        if self.spec.external:
            raise ValueError(
                "compression.phi: expected a phi that the operator computes, got external; blocks that straddle ranks "
                "are compressed from gathered keys"
            )
        self.order: Order = order
        self.head_groups, self.reduction = head_groups, reduction
        self._operators = operators_of(
            self.spec, head_groups, self.ranks, spec if isinstance(spec, ModuleType) else None
        )
        self._bounds: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The specs whose packages run, for `nsa_gen.tune`: one for a group of heads, and one with given blocks."""
        plans = self._operators.plan, self._operators.given_plan
        return tuple(plan.spec for plan in plans if plan is not None)

    def shards(self, tokens: int, cu_seqlens: Sequence[int] | Tensor | None = None) -> Shards:
        """How sequences of `tokens` tokens, or packed ones with that many in all, are sharded over this group.

        cu_seqlens (N + 1,) are the bounds of packed sequences in the whole batch, the same on every rank. If it is a
        GPU tensor, its values are read, which waits for the GPU. Call this once for all layers of a step.
        """
        if isinstance(cu_seqlens, Tensor):
            if cu_seqlens.is_floating_point() or cu_seqlens.dim() != 1:
                found = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
                raise TypeError(f"cu_seqlens: expected integers (N + 1,), got {found}")
            cu_seqlens = cu_seqlens.tolist()
        return Shards(tokens, self.ranks, self.order, None if cu_seqlens is None else tuple(cu_seqlens))

    def shard(self, x: Tensor, shards: Shards, dim: int | None = None) -> Tensor:
        """This rank's rows of x, whose dim `dim` has all tokens; None is dim 1 as in (B, T, ...), or 0 if packed."""
        dim = self._token_dim(shards, dim)
        if x.shape[dim] != shards.tokens:
            raise ValueError(f"x: expected {shards.tokens} tokens in dim {dim}, got shape {tuple(x.shape)}")
        parts = [x.narrow(dim, chunk.start, chunk.end - chunk.start) for chunk in shards.chunks_of(self.rank)]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def unshard(self, x: Tensor, shards: Shards, dim: int | None = None) -> Tensor:
        """All ranks' rows of x in the order of tokens, on every rank. Without a gradient."""
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
        """`nsa_attention` of the spec's package, for this rank's queries. Every rank of the group must call it.

        If one rank runs the backward, every rank must.

        Args:
            q: this rank's queries (B, rows, Hq, Dk), packed (rows, Hq, Dk), in the order of `shards`.
            k: its keys (B, rows, Hkv, Dk).
            v: its values (B, rows, Hkv, Dv).
            gates: gates of its queries (B, rows, Hq, branches), if the spec has gates.
            shards: how the tokens are sharded, from `ContextParallel.shards`.
            compression: phi's parameters, the same on every rank.
            return_aux: also return the branches' outputs, lse, indices and counts of this rank's queries and, with an
                indexer, their part of each sequence's `alignment_loss`, (B,) or packed (N,). The parts of all ranks
                add up to the loss.
            recompute: branches whose forward the backward runs again, see `nsa_attention`.
            more: the spec's other arguments: k_slc, v_slc, k_win and v_win, indices and counts of its queries, q_idx of
                its queries and k_idx of its keys, sinks.

        Returns:
            o (B, rows, Hq, Dv), and with `return_aux` a named tuple of the others.

        Raises:
            TypeError, ValueError: the message names the argument, what was expected and what was given.
        """
        if not isinstance(shards, Shards):
            raise TypeError(f"shards: expected Shards, got {type(shards).__name__}")
        if shards.ranks != self.ranks:
            raise ValueError(f"shards: expected those of {self.ranks} ranks, got {shards.ranks}")
        given = {"q": q, "k": k, "v": v, "gates": gates, **more}
        tensors = self._checked(given, shards)
        make = routes_of.__wrapped__ if torch.compiler.is_compiling() else routes_of
        routes = make(shards, self.rank, self.group.group_name, self.reduction, self._operators.travelling)
        bounds = self._bounds_of(routes.pieces, q.device)
        call = Call(self._operators, routes, bool(return_aux), tuple(recompute), bounds)
        count = self.head_groups
        several = [_group_arguments(tensors, compression, number, count) for number in range(count)]
        waiting = [call.start(several[0][0])] if shards.spans else [None]
        found = []
        for number, (some, parameters) in enumerate(several):
            if shards.spans and number + 1 < count:
                waiting.append(call.start(several[number + 1][0]))
            found.append(call.run(some, parameters, waiting[number]))
        fields = ("o", *self._operators.auxiliary._fields)
        outputs = {}
        for name, each in zip(fields, zip(*found, strict=True), strict=False):
            if name == LOSS:  # the sum over choices
                outputs[name] = sum(each[1:], each[0])
                continue
            whole = torch.cat(each, 2) if count > 1 else each[0]
            outputs[name] = whole if shards.bounds is None else whole[0]
        o = outputs.pop("o")
        return (o, self._operators.auxiliary(**outputs)) if return_aux else o

    def _checked(self, given: Mapping[str, Any], shards: Shards) -> dict[str, Tensor]:
        """The given tensors as (B, rows, ...), after checks of their tokens; sinks are not changed."""
        names, rows = self._operators.names, shards.rows(self.rank)
        found = {}
        for name, x in given.items():
            if name not in names.known:
                if x is None:
                    continue
                raise TypeError(f"{name}: expected one of {', '.join(sorted(names.known))}")
            if x is None:
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
            if name not in names.sinks:
                x = x if shards.bounds is None else x[None]
                dims = {"gates": 4, "counts": 3}.get(name, 4)
                if x.dim() != dims or x.shape[1] != rows:
                    shape = tuple(x.shape if shards.bounds is None else x.shape[1:])
                    layout = "(B, rows, ...)" if shards.bounds is None else "(rows, ...)"
                    raise ValueError(f"{name}: expected this rank's {rows} rows of {layout}, got shape {shape}")
            found[name] = x
        for name in names.required:
            if name not in found:
                raise TypeError(f"{name}: expected a torch.Tensor, got None")
        return found

    def _bounds_of(self, pieces: Sequence[Piece], device: torch.device) -> dict[tuple[int, ...], Tensor]:
        """cu_seqlens, on the device, of the pieces that lie in one chunk. Kept between calls."""
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


def _group_arguments(
    tensors: Mapping[str, Tensor], parameters: tuple[Tensor, ...] | None, number: int, count: int
) -> tuple[dict[str, Tensor], tuple[Tensor, ...] | None]:
    """The arguments of one of `count` groups of heads. Heads are dim 2, but dim 0 of sinks and of phi's parameters."""
    if count == 1:
        return dict(tensors), parameters

    def share(x: Tensor, dim: int) -> Tensor:
        size = x.shape[dim] // count
        return x.narrow(dim, number * size, size)

    # All heads have the same index keys.
    found = {name: x if name == INDEX_KEYS else share(x, 0 if x.dim() == 1 else 2) for name, x in tensors.items()}
    return found, None if parameters is None else tuple(share(x, 0) for x in parameters)


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
