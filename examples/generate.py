"""Generate tokens with a small llama-like model whose attention is a generated operator with a cache.

    python examples/generate.py --spec llama3_8b --prompt 65536 --new 64 --page-size 64
    python examples/generate.py --spec tiny --prompt 40 --new 4 --chunk 16        # on a CPU, in Triton's interpreter

The weights are random, so the generated tokens are meaningless. The example shows how to use the cache. The prompt is
processed in chunks (`nsa_prefill`). Then each token is one step of all layers (`nsa_decode`). On a GPU, a step is a
captured graph.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import nsa_gen


class Attention(nn.Module):
    """Projections, rotary positions and gates around the operator `op`, for one layer of a cache."""

    def __init__(self, op: Any, width: int, layer: int) -> None:
        super().__init__()
        heads, dims = op.SPEC["heads"], op.SPEC["head_dim"]
        self.op, self.layer = op, layer
        self.query_heads, self.kv_heads, self.dim = heads["query"], heads["kv"], dims["qk"]
        self.branches = sum(op.SPEC[name] is not None for name in ("compression", "selection", "window"))
        self.q = nn.Linear(width, self.query_heads * dims["qk"], bias=False)
        self.k = nn.Linear(width, self.kv_heads * dims["qk"], bias=False)
        self.v = nn.Linear(width, self.kv_heads * dims["v"], bias=False)
        self.gates = nn.Linear(width, self.query_heads * self.branches, bias=False)
        self.out = nn.Linear(self.query_heads * dims["v"], width, bias=False)

    def forward(self, x: Tensor, cache: Any, angles: Tensor, prompt: bool) -> Tensor:
        """Attention output (B, N, width) of x, the tokens that the cache has made room for; angles (B, N, dim / 2)."""
        lead = x.shape[:2]
        q = rotate(self.q(x).view(*lead, self.query_heads, -1), angles)
        k = rotate(self.k(x).view(*lead, self.kv_heads, -1), angles)
        v = self.v(x).view(*lead, self.kv_heads, -1)
        gates = self.gates(x).view(*lead, self.query_heads, self.branches)
        cache.write(k, v, layer=self.layer)
        attend = self.op.nsa_prefill if prompt else self.op.nsa_decode
        return self.out(attend(q, cache, gates, layer=self.layer).flatten(2))


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each after a norm."""

    def __init__(self, op: Any, width: int, layer: int) -> None:
        super().__init__()
        self.attention = Attention(op, width, layer)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.up, self.gate = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, cache: Any, angles: Tensor, prompt: bool) -> Tensor:
        x = x + self.attention(self.norms[0](x), cache, angles, prompt)
        y = self.norms[1](x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Embedding, blocks and logits of the last token."""

    def __init__(self, op: Any, width: int, layers: int, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(op, width, layer) for layer in range(layers))
        self.norm = nn.RMSNorm(width)
        half = torch.arange(op.SPEC["head_dim"]["qk"] // 2, dtype=torch.float32)
        self.register_buffer("frequencies", 500000.0 ** (-half / len(half)), persistent=False)

    def forward(self, tokens: Tensor, cache: Any, prompt: bool = False) -> Tensor:
        """Logits (B, words) after tokens (B, N), the newest of the cache. Positions are read on the device."""
        positions = cache.starts[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        angles = positions[..., None] * self.frequencies.float()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cache, angles, prompt)
        return self.norm(x[:, -1]) @ self.embedding.weight.T


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: x (B, N, H, D), angles (B, N, D / 2)."""
    first, second = x.float().chunk(2, -1)
    sine, cosine = angles.sin()[:, :, None], angles.cos()[:, :, None]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(x.dtype)


@torch.no_grad()
def generate(model: Model, cache: Any, prompt: Tensor, new: int, chunk: int) -> tuple[Tensor, float, float]:
    """Greedily generated tokens (B, new), the seconds for the prompt, and those for all tokens after the first."""
    started = time.perf_counter()
    logits = None
    for part in prompt.split(chunk, 1):
        cache.extend(part.shape[1])
        logits = model(part, cache, prompt=True)
    token = logits.argmax(-1, keepdim=True)
    found = [token.clone()]
    halfway = _now(prompt.device)

    def step() -> None:
        cache.extend(1)
        token.copy_(model(token, cache).argmax(-1, keepdim=True))

    graph = None
    for number in range(new - 1):
        if prompt.is_cuda and number == 1:  # the first step has compiled the kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        if graph is None:
            step()
        else:
            cache.reserve(1)
            graph.replay()
        found.append(token.clone())
    return torch.cat(found, 1), halfway - started, _now(prompt.device) - halfway


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Read the command line, generate, and print the tokens and the times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", default="tiny", help="a spec with a decode pass, shared keys and no learned phi")
    parser.add_argument("--prompt", type=int, default=40, help="tokens of the prompt (40)")
    parser.add_argument("--new", type=int, default=4, help="tokens to generate (4)")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of the prompt that go in at a time (8192)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64, help="of the residual stream (64)")
    parser.add_argument("--page-size", type=int, help="tokens of a page; a contiguous cache if left out")
    options = parser.parse_args()
    op = nsa_gen.load(options.spec)
    if not hasattr(op, "NSACache"):
        parser.error(f"--spec: expected one whose passes have decode, got {options.spec}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Model(op, options.width, options.layers, words=512).to(device, getattr(torch, op.SPEC["dtype"]))
    cache = op.NSACache(
        options.batch,
        options.prompt + options.new,
        layers=options.layers,
        page_size=options.page_size,
        device=device,
    )
    prompt = torch.randint(512, (options.batch, options.prompt), device=device)
    found, before, after = generate(model, cache, prompt, options.new, options.chunk)
    each = 1e3 * after / max(1, options.new - 1)
    print(f"generated: {found.tolist()}")
    print(f"{options.prompt} tokens of prompt in {before:.2f} s, then {each:.2f} ms a token")


if __name__ == "__main__":
    main()
