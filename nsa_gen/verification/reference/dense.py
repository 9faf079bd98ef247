"""The pieces of the dense oracle: the semantics page, section by section, in plain PyTorch with dense masks.

Slow, memory-hungry and obviously correct. It needs only torch and the standard library, so a fault in lowering, in a
template or in a kernel cannot affect it. float64 and float32 inputs are computed in their own precision. bfloat16 and
float16 inputs give the *baseline*: the same computation in plain PyTorch at that dtype (products in the dtype; softmax,
lse and importance in float32; probabilities are rounded to the dtype before they are multiplied with the values). A
kernel's error is compared with the error of that baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Phi = Literal["mean", "weighted", "linear", "mlp", "external"]


@dataclass(frozen=True)
class OracleParameters:
    """What the oracle needs to know of a spec. A branch is present if its block (or window) is not None.

    Without `compression_output`, compressed keys only select blocks, and there is no compressed branch. `sinks` are the
    branches whose softmax has a sink. With `joint`, selection and window are one branch of this name. With `aligned`,
    the operator has the indexer's loss.
    """

    query_heads: int
    kv_heads: int
    head_dim_qk: int
    head_dim_v: int
    scale: float
    shared_kv: bool = True
    compression_block: int | None = None
    compression_stride: int | None = None
    phi_key: Phi = "mean"
    phi_value: Phi = "mean"
    position_key: bool = False
    position_value: bool = False
    compression_output: bool = True
    selection_block: int | None = None
    selection_count: int = 0
    initial: int = 0
    local: int = 0
    indices_given: bool = False
    scores: Literal["compression", "mean", "indexer"] = "compression"
    index_dim: int = 0
    aligned: bool = False
    pool: Literal["sum", "max"] = "sum"
    scope: Literal["group", "head", "all"] = "group"
    window: int | None = None
    sinks: tuple[str, ...] = ()
    joint: bool = False
    gate: Literal["sigmoid", "given", "none"] = "sigmoid"
    tf32: bool = False

    @classmethod
    def from_spec(cls, spec: Any) -> OracleParameters:
        """Read the parameters from a spec (any object with the fields of `nsa_gen.spec.Spec`)."""
        compression, selection, window = spec.compression, spec.selection, spec.window
        joint = bool(spec.combine.joint)
        sunk = {"joint": spec.combine} if joint else {"slc": selection, "win": window}
        found: dict[str, Any] = {}
        if compression is not None:
            found |= {
                "compression_block": compression.block,
                "compression_stride": compression.stride,
                "phi_key": compression.phi.key,
                "phi_value": compression.phi.value,
                "position_key": compression.position.key == "learned",
                "position_value": compression.position.value == "learned",
                "compression_output": compression.output,
            }
        if selection is not None:
            given = selection.indices == "input"
            found |= {
                "selection_block": selection.block,
                "selection_count": selection.count,
                "initial": 0 if given else selection.initial,
                "local": 0 if given else selection.local,
                "indices_given": given,
                "scores": "indexer" if selection.index_dim else selection.scores,
                "index_dim": selection.index_dim,
                "aligned": selection.index_dim > 0 and "backward" in spec.passes,
                "pool": selection.pool,
                "scope": selection.scope,
            }
        return cls(
            query_heads=spec.heads.query,
            kv_heads=spec.heads.kv,
            head_dim_qk=spec.head_dim.qk,
            head_dim_v=spec.head_dim.v,
            scale=spec.head_dim.qk**-0.5 if spec.scale == "auto" else float(spec.scale),
            shared_kv=spec.kv == "shared",
            window=None if window is None else window.size,
            sinks=tuple(name for name, each in sunk.items() if each is not None and each.sink == "learned"),
            joint=joint,
            gate=spec.combine.gate,
            tf32=spec.dtype == "float32" and spec.fp32_precision == "tf32",
            **found,
        )

    @property
    def group(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.query_heads // self.kv_heads

    @property
    def scopes(self) -> int:
        """The number of selections per token (S)."""
        return {"group": self.kv_heads, "head": self.query_heads, "all": 1}[self.scope]

    @property
    def computed(self) -> bool:
        """Whether the operator selects the blocks itself."""
        return self.selection_block is not None and not self.indices_given

    @property
    def external(self) -> bool:
        """Whether the caller passes compressed keys and, if they have an output, values."""
        return self.compression_block is not None and self.phi_key == "external"

    @property
    def scorer_alone(self) -> bool:
        """Whether compressed keys have no values and only select blocks."""
        return self.compression_block is not None and not self.compression_output

    @property
    def selecting(self) -> str:
        """The branch that attends to selected blocks, if one does."""
        return "joint" if self.joint else "slc"

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches present, in the order of the gates."""
        compressed = self.compression_block if self.compression_output else None
        present = {"cmp": compressed}
        present |= {"joint": self.window} if self.joint else {"slc": self.selection_block, "win": self.window}
        return tuple(name for name, size in present.items() if size is not None)

    def compressed_blocks(self, tokens: int) -> int:
        """Nc(tokens): the number of complete compression blocks among the first `tokens` positions."""
        if self.compression_block is None or self.compression_stride is None:
            return 0
        return max(0, (tokens - self.compression_block) // self.compression_stride + 1)

    def selection_blocks(self, tokens: int) -> int:
        """The number of selection blocks of `tokens` positions, the ragged tail included."""
        return 0 if self.selection_block is None else -(-tokens // self.selection_block)

    def for_one_kv_head(self) -> OracleParameters:
        """The same operator with a single KV head and its group."""
        return replace(self, query_heads=self.group, kv_heads=1)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, lse and importance for inputs of `dtype`: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_to_tf32(x: Tensor) -> Tensor:
    """Round float32 to the 10 mantissa bits that a tensor core keeps of a TF32 operand (nearest, ties away from 0)."""
    rounded = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x)


class _Tf32Product(torch.autograd.Function):
    """A batched product of TF32 operands, in the backward pass too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return round_to_tf32(a) @ round_to_tf32(b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        g = round_to_tf32(gradients[0])
        return g @ round_to_tf32(b).transpose(-1, -2), round_to_tf32(a).transpose(-1, -2) @ g


def _product(a: Tensor, b: Tensor, tf32: bool) -> Tensor:
    return _Tf32Product.apply(a, b) if tf32 and a.dtype == torch.float32 else a @ b


# Section 1: compression


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, with the error function."""
    return functional.gelu(x, approximate="none")


def _phi(
    p: OracleParameters, side: str, x: Tensor, learned: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """phi of keys or values: x (T, H, D) -> (Nc, H, D)."""
    block, stride = p.compression_block, p.compression_stride
    assert block is not None and stride is not None
    kind, position = (p.phi_key, p.position_key) if side == "key" else (p.phi_value, p.position_value)
    tokens, heads, dim = x.shape
    blocks = x.new_empty(0, heads, block, dim)
    if tokens >= block:
        blocks = x.unfold(0, block, stride).permute(0, 1, 3, 2)  # (Nc, H, l, D)
    if position:
        blocks = blocks + learned[f"{side}_position"]
    if kind == "mean":
        return blocks.mean(2)
    if kind == "weighted":
        return (blocks * learned[f"{side}_weight"][..., None]).sum(2)
    flat = blocks.flatten(2).transpose(0, 1)  # (H, Nc, l * D)
    if kind == "linear":
        out = _product(flat, learned[f"{side}_weight"], p.tf32)
    else:
        hidden = activation(_product(flat, learned[f"{side}_weight_in"], p.tf32))
        out = _product(hidden, learned[f"{side}_weight_out"], p.tf32)
    return out.transpose(0, 1)


def compress(
    p: OracleParameters,
    k: Tensor,
    v: Tensor,
    learned: Mapping[str, Tensor] | None,
    activation: Callable[[Tensor], Tensor] = gelu,
) -> tuple[Tensor, Tensor]:
    """K_cmp (Nc, Hkv, Dk) and V_cmp (Nc, Hkv, Dv) of one sequence's k (T, Hkv, Dk) and v (T, Hkv, Dv)."""
    return _phi(p, "key", k, learned or {}, activation), _phi(p, "value", v, learned or {}, activation)


def overlap_weights(p: OracleParameters, compressed: int, blocks: int) -> Tensor:
    """Eq. 9's weights |B_i intersect S_j| / d, (compressed, blocks) float64, counted position by position."""
    block, stride, selection = p.compression_block, p.compression_stride, p.selection_block
    assert block is not None and stride is not None and selection is not None
    position = torch.arange(compressed)[:, None] * stride + torch.arange(block)
    weights = torch.zeros(compressed, blocks, dtype=torch.float64)
    return weights.scatter_add_(1, position // selection, torch.full(position.shape, 1.0 / stride, dtype=weights.dtype))


# Sections 2, 4, 5: one attention under a mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, tf32: bool = False, sink: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention under a dense mask.

    q (H, G, R, Dk), k (H, K, Dk), v (H, K, Dv), visible (H or 1, G or 1, R, K) bool. Returns o (H, G, R, Dv) in q's
    dtype, lse (H, G, R) and the probabilities (H, G, R, K); the latter two are exact, and lse is detached. A row that
    sees nothing has o = 0, lse = -inf and zero gradients. Keys that a row does not see cannot affect it, even if NaN or
    inf.

    `sink` (H, G) is the unscaled logit of one more key of every row, with value 0. The probabilities of a row do not
    include it and sum to less than 1. A row that sees nothing has the sink as its lse.
    """
    heads, group, rows, dim = q.shape
    keys = k.shape[1]
    unseen = ~visible
    blind = unseen.all(-1, keepdim=True)
    scores = _product(q.reshape(heads, group * rows, dim), k.transpose(1, 2), tf32).view(heads, group, rows, keys)
    scores = scores.to(exact_dtype(q.dtype)) * scale
    scores = scores.masked_fill(unseen, -math.inf)
    if sink is not None:
        logit = sink.to(scores.dtype)[:, :, None, None].expand(heads, group, rows, 1)
        scores = torch.cat((scores, logit), -1)
        blind = blind & (logit == -math.inf)
    scores = scores.masked_fill(blind, 0.0)
    lse = torch.logsumexp(scores.detach(), -1).masked_fill(blind[..., 0], -math.inf)
    probabilities = torch.softmax(scores, -1)[..., :keys].masked_fill(unseen, 0.0)
    rounded = probabilities.to(q.dtype).reshape(heads, group * rows, keys)

    # 0 * NaN is NaN, so values that are not finite are added separately, only where they are visible.
    bad = ~torch.isfinite(v).all(-1)
    o = _product(rounded, v.masked_fill(bad[..., None], 0.0), tf32).view(heads, group, rows, v.shape[-1])
    for head, key in bad.nonzero().tolist():
        seen = visible[head % visible.shape[0], :, :, key]
        term = probabilities[head, :, :, key, None].to(q.dtype) * v[head, key]
        extra = torch.zeros_like(o)
        extra[head] = torch.where(seen[..., None], term, torch.zeros_like(term))
        o = o + extra
    return o, lse, probabilities


def visible_compressed(p: OracleParameters, t: Tensor, blocks: int) -> Tensor:
    """(1, 1, R, blocks): compressed block i is visible iff its last raw position is not in the future of t (R,)."""
    assert p.compression_block is not None and p.compression_stride is not None
    last = torch.arange(blocks, device=t.device) * p.compression_stride + p.compression_block - 1
    return (last <= t[:, None])[None, None]


def visible_window(p: OracleParameters, t: Tensor, tokens: int) -> Tensor:
    """(1, 1, R, tokens): the window's keys, exactly `window` of them once t >= window - 1."""
    assert p.window is not None
    key = torch.arange(tokens, device=t.device)
    return ((key <= t[:, None]) & (key > t[:, None] - p.window))[None, None]


def visible_selected(p: OracleParameters, t: Tensor, tokens: int, indices: Tensor, counts: Tensor | None) -> Tensor:
    """(H or 1, G or 1, R, tokens): keys of the selected blocks of indices (R, S, n), causal, for each scope's heads.

    Invalid and surplus slots are ignored.
    """
    assert p.selection_block is not None
    own = (t // p.selection_block)[:, None, None]
    used = (indices >= 0) & (indices <= own)
    if counts is not None:
        used &= torch.arange(indices.shape[-1], device=t.device) < counts[..., None]
    chosen = torch.zeros(*indices.shape[:2], p.selection_blocks(tokens) + 1, dtype=torch.bool, device=t.device)
    unused_slot = chosen.shape[-1] - 1
    chosen.scatter_(-1, torch.where(used, indices, unused_slot).long(), True)
    key = torch.arange(tokens, device=t.device)
    seen = chosen[..., key // p.selection_block].transpose(0, 1) & (key <= t[:, None])  # (S, R, tokens)
    return seen.unflatten(0, (p.kv_heads, p.group)) if p.scope == "head" else seen[:, None]


# Section 2 (Eq. 9, 10) and section 3


def over_scope(p: OracleParameters, by_head: Tensor) -> Tensor:
    """Eq. 10's sum over the heads of each scope: (H, G, ...) -> (S, ...)."""
    return by_head.flatten(0, 1).unflatten(0, (p.scopes, -1)).sum(1)


def block_importance(p: OracleParameters, probabilities: Tensor, blocks: int) -> Tensor:
    """imp (R, S, blocks) of probabilities (H, G, R, Nc): the sum over a scope (Eq. 10), then over overlapping blocks.

    The latter is Eq. 9's sum, weighted by the overlap. With pool: max it is the largest of them, or 0 without any.
    """
    return _pooled(p, over_scope(p, probabilities.detach()), blocks, None)


def _pooled(p: OracleParameters, summed: Tensor, blocks: int, factors: Tensor | None) -> Tensor:
    """(R, S, blocks) of summed probabilities (S, R, Nc). `factors` (Nc, blocks) are additional weights of the terms."""
    weights = overlap_weights(p, summed.shape[-1], blocks).to(summed)
    unknown = torch.isnan(summed)
    known = summed.masked_fill(unknown, 0.0)
    reached = (unknown.to(summed) @ weights) > 0
    factors = torch.ones_like(weights) if factors is None else factors
    if p.pool == "sum":
        found = known @ (weights * factors)
    else:
        found = known.new_zeros(*known.shape[:-1], blocks)
        for block in range(blocks):
            over = weights[:, block] > 0
            if over.any():
                best = known[..., over].max(-1)
                found[..., block] = best.values * factors[over, block][best.indices]
    return found.masked_fill(reached, math.nan).transpose(0, 1)


def block_fingerprint(p: OracleParameters, probabilities: Tensor, blocks: int) -> Tensor:
    """(R, S, blocks) of probabilities (H, G, R, Nc): Eq. 9 and 10 with each term multiplied by a factor of its place.

    NaN where importance is NaN. Blocks of equal importance have equal fingerprints if the same head gives the same
    probability to the same place of both, and practically never otherwise. Equal sums of different terms may round
    differently.
    """
    heads = torch.arange(p.query_heads, dtype=torch.float64).to(probabilities)
    factors = (1.0 + (heads * math.pi) % 1.0).view(p.kv_heads, p.group, 1, 1)
    summed = over_scope(p, probabilities.detach() * factors)
    assert p.selection_block is not None and p.compression_block is not None and p.compression_stride is not None
    compressed = torch.arange(summed.shape[-1], dtype=summed.dtype, device=summed.device)[:, None]
    ratio = p.selection_block // p.compression_stride
    starts = torch.arange(blocks, dtype=summed.dtype, device=summed.device) * ratio
    places = compressed - starts + p.compression_block // p.compression_stride
    return _pooled(p, summed, blocks, 1.0 + (places * math.e) % 1.0)


def mean_scores(p: OracleParameters, q: Tensor, k: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores by mean keys, their magnitudes and fingerprints, all (R, S, blocks), exact and detached.

    q (H, G, R, Dk), k (tokens, H, Dk). score = sum over the heads of a scope of scale * q . mean(k of the block's
    tokens), with the mean over the tokens that exist. The rounding of a score is relative to the magnitude, the sum of
    the terms' absolute values. The fingerprint weighs each term by its place, as in `block_fingerprint`. Blocks that a
    row must not see are included but never ranked: `select_blocks` only ranks the blocks before its own.
    """
    assert p.selection_block is not None
    exact = exact_dtype(q.dtype)
    q, k = q.detach().to(exact), k.detach().to(exact)
    heads, group, _, dim = q.shape
    pieces = k.split(p.selection_block)[:blocks]  # of no tokens, split makes one piece
    places = 1.0 + (torch.arange(p.selection_block, dtype=torch.float64) * math.e) % 1.0
    terms = 1.0 + (torch.arange(heads * group * dim, dtype=torch.float64).view(heads, group, 1, dim) * math.pi) % 1.0
    places, terms = places.to(k)[:, None, None], terms.to(q)
    found = []
    for weigh, weighed_q in ((lambda x: x, q), (torch.abs, q.abs()), (lambda x: x * places[: len(x)], q * terms)):
        means = [weigh(piece).mean(0) for piece in pieces]
        keys = torch.stack(means) if means else k.new_zeros(0, heads, dim)
        by_head = weighed_q @ keys.permute(1, 2, 0)[:, None]  # (H, G, R, blocks)
        found.append(over_scope(p, p.scale * by_head).transpose(0, 1))
    score, magnitude, fingerprint = found
    return score, magnitude, fingerprint


def index_scores(
    p: OracleParameters, q_idx: Tensor, k_idx: Tensor, t: Tensor, blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The indexer's scores, their magnitudes and fingerprints, all (R, S, blocks), exact and detached.

    q_idx (R, S, Di), k_idx (tokens, 1, Di), positions t (R,). score = max over the block's visible tokens of q_idx .
    k_idx; -inf if none is visible, NaN if one is NaN. The rounding of a score is relative to the magnitude, the largest
    sum of the absolute values of such a product's terms. The fingerprint weighs the terms of the first product that
    equals the score by their places in it.
    """
    assert p.selection_block is not None
    exact = exact_dtype(q_idx.dtype)
    q, k = q_idx.detach().to(exact), k_idx.detach().to(exact)[:, 0]
    rows, scopes, dim = q.shape
    visible = (torch.arange(k.shape[0], device=t.device) <= t[:, None])[:, None]
    places = (1.0 + (torch.arange(dim, dtype=torch.float64) * math.pi) % 1.0).to(q)
    beyond = blocks * p.selection_block - k.shape[0]

    def by_block(products: Tensor, unseen: float) -> Tensor:
        """Products (R, S, tokens) as (R, S, blocks, tokens of a block)."""
        padded = functional.pad(products.masked_fill(~visible, unseen), (0, beyond), value=unseen)
        return padded.view(rows, scopes, blocks, p.selection_block)

    score, first = by_block(q @ k.T, -math.inf).max(-1)
    magnitude = by_block(q.abs() @ k.abs().T, 0.0).amax(-1)
    fingerprint = by_block((q * places) @ k.T, 0.0).gather(-1, first[..., None])[..., 0]
    return score, magnitude, fingerprint


def select_blocks(p: OracleParameters, importance: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3's selection: importance (R, S, blocks), positions t (R,) -> indices (R, S, n), counts (R, S), int32.

    Forced blocks rank first, then importances or scores of either sign, then NaN. Ties go to the lower index. Future
    blocks are never ranked.
    """
    assert p.selection_block is not None
    rows, heads, blocks = importance.shape
    block = torch.arange(blocks, device=t.device)
    own = (t // p.selection_block)[:, None, None]
    forced = (block < p.initial) | (block > own - p.local)
    unknown = torch.isnan(importance)
    # First by class: 3 forced, 2 a known score, 1 an unknown one, 0 in the future. Both sorts are stable, so within a
    # class the higher score comes first, and of equal scores the lower index.
    order = torch.sort(importance.detach().masked_fill(unknown, 0.0), dim=-1, descending=True, stable=True).indices
    kind = (2 - unknown.int()).masked_fill(forced.expand_as(unknown), 3)
    kind = kind.masked_fill((block > own).expand_as(unknown), 0)
    value, place = torch.sort(torch.gather(kind, -1, order), dim=-1, descending=True, stable=True)
    kept = torch.gather(order, -1, place).masked_fill(value == 0, blocks)[..., : p.selection_count]
    kept = torch.sort(kept, dim=-1).values
    kept = kept.masked_fill(kept == blocks, -1)
    indices = functional.pad(kept, (0, p.selection_count - kept.shape[-1]), value=-1).to(torch.int32)
    counts = torch.clamp(own[..., 0] + 1, max=p.selection_count).expand(rows, heads).to(torch.int32)
    return indices, counts
