"""Compare context parallelism with one GPU: times and results of the operator's forward and backward on this machine.

    python tools/gpu/context_parallel.py --spec llama3_8b --ranks 2 --tokens 65536,262144 --out ranks.json

Every rank first computes the whole sequence alone, then its part of it together with the others. For each length, the
tool prints and writes the median seconds of both, the most memory that a rank allocates (including inputs), the
differences of its rows relative to the largest number, and how many rows have other blocks. Exit status 1 if a
difference is larger than rounding explains.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import nsa_gen
from nsa_gen.bench.inputs import draw_inputs
from nsa_gen.distributed import ContextParallel
from nsa_gen.machine import machine

ROUNDINGS = 8
"""Allowed difference in roundings of the inputs' dtype: of branches, of each rank's part of a gradient, and of sums."""


def timed(call: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, float]:
    """Median seconds and peak bytes of a call that every rank makes. The first call, which compiles, is not timed."""
    call()
    seconds, gpu = [], device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        if gpu:
            torch.cuda.synchronize(device)
        dist.barrier()
        begun = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), torch.cuda.max_memory_allocated(device) if gpu else 0.0


def compared(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Differences relative to the largest expected number; for indices, the share of rows that differ."""
    result = {}
    for name, x in found.items():
        y = wanted[name]
        if name == "indices":
            result[name] = float((x.cpu() != y).any(-1).float().mean())
        else:
            result[name] = float((x.cpu().float() - y.float()).abs().max() / y.float().abs().max())
    return result


def measured(options: argparse.Namespace, tokens: int, device: torch.device) -> dict[str, Any]:
    """Measure one length, alone and together."""
    op = nsa_gen.load(options.spec)
    parallel = ContextParallel(op, order=options.order, head_groups=options.head_groups, reduction=options.reduction)
    inputs = draw_inputs(parallel.spec, tokens, device=device)
    tensors = {name: x for name, x in inputs.arguments().items() if isinstance(x, Tensor)}
    compression = inputs.arguments().get("compression")
    phi = None if compression is None else op.CompressionParameters(**compression)
    shards = parallel.shards(tokens)
    selects = "indices" in op.Auxiliary._fields

    def step(attend: Any, arguments: dict[str, Tensor], do: Tensor, **more: Any) -> dict[str, Tensor]:
        leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in arguments.items()}
        others = {name: x for name, x in leaves.items() if name not in ("q", "k", "v")} | more
        if phi is not None:
            others["compression"] = phi
        o = attend(leaves["q"], leaves["k"], leaves["v"], **others)
        o, auxiliary = o if more.get("return_aux") else (o, None)
        o.backward(do)
        found = {"o": o.detach(), **{f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}}
        return found | ({"indices": auxiliary.indices} if auxiliary is not None and selects else {})

    wanted = step(op.nsa_attention, tensors, inputs.do, return_aux=True)
    wanted = {name: parallel.shard(x, shards).cpu() for name, x in wanted.items()}
    one = timed(partial(step, op.nsa_attention, tensors, inputs.do), options.repeats, device)
    own = {name: parallel.shard(x, shards).clone() for name, x in tensors.items()}
    do = parallel.shard(inputs.do, shards).clone()
    del inputs, tensors
    errors = compared(step(parallel.attention, own, do, shards=shards, return_aux=True), wanted)
    several = timed(lambda: step(parallel.attention, own, do, shards=shards), options.repeats, device)
    worst = torch.tensor(list(errors.values()), device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    figures = torch.tensor([*one, *several], dtype=torch.float64, device=device)
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    alone, alone_bytes, together, together_bytes = figures.tolist()
    return {
        "tokens": tokens,
        "seconds": {"alone": alone, "ranks": together},
        "speedup": alone / together,
        "bytes": {"alone": alone_bytes, "ranks": together_bytes},
        "memory": together_bytes / alone_bytes if alone_bytes else None,
        "errors": dict(zip(errors, worst.tolist(), strict=True)),
    }


def _rank(rank: int, meeting: str, options: argparse.Namespace) -> None:
    """Run one rank, on its own GPU."""
    gpu = options.device == "cuda"
    device = torch.device(f"cuda:{rank}" if gpu else "cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpu else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.ranks
    )
    rows = []
    for tokens in map(int, options.tokens.split(",")):
        rows.append(measured(options, tokens, device))
        if rank == 0:
            print(json.dumps(rows[-1]), flush=True)
    if rank == 0:
        dtype = getattr(torch, nsa_gen.load(options.spec).SPEC["dtype"])
        described = {"machine": machine(), "device": options.device, "spec": options.spec, "ranks": options.ranks}
        described |= {"order": options.order, "head_groups": options.head_groups, "reduction": options.reduction}
        bound = ROUNDINGS * torch.finfo(dtype).eps
        ok = all(error <= bound for row in rows for key, error in row["errors"].items() if key != "indices")
        options.out.write_text(json.dumps({**described, "bound": bound, "ok": ok, "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


def main() -> None:
    """Read the command line, start the ranks, and report whether everything is within its bounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", default="llama3_8b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", default="65536,262144", help="lengths, by commas")
    parser.add_argument("--order", default="head_tail", choices=("head_tail", "contiguous"))
    parser.add_argument("--head-groups", type=int, default=1)
    parser.add_argument("--reduction", default="exchange", choices=("exchange", "reduce_scatter"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: with TRITON_INTERPRET=1")
    parser.add_argument("--out", type=Path, default=Path("ranks.json"))
    options = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast needs rights that containers often lack
    with tempfile.TemporaryDirectory() as folder:
        arguments = str(Path(folder) / "meeting"), options
        torch.multiprocessing.spawn(_rank, arguments, nprocs=options.ranks)
    sys.exit(0 if json.loads(options.out.read_text())["ok"] else 1)


if __name__ == "__main__":
    main()
