"""Train a small llama-like model on sequences that several processes share.

    torchrun --nproc-per-node 2 examples/context_parallel.py --spec llama3_8b --tokens 65536
    python examples/context_parallel.py --ranks 2 --tokens 24 --layers 1 --steps 2  # on a CPU, in Triton's interpreter

Each rank holds a shard of every sequence and, by FSDP2, of the parameters. The task is to repeat the token a few
positions earlier. The losses are those of one process (`--ranks 1`) up to rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nsa_gen.distributed import ContextParallel, Shards

WORDS, BACK = 16, 3


class Attention(nn.Module):
    """Projections, rotary positions and gates around the operator. The keys are spread over the ranks."""

    def __init__(self, parallel: ContextParallel, width: int) -> None:
        super().__init__()
        spec = parallel.spec
        self.parallel, self.heads, self.dims = parallel, spec.heads, spec.head_dim
        self.branches = len(spec.branches)
        self.q = nn.Linear(width, spec.heads.query * spec.head_dim.qk, bias=False)
        self.k = nn.Linear(width, spec.heads.kv * spec.head_dim.qk, bias=False)
        self.v = nn.Linear(width, spec.heads.kv * spec.head_dim.v, bias=False)
        self.gates = nn.Linear(width, spec.heads.query * self.branches, bias=False)
        self.out = nn.Linear(spec.heads.query * spec.head_dim.v, width, bias=False)

    def forward(self, x: Tensor, shards: Shards, angles: Tensor) -> Tensor:
        """The output (B, rows, width) for this rank's tokens x, with the angles (rows, dim / 2) of their positions."""
        q = rotate(self.q(x).unflatten(-1, (self.heads.query, -1)), angles)
        k = rotate(self.k(x).unflatten(-1, (self.heads.kv, -1)), angles)
        v = self.v(x).unflatten(-1, (self.heads.kv, -1))
        gates = self.gates(x).unflatten(-1, (self.heads.query, self.branches))
        return self.out(self.parallel.attention(q, k, v, gates, shards=shards).flatten(2))


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each after a norm."""

    def __init__(self, parallel: ContextParallel, width: int) -> None:
        super().__init__()
        self.attention = Attention(parallel, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.up, self.gate = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, shards: Shards, angles: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), shards, angles)
        y = self.norms[1](x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Embedding, blocks and logits of this rank's tokens."""

    def __init__(self, parallel: ContextParallel, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(Block(parallel, width) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, WORDS, bias=False)
        self.half = parallel.spec.head_dim.qk // 2

    def forward(self, tokens: Tensor, shards: Shards, positions: Tensor) -> Tensor:
        """Logits (B, rows, words) of tokens (B, rows) at `positions` (rows,) of the whole sequence."""
        powers = torch.arange(self.half, device=tokens.device) / self.half
        angles = positions[:, None] * 500000.0**-powers
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, shards, angles)
        return self.head(self.norm(x))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: x (B, rows, H, D), angles (rows, D / 2)."""
    first, second = x.float().chunk(2, -1)
    sine, cosine = angles.sin()[:, None], angles.cos()[:, None]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(x.dtype)


def train(options: argparse.Namespace) -> list[float]:
    """The loss of each step, the mean over the tokens of all ranks."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("cp",))
    parallel = ContextParallel(options.spec, mesh["cp"], order=options.order, head_groups=options.head_groups)
    torch.manual_seed(0)
    dtype = getattr(torch, parallel.spec.dtype)
    model: Any = Model(parallel, options.width, options.layers).to(kind, dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.lr)
    shards = parallel.shards(options.tokens)
    positions = parallel.positions(shards, kind)
    losses = []
    for _ in range(options.steps):
        tokens = torch.randint(WORDS, (options.batch, options.tokens))
        targets = tokens.roll(BACK, 1).index_fill(1, torch.arange(BACK), -100)  # the first have no answer
        own, wanted = (parallel.shard(x, shards).to(kind) for x in (tokens, targets))
        logits = model(own, shards, positions)
        answers = options.batch * (options.tokens - BACK)
        # FSDP2 averages gradients over ranks, so multiply by `ranks` to get the sum over all tokens.
        total = functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum") / answers
        (total * dist.get_world_size()).backward()
        optimiser.step()
        optimiser.zero_grad()
        loss = total.detach()
        dist.all_reduce(loss)
        losses.append(float(loss))
    return losses


def _rank(rank: int, ranks: int, meeting: str, options: argparse.Namespace) -> None:
    """One process of several on this machine."""
    os.environ |= {"LOCAL_RANK": str(rank)}
    _run(options, init_method=f"file://{meeting}", rank=rank, world_size=ranks)


def _run(options: argparse.Namespace, **where: Any) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **where)
    losses = train(options)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, losses: " + " ".join(f"{loss:.5f}" for loss in losses), flush=True)
    dist.destroy_process_group()
    # FSDP2 keeps gloo's threads after the process group is destroyed. A thread that frees a tensor after the
    # interpreter has shut down aborts the process, so exit before that.
    os._exit(0)


def main() -> None:
    """Read the command line and train, as a process of torchrun or in `--ranks` processes on this machine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", default="tiny", help="a spec with shared keys and no learned phi (tiny)")
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, without torchrun (2)")
    parser.add_argument("--tokens", type=int, default=32, help="of a sequence, on all ranks together (32)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64, help="of the residual stream (64)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--order", default="head_tail", choices=("head_tail", "contiguous"))
    parser.add_argument("--head-groups", type=int, default=1, help="groups of heads whose gathers overlap (1)")
    options = parser.parse_args()
    if "RANK" in os.environ:
        _run(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        torch.multiprocessing.spawn(_rank, (options.ranks, meeting, options), nprocs=options.ranks)


if __name__ == "__main__":
    main()
