"""Run by test_parallel, one process a rank: `parallel_worker.py RANK WORLD FILE FOLDER`; prints JSON.

A layer trains one step under DistributedDataParallel or FSDP2, and alone on the batches of all ranks.
"""

from __future__ import annotations

import copy
import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nsa_gen.rendering import import_package
from nsa_gen.verification.calls import quick_interpreter

TOKENS, WIDTH = 9, 32


def whole(x: torch.Tensor) -> torch.Tensor:
    """A parameter, put together again where ranks hold parts of it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def main() -> None:
    """Train and compare, wrapped either way."""
    rank, world, file, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    quick_interpreter()
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    print(json.dumps({kind: trained_error(kind, rank, world, folder) for kind in ("ddp", "fsdp")}), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # on a busy machine gloo's threads may outlive the interpreter's end, which terminates the process


def trained_error(kind: str, rank: int, world: int, folder: str) -> dict[str, float]:
    """How far a step's parameters are from those of the step alone, and how far they moved."""
    torch.manual_seed(0)
    layer = import_package(folder).NativeSparseAttention(WIDTH)
    alone = copy.deepcopy(layer)
    batches = torch.randn(world, 1, TOKENS, WIDTH)
    if kind == "ddp":
        wrapped = DistributedDataParallel(layer)
    else:
        wrapped = fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    wrapped(batches[rank]).square().sum().backward()
    optimiser.step()
    for batch in batches:
        (alone(batch).square().sum() / world).backward()
    torch.optim.SGD(alone.parameters(), lr=0.5).step()
    trained = [whole(x).detach() for x in layer.parameters()]
    error = max((x - y).abs().max().item() for x, y in zip(trained, alone.parameters(), strict=True))
    moved = max(y.grad.abs().max().item() for y in alone.parameters())
    sharded = sum(hasattr(x, "full_tensor") for x in layer.parameters())
    return {"error": error, "moved": moved, "sharded": sharded, "parameters": len(trained)}


if __name__ == "__main__":
    main()
