"""A small language model trained with a generated operator, eagerly and compiled, and with dense attention.

The model is Llama-like (rotary positions, RMS norms, SwiGLU), reads bytes, and learns the project's own documents and
sources. `python tools/gpu/plot_training.py REPORT FILE` draws the losses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsa_gen.rendering import import_package
from nsa_gen.spec import parse_spec
from nsa_gen.verification.report import environment
from tests.gpu.common import save, say
from tests.gpu.support import package_of

PROJECT = Path(__file__).resolve().parents[2]
SPEC = """
version: 1
name: byte_model
description: Heads of 64 for a small language model
heads: {query: 8, kv: 2}
head_dim: 64
dtype: DTYPE
compression: {block: 16, stride: 8, phi: weighted}
selection: {block: 32, count: 8, initial: 1, local: 2}
window: {size: 128}
combine: {gate: sigmoid}
"""
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
VOCABULARY = 256
WARMUP = 30
FIRST_STEPS, FIRST_TOLERANCE, CURVE_TOLERANCE = 10, 2e-3, 0.02
"""Losses of eager and compiled steps may differ by rounding: little at first, and by chaos' share later on."""

STEPS_TO_LEARN = 100
"""Fewer steps than this, as on a CPU, are compared and not expected to learn."""


@dataclass(frozen=True)
class Size:
    """How large the model and its batches are."""

    hidden: int
    layers: int
    feed_forward: int
    tokens: int
    batch: int
    steps: int


SIZES = {"cuda": Size(512, 4, 1376, 1024, 16, 300), "cpu": Size(512, 1, 64, 24, 1, 3)}


def training_job(result: dict[str, Any], *, device: str, seed: int) -> None:
    """Train the three models alike and compare their losses."""
    size = SIZES[device]
    dtype = "bfloat16" if device == "cuda" else "float32"
    module = import_package(package_of(parse_spec(SPEC.replace("DTYPE", dtype), "<byte model>")))
    text = corpus()
    compiler = "inductor" if device == "cuda" else "aot_eager"
    result.update(environment=asdict(environment(torch.device(device))), size=asdict(size), seed=seed, losses={})
    result.update(corpus_bytes=len(text), table=[], seconds={})
    kinds: dict[str, tuple[Callable[[], nn.Module], bool]] = {
        "sparse": (lambda: _sparse(module, device), False),
        "sparse, compiled": (lambda: _sparse(module, device), True),
        "dense": (lambda: DenseAttention(size.hidden, device), False),
    }
    for name, (attention, compiled) in kinds.items():
        say(f"training: {name}")
        torch.manual_seed(seed)
        model = Model(size, attention, device)
        result["parameters"] = sum(x.numel() for x in model.parameters())
        if compiled:
            for block in model.blocks:
                block.compile(fullgraph=True, backend=compiler)
        started = time.perf_counter()
        result["losses"][name] = train(model, text, size, device, getattr(torch, dtype), seed)
        result["seconds"][name] = round(time.perf_counter() - started, 1)
        save(result)
    result["comparison"] = compared(result["losses"])
    result["ok"] = result["comparison"]["ok"]
    result["table"] = _table(result)


