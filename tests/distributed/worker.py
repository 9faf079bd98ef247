"""Run by test_context_parallel, one process a rank: `worker.py RANK WORLD FOLDER`; prints JSON, a line a case.

Each case runs on the first ranks of the world. What one process computes of it is made by one rank, which writes it
into FOLDER, and compared on every rank that takes part.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import nsa_gen
from nsa_gen.distributed import ContextParallel
from nsa_gen.distributed.calls import LOSS
from nsa_gen.lowering import lower
from nsa_gen.verification.calls import quick_interpreter
from tests.support import small_spec

SHARDED = "sharded"
"""The name of what `sharded_training` finds."""


@dataclass(frozen=True)
class Case:
    """A spec's changes, the tokens, and how they are dealt out."""

    ranks: int
    tokens: int
    spec: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    bounds: tuple[int, ...] | None = None
    order: str = "head_tail"
    head_groups: int = 1
    reduction: str = "exchange"
    compiled: bool = False
    recompute: tuple[str, ...] = ()


FAST = {"branches": "cmp win"}
INDEXED = {"branches": "cmp slc", "index": 16, "count": 2, "initial": 0}
CASES = {
    "whole": Case(2, 21, {"phi": "weighted", "count": 1, "initial": 0, "local": 0}),
    "packed": Case(
        3,
        24,
        {"branches": "cmp slc", "count": 1, "initial": 0, "local": 0},
        bounds=(0, 3, 3, 22),
        order="contiguous",
        reduction="reduce_scatter",
    ),
    "packed_head_tail": Case(4, 30, FAST, bounds=(0, 13, 15, 29)),
    "uneven": Case(4, 13, {**FAST, "kv_heads": 2, "sink": "learned"}, batch=2, head_groups=2),
    "contiguous": Case(3, 20, {**FAST, "phi": "linear"}, batch=2, order="contiguous", recompute=("cmp",)),
    "without_tokens": Case(4, 3, FAST),
    "one_rank": Case(1, 12, FAST),
    "within_chunks": Case(2, 24, FAST, bounds=(0, 12, 20, 24), order="contiguous"),
    "per_branch": Case(2, 21, {**FAST, "kv": "per_branch"}),
    "compressed_alone": Case(2, 21, {"branches": "cmp", "phi": "weighted", "gate": "none"}),
    "mean_scores": Case(2, 33, {"branches": "slc", "scores": "mean", "count": 2, "initial": 0}),
    "indexer": Case(2, 50, {"branches": "slc", "index": 16, "count": 2, "initial": 0}, compiled=True),
    "indexer_packed": Case(
        3, 57, {**INDEXED, "kv_heads": 2}, bounds=(0, 0, 9, 49, 52), order="contiguous", head_groups=2
    ),
    "given_indices": Case(2, 17, {"branches": "slc", "indices": "input", "count": 2}),
    "compiled": Case(2, 21, {**FAST, "phi": "weighted"}, bounds=(0, 4, 17, 21), compiled=True),
}


@dataclass
class Drawn:
    """A case's package and arguments of all tokens, by name, and the gradient of o."""

    op: Any
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor]
    compression: Any
    do: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """What has a gradient."""
        learned = {} if self.compression is None else self.compression._asdict()
        return {**self.tensors, **self.shared, **learned}

    def call(self, attend: Any, tensors: dict[str, Tensor], **more: Any) -> Any:
        others = {name: x for name, x in tensors.items() if name not in ("q", "k", "v")}
        if self.compression is not None:
            others["compression"] = self.compression
        return attend(tensors["q"], tensors["k"], tensors["v"], **others, **self.shared, return_aux=True, **more)


def draw(case: Case) -> Drawn:
    changes = dict(case.spec)
    spec = small_spec(changes.pop("branches", "cmp slc win"), **changes)
    op, plan = nsa_gen.load(spec), lower(spec)
    torch.manual_seed(case.tokens)
    lead = (case.batch, case.tokens) if case.bounds is None else (case.tokens,)
    heads = spec.heads
    tensors = {"q": torch.randn(*lead, heads.query, 16)}
    tensors |= {name: torch.randn(*lead, heads.kv, 16) for name in plan.raw_names}
    if plan.gated:
        tensors["gates"] = torch.randn(*lead, heads.query, len(plan.branches))
    if spec.selection and spec.selection.indices == "input":
        blocks = torch.arange(case.tokens).div(16, rounding_mode="floor")[None, :, None, None]
        indices = torch.cat((torch.zeros_like(blocks), blocks.where(blocks > 0, -1)), -1)
        tensors["indices"] = indices.int().expand(*lead, heads.kv, 2)
        tensors["counts"] = (indices >= 0).sum(-1).int().expand(*lead, heads.kv)
    if spec.index_dim:
        tensors["q_idx"] = torch.randn(*lead, spec.scopes, spec.index_dim)
        tensors["k_idx"] = torch.randn(*lead, 1, spec.index_dim)
    shared = {name: torch.randn(heads.query) for name in plan.sinks}
    learned = None
    if plan.parameters:
        shapes = [(heads.kv, *(int(dim) if dim.isdigit() else 16 for dim in x.dims[1:])) for x in plan.parameters]
        if spec.compression and spec.compression.phi.key == "linear":
            shapes = [(heads.kv, 8 * 16, 16)] * 2
        learned = op.CompressionParameters(*(0.3 * torch.randn(shape) for shape in shapes))
    drawn = Drawn(op, tensors, shared, learned, torch.randn(*lead, heads.query, 16))
    for x in drawn.leaves().values():
        x.requires_grad_(x.is_floating_point())
    return drawn


