"""Warm up a learned indexer against dense attention, then train it together with the model.

    python examples/warm_up_indexer.py [STEPS]

A selection that holds every block is dense causal attention. The warm-up therefore runs the layer's parameters in the
package of a spec whose `count` holds all blocks. There the teacher of the alignment loss is dense attention, and only
the projections of the indexer learn. Afterwards the indexer selects blocks, and it learns together with the model. The
task's loss reaches only the model, and the alignment loss only the indexer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import nsa_gen
from nsa_gen.spec import parse_spec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, WIDTH, BLOCK = 1024 if DEVICE == "cuda" else 64, 32, 16
SPEC = f"""\
version: 2
name: indexed
heads: {{query: 2, kv: 1}}
head_dim: 16
dtype: float32
selection: {{block: {BLOCK}, count: 2, initial: 0, local: 1, scores: {{indexer: {{dim: 16}}}}}}
combine: {{gate: none}}
"""


def layers() -> tuple[Any, Any]:
    """A layer that selects blocks, and one with the same parameters whose selection holds every block."""
    sparse = parse_spec(SPEC)
    assert sparse.selection is not None
    every = {**sparse.selection.model_dump(), "count": TOKENS // BLOCK}
    torch.manual_seed(0)
    layer = nsa_gen.load(sparse).NativeSparseAttention(WIDTH, device=DEVICE)
    dense = nsa_gen.load(sparse.replace(name="every_block", selection=every)).NativeSparseAttention(
        WIDTH, device=DEVICE
    )
    for name, module in layer.named_children():
        setattr(dense, name, module)
    with torch.no_grad():
        layer.q_proj.weight.mul_(6.0)  # attention then prefers some tokens, as in a trained model
    return layer, dense


def texts() -> Iterator[Tensor]:
    """Hidden states (1, T, width): noise in which a few states recur."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(8, WIDTH, generator=generator)
    while True:
        chosen = states[torch.randint(8, (1, TOKENS // 4), generator=generator)].repeat_interleave(4, 1)
        yield (chosen + 0.3 * torch.randn(1, TOKENS, WIDTH, generator=generator)).to(DEVICE)


def of_indexer(layer: Any) -> list[Tensor]:
    """The parameters that the alignment loss reaches."""
    return [*layer.q_idx_proj.parameters(), *layer.k_idx_proj.parameters()]


def warm_up(dense: Any, hidden: Iterator[Tensor], steps: int) -> list[float]:
    """Train the indexer on the attention of `dense`, and return the loss of each step."""
    optimizer = torch.optim.Adam(of_indexer(dense), lr=0.02)
    losses = []
    for _ in range(steps):
        _, alignment = dense(next(hidden), return_alignment=True)
        optimizer.zero_grad()
        alignment.mean().backward()
        optimizer.step()
        losses.append(alignment.mean().item())
    return losses


def train(layer: Any, hidden: Iterator[Tensor], steps: int) -> list[tuple[float, float]]:
    """Train model and indexer together; return the task's loss and the alignment loss of each step.

    The task is to predict the next state.
    """
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.003)
    losses = []
    for _ in range(steps):
        x = next(hidden)
        out, alignment = layer(x, return_alignment=True)
        task = (out[:, :-1] - x[:, 1:]).square().mean()
        optimizer.zero_grad()
        (task + alignment.mean()).backward()
        optimizer.step()
        losses.append((task.item(), alignment.mean().item()))
    return losses


@torch.no_grad()
def aligned(dense: Any, hidden: Tensor) -> float:
    """The alignment loss of one text."""
    return dense(hidden, return_alignment=True)[1].item()


@torch.no_grad()
def captured(layer: Any, hidden: Tensor) -> float:
    """The share of dense attention's weight, over all queries, that lies in the blocks that the indexer selects."""
    op = nsa_gen.load(parse_spec(SPEC))
    q_idx, k_idx = layer.q_idx_proj(hidden)[:, :, None], layer.k_idx_proj(hidden)[:, :, None]
    indices, _ = op.select_blocks(q_idx, k_idx)
    q, k = layer.q_proj(hidden).unflatten(-1, (2, 16)), layer.k_proj(hidden)
    scores = torch.einsum("bthd,bid->bhti", q, k) / 4.0
    future = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=hidden.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1).mean(1)
    block = torch.arange(TOKENS, device=hidden.device) // BLOCK
    chosen = (indices[:, :, 0, :, None] == block).any(2)
    return (weights * chosen).sum(-1).mean().item()


def main(steps: str = "60" if DEVICE == "cuda" else "8") -> int:
    """Warm up, train, and show what the indexer has learned."""
    layer, dense = layers()
    hidden = texts()
    held_out = next(hidden)
    before = aligned(dense, held_out), captured(layer, held_out)
    warm_up(dense, hidden, int(steps))
    after = aligned(dense, held_out), captured(layer, held_out)
    print(f"held-out alignment loss {before[0]:.3f} before the warm-up, {after[0]:.3f} after")
    print(f"attention in the chosen blocks {before[1]:.1%} before, {after[1]:.1%} after")
    for task, alignment in train(layer, hidden, 2):
        print(f"together: task {task:.3f}, alignment {alignment:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