def corpus() -> Tensor:
    """The project's documents and sources as bytes, (N,) uint8, the same in every checkout of a commit."""
    kinds = ("docs/*.md", "*.md", "nsa_gen/**/*.py", "templates/**/*.jinja", "tests/**/*.py", "tools/**/*.py")
    files = sorted({path for pattern in kinds for path in PROJECT.glob(pattern)})
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def train(model: nn.Module, text: Tensor, size: Size, device: str, dtype: torch.dtype, seed: int) -> list[float]:
    """Losses of each step; batches and their order depend on the seed alone."""
    fused = device == "cuda"
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / WARMUP, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / size.steps)))),
    )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(size.steps):
        starts = torch.randint(len(text) - size.tokens - 1, (size.batch,), generator=generator)
        rows = torch.stack([text[start : start + size.tokens + 1] for start in starts]).to(device).long()
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(rows[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def compared(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Whether eager and compiled losses are equal to rounding, and whether the sparse model learns."""
    eager, compiled = losses["sparse"], losses["sparse, compiled"]
    apart = [abs(x - y) / x for x, y in zip(eager, compiled, strict=True)]
    window = max(1, len(eager) // 10)
    curves = [
        abs(sum(eager[at : at + window]) - sum(compiled[at : at + window])) / sum(eager[at : at + window])
        for at in range(0, len(eager) - window + 1, window)
    ]
    found = {"first_steps": max(apart[:FIRST_STEPS]), "curve": max(curves), "largest": max(apart)}
    found["learns"] = sum(eager[-window:]) < sum(eager[:window])
    found["finite"] = all(math.isfinite(x) for each in losses.values() for x in each)
    equal = found["first_steps"] <= FIRST_TOLERANCE and found["curve"] <= CURVE_TOLERANCE
    learns = found["learns"] or len(eager) < STEPS_TO_LEARN
    return {**found, "ok": equal and learns and found["finite"]}


class Model(nn.Module):
    """A Llama-like model of bytes: (B, T) int64 to logits (B, T, 256)."""

    def __init__(self, size: Size, attention: Callable[[], nn.Module], device: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.hidden, device=device)
        self.blocks = nn.ModuleList(Block(size, attention(), device) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden, device=device)
        self.head = nn.Linear(size.hidden, VOCABULARY, bias=False, device=device)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte."""
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each after a norm and added to what it read."""

    def __init__(self, size: Size, attention: nn.Module, device: str) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.RMSNorm(size.hidden, device=device) for _ in range(2))
        self.up = nn.Linear(size.hidden, 2 * size.feed_forward, bias=False, device=device)
        self.down = nn.Linear(size.feed_forward, size.hidden, bias=False, device=device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, hidden) to as many."""
        hidden = hidden + self.attention(self.norms[0](hidden))
        gate, up = self.up(self.norms[1](hidden)).chunk(2, dim=-1)
        return hidden + self.down(nn.functional.silu(gate) * up)


class DenseAttention(nn.Module):
    """Causal attention of the same heads, for comparison."""

    def __init__(self, hidden: int, device: str) -> None:
        super().__init__()
        sizes = (HEADS, KV_HEADS, KV_HEADS)
        self.projections = nn.ModuleList(nn.Linear(hidden, n * HEAD_DIM, bias=False, device=device) for n in sizes)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, hidden, bias=False, device=device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, hidden) to as many."""
        q, k, v = (each(hidden).unflatten(-1, (-1, HEAD_DIM)) for each in self.projections)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        q, k, v = (x.transpose(1, 2) for x in (rotary(q, positions), rotary(k, positions), v))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).flatten(-2))


def rotary(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position encoding of x (B, T, H, D) at positions (1, T) or (B, T)."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, x.shape[-1] // 2, device=x.device)
    angles = positions[..., None, None] * frequencies
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def _sparse(module: Any, device: str) -> nn.Module:
    hidden = SIZES[device].hidden
    return module.NativeSparseAttention(hidden, rotary=rotary, device=device, dtype=torch.float32)


def _table(result: dict[str, Any]) -> list[str]:
    found = result["comparison"]
    last = {name: sum(losses[-20:]) / len(losses[-20:]) for name, losses in result["losses"].items()}
    ends = ", ".join(f"{name} {loss:.3f} ({result['seconds'][name]:.0f} s)" for name, loss in last.items())
    return [
        f"training: {result['parameters'] / 1e6:.1f}M parameters, {result['size']['steps']} steps; last losses: {ends}",
        f"  compiled beside eager: first steps {found['first_steps']:.1e} (at most {FIRST_TOLERANCE:.0e}), curve "
        f"{found['curve']:.1e} (at most {CURVE_TOLERANCE:.0e})",
    ]