def differentiate(o: Tensor, auxiliary: Any, do: Tensor) -> None:
    """The backward of o and, with an indexer, of the sum of its losses."""
    loss = getattr(auxiliary, LOSS, None)
    if loss is None:
        o.backward(do)
    else:
        torch.autograd.backward((o, loss), (do, torch.ones_like(loss)))


def alone(case: Case) -> dict[str, Tensor]:
    """Outputs and gradients of one process."""
    drawn = draw(case)
    bounds = None if case.bounds is None else torch.tensor(case.bounds, dtype=torch.int32)
    o, auxiliary = drawn.call(drawn.op.nsa_attention, drawn.tensors, cu_seqlens=bounds)
    differentiate(o, auxiliary, drawn.do)
    found = {
        "o": o.detach(),
        **{name: x.detach() for name, x in auxiliary._asdict().items() if name not in ("k_cmp", "v_cmp")},
    }
    return found | {f"d{name}": x.grad for name, x in drawn.leaves().items() if x.requires_grad}


def together(case: Case, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The same of a group's ranks, put together."""
    drawn = draw(case)
    parallel = ContextParallel(
        drawn.op, group, order=case.order, head_groups=case.head_groups, reduction=case.reduction
    )
    shards = parallel.shards(case.tokens, case.bounds)
    own = {name: parallel.shard(x.detach(), shards) for name, x in drawn.tensors.items()}
    for x in own.values():
        x.requires_grad_(x.is_floating_point())
    attend = torch.compile(parallel.attention, fullgraph=True, backend="aot_eager")
    more = {"recompute": case.recompute} if case.recompute else {}
    o, auxiliary = drawn.call(attend if case.compiled else parallel.attention, own, shards=shards, **more)
    differentiate(o, auxiliary, parallel.shard(drawn.do, shards))
    found = {"o": o, **auxiliary._asdict(), **{f"d{name}": x.grad for name, x in own.items() if x.requires_grad}}
    loss = found.pop(LOSS, None)
    found = {name: parallel.unshard(x, shards) for name, x in found.items()}
    if loss is not None:
        found[LOSS] = loss.detach().clone()
        dist.all_reduce(found[LOSS], group=group)
    learned = {} if drawn.compression is None else drawn.compression._asdict()
    for name, x in {**drawn.shared, **learned}.items():
        total = torch.zeros_like(x) if x.grad is None else x.grad
        dist.all_reduce(total, group=group)
        found[f"d{name}"] = total
    return found


def compared(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each quantity, relative to its largest number; -1 where one is missing."""
    result = {}
    for name in sorted({*found, *wanted}):
        if name not in found or name not in wanted or found[name].shape != wanted[name].shape:
            result[name] = -1.0
            continue
        x, y = found[name].double(), wanted[name].double()
        x, y = x.masked_fill(x.isinf() & (x == y), 0), y.masked_fill(y.isinf() & (x == y), 0)
        difference, largest = (float(each.abs().max()) if each.numel() else 0.0 for each in (x - y, y))
        result[name] = (
            difference if not y.is_floating_point() else difference / max(largest, 1e-30) if difference else 0
        )
    return result


def sharded_training(mesh: Any) -> dict[str, float]:
    """A step under FSDP2 of a layer whose sequence the same ranks share, and the step of one process."""
    op = nsa_gen.load(small_spec("cmp win", phi="weighted"))
    torch.manual_seed(0)
    layer = op.NativeSparseAttention(32)
    single = copy.deepcopy(layer)
    hidden, target = torch.randn(1, 24, 32), torch.randn(1, 24, 32)
    parallel = ContextParallel(op, mesh)
    shards = parallel.shards(24)

    class Parallel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (getattr(layer, name)(x).unflatten(-1, (-1, 16)) for name in ("q_proj", "k_proj", "v_proj"))
            gates = layer.gate_proj(x).unflatten(-1, (-1, 2))
            phi = op.CompressionParameters(layer.phi_key_weight, layer.phi_value_weight)
            return layer.o_proj(parallel.attention(q, k, v, gates, shards=shards, compression=phi).flatten(-2))

    model = fully_shard(Parallel(), mesh=mesh)
    own = parallel.shard(hidden, shards)
    ((model(own) - parallel.shard(target, shards)).square().mean()).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    (single(hidden) - target).square().mean().backward()
    before = [x.detach().clone() for x in single.parameters()]
    torch.optim.SGD(single.parameters(), lr=0.5).step()
    whole = [x.full_tensor().detach() for x in layer.parameters()]
    error = max(float((x - y).abs().max()) for x, y in zip(whole, single.parameters(), strict=True))
    moved = min(float((x - y).abs().max()) for x, y in zip(before, single.parameters(), strict=True))
    return {"error": error, "moved": moved}


def main() -> None:
    """Every case, one after the other."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    names = sys.argv[4:] or [*CASES, SHARDED]
    quick_interpreter()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    groups = {count: dist.new_group(range(count)) for count in range(1, world + 1)}
    for number, name in enumerate(names):
        if number % world == world - 1 - rank and name != SHARDED:
            torch.save(alone(CASES[name]), folder / f"{name}.pt")
    dist.barrier()
    for name in names:
        if name == SHARDED:
            mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "cp"))["cp"]
            found = sharded_training(mesh) if rank < 2 else None
        else:
            case = CASES[name]
            part = rank < case.ranks
            found = compared(together(case, groups[case.ranks]), torch.load(folder / f"{name}.pt")) if part else None
        if found is not None:
            print(json.dumps({"case": name, "rank": rank, "errors": found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # on a busy machine gloo's threads may outlive the interpreter's end, which terminates the process


if __name__ == "__main__":
    main()
