"""A llama-like decoder over bytes whose attention is dense, a generated operator, or its dense reference."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import nsa_gen
from examples.convert import dense
from examples.generate import rotate as turn
from nsa_gen.spec import Spec, load_spec
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.oracle import reference_attention

WORDS, BASE = 256, 10000.0
Mode = Literal["dense", "operator", "reference"]


@dataclass(frozen=True)
class Choice:
    """An attention: dense with the heads of a spec, the spec's operator, or its formulas in plain torch."""

    mode: Mode
    spec: Spec

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Parse `dense`, `dense:SPEC`, `reference:SPEC` or SPEC: a shipped spec's name or a file (default: tiny).

        Raises SpecError if the spec is wrong, and ValueError if a layer cannot use it.
        """
        mode, _, name = text.partition(":") if text.split(":")[0] in get_args(Mode) else ("operator", "", text)
        spec = load_spec(name or "tiny")
        if spec.dtype == "float16":
            raise ValueError(f"attention: expected a spec of bfloat16 or float32, got {name}, of float16")
        external = spec.compression is not None and spec.compression.phi.key == "external"
        if external or (spec.selection is not None and spec.selection.indices == "input"):
            given = "compressed keys" if external else "indices"
            raise ValueError(f"attention: expected a spec that computes all it needs, got {name}, which takes {given}")
        return cls(mode, spec)


class Operator:
    """The `nsa_attention` of a layer: its package's, or the reference. Keeps the selected blocks if `keep` is set."""

    def __init__(self, op: Any, spec: Spec, mode: Mode) -> None:
        self.op, self.keep, self.indices = op, False, None
        self.parameters = OracleParameters.from_spec(spec) if mode == "reference" else None

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        if self.parameters is not None:
            own = {name: x for name, x in named.items() if name not in ("recompute", "workspace_bytes")}
            result = reference_attention(self.parameters, *given, **own)
            self.indices = result.indices if self.keep else None
            return result.o
        if not self.keep:
            return self.op.nsa_attention(*given, **named)
        o, found = self.op.nsa_attention(*given, **named, return_aux=True)
        self.indices = getattr(found, "indices", None)
        return o


def sparse_layer(choice: Choice, width: int) -> nn.Module:
    """A package's `NativeSparseAttention` that calls an `Operator`, in float32 for autocast to the spec's dtype.

    Its forward is the package's own, with the name `nsa_attention` bound to the Operator. Projections, gates, phi and
    caches are therefore those of the package, and the operator and the reference share checkpoints.
    """
    op = nsa_gen.load(choice.spec)
    layer = op.NativeSparseAttention(width, rotary=rotate, dtype=torch.float32)
    layer.operator = Operator(op, choice.spec, choice.mode)
    forward = type(layer).forward
    own = FunctionType(forward.__code__, {**forward.__globals__, "nsa_attention": layer.operator})
    own.__kwdefaults__ = forward.__kwdefaults__
    layer.forward = MethodType(own, layer)
    return layer


class DenseAttention(nn.Module):
    """Causal attention to all keys, with the heads of a spec."""

    def __init__(self, spec: Spec, width: int) -> None:
        super().__init__()
        self.dims, self.scale = spec.head_dim, spec.scale_value
        self.q_proj = nn.Linear(width, spec.heads.query * spec.head_dim.qk, bias=False)
        self.k_proj = nn.Linear(width, spec.heads.kv * spec.head_dim.qk, bias=False)
        self.v_proj = nn.Linear(width, spec.heads.kv * spec.head_dim.v, bias=False)
        self.o_proj = nn.Linear(spec.heads.query * spec.head_dim.v, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        q = rotate(self.q_proj(hidden).unflatten(-1, (-1, self.dims.qk)), positions)
        k = rotate(self.k_proj(hidden).unflatten(-1, (-1, self.dims.qk)), positions)
        v = self.v_proj(hidden).unflatten(-1, (-1, self.dims.v))
        return self.o_proj(dense(q, k, v, self.scale).flatten(-2))


class Block(nn.Module):
    """Attention and SwiGLU, each after a norm."""

    def __init__(self, choice: Choice, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.up, self.gate = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)
        self.attention = DenseAttention(choice.spec, width) if choice.mode == "dense" else sparse_layer(choice, width)

    def forward(self, x: Tensor, cached: dict[str, Any]) -> Tensor:
        x = x + self.attention(self.norms[0](x), **cached)
        y = self.norms[1](x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Embedding, blocks and logits.

    Parameters that attentions have in common start with equal values, which depend only on the seed and their names.
    """

    def __init__(self, choice: Choice, width: int, layers: int, seed: int = 0, recompute: bool = False) -> None:
        super().__init__()
        self.choice, self.recompute = choice, recompute
        torch.manual_seed(seed)  # for phi's parameters
        self.embedding = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(Block(choice, width) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, WORDS, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "gate_proj" not in name and "phi_" not in name:
                draw = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                ends = name.endswith(("down.weight", "o_proj.weight"))
                deep = (2 * layers) ** -0.5 if ends else 0.1 if name.startswith("head") else 1.0
                std = 1.0 if name.startswith("embedding") else deep * parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std, generator=draw)

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Logits (B, T, 256) of tokens (B, T). With a package's cache, they follow the tokens that it holds."""
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            cached = {} if cache is None else {"cache": cache, "layer": layer}
            if self.recompute and self.training:
                x = checkpoint(block, x, cached, use_reentrant=False)
            else:
                x = block(x, cached)
        return self.head(self.norm(x))

    def operators(self) -> list[Operator]:
        """The operator of each layer; empty if attention is dense."""
        return [block.attention.operator for block in self.blocks if hasattr(block.attention, "operator")]


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions: x (B, T, H, D), positions (1 or B, T)."""
    half = x.shape[-1] // 2
    return turn(x, positions[..., None] * BASE ** -(torch.arange(half, device=x.device) / half))


def autocast(choice: Choice, device: torch.device, cached: bool = True) -> torch.autocast:
    """Autocast with products in bfloat16 if that is the spec's dtype and there is a GPU; otherwise float32.

    `cached` keeps the rounded weights until the autocast block ends. A CUDA graph must not use it.
    """
    lower = choice.spec.dtype == "bfloat16" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=lower, cache_enabled=cached)
