"""A small model of the parts that the transformers library's Llama-like classes have, for tests without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import Operator, operator_of

WIDTH, TOKENS = 32, 12


class Rotary(nn.Module):
    """Cosines and sines of the first `dims` dims of a head."""

    def __init__(self, dims: int = 16) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None] / 100.0 ** torch.linspace(0, 1, self.dims // 2, device=x.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 + torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


class Attention(nn.Module):
    """Dense causal attention with the parts and the call of LlamaAttention: two query heads on one KV head of 16.

    `norm` is "head" (as in Qwen3), "whole" (OLMo 2), "late" (after the rotary embedding) or nothing; `interleaved`
    turns neighbouring dims (as in GLM), `sinks` adds a key of no value.
    """

    def __init__(
        self, *, norm: str = "", bias: bool = False, interleaved: bool = False, sinks: bool = False, **settings: Any
    ) -> None:
        super().__init__()
        self.head_dim, self.scaling, self.attention_dropout, self.use_rope = 16, 0.25, 0.0, True
        self.q_proj, self.o_proj = nn.Linear(WIDTH, 32, bias=bias), nn.Linear(32, WIDTH, bias=bias)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, 16, bias=bias), nn.Linear(WIDTH, 16, bias=bias)
        if norm:
            self.q_norm, self.k_norm = RMSNorm(32 if norm == "whole" else 16), RMSNorm(16)
        if sinks:
            self.sinks = nn.Parameter(torch.zeros(2))
        self._norm, self._interleaved = norm, interleaved
        for name, value in settings.items():
            setattr(self, name, value)

    def rotated(self, x: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (y.unsqueeze(2) for y in embeddings)
        turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
        if self._interleaved:
            cos, sin = (y[..., : y.shape[-1] // 2].repeat_interleave(2, dim=-1) for y in (cos, sin))
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            other = torch.cat((-second, first), dim=-1)
        return torch.cat((turned * cos + other * sin, rest), dim=-1)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> tuple[Any, None]:
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self._norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, 16)) for x in (q, k, v))
        if self._norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.use_rope:
            q, k = self.rotated(q, position_embeddings), self.rotated(k, position_embeddings)
        if self._norm == "late":
            q, k = self.q_norm(q), self.k_norm(k)
        scores = self.scaling * torch.einsum("bihd,bjd->bhij", q, k[:, :, 0])
        tokens = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        if hasattr(self, "sinks"):
            scores = torch.cat((scores, self.sinks[:, None, None].expand(len(scores), 2, tokens, 1)), dim=-1)
        o = torch.einsum("bhij,bjd->bihd", scores.softmax(-1)[..., :tokens], v[:, :, 0])
        return self.o_proj(o.flatten(-2)), None


class Model(nn.Module):
    """Two layers of `Attention`, made with `changes`; those of `last` are the second layer's alone."""

    def __init__(self, *, rotary: int = 16, last: dict[str, Any] | None = None, **changes: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.model = nn.Module()
        several = (changes, {**changes, **(last or {})})
        self.model.layers = nn.ModuleList(nn.ModuleDict({"self_attn": Attention(**each)}) for each in several)
        self.model.rotary_emb = Rotary(rotary)

    def forward(self, hidden: Tensor, positions: Tensor | None = None, **more: Any) -> Tensor:
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        embeddings = self.model.rotary_emb(hidden, positions)
        for layer in self.model.layers:
            hidden = hidden + layer.self_attn(hidden_states=hidden, position_embeddings=embeddings, **more)[0]
        return hidden


def whole_window(**changes: Any) -> Operator:
    """A window longer than the sequences: dense causal attention."""
    return operator_of("win", gate="none", window=64, **changes)
