"""Random inputs for a spec, of several kinds, from a seed.

The same seed, spec and shape give the same numbers on every device, because they are drawn on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nsa_gen.verification.reference.dense import OracleParameters, exact_dtype
from nsa_gen.verification.reference.oracle import SINKS, argument_suffixes, mapped, sink_name

Kind = Literal["gaussian", "strided", "spread", "hot", "rising", "falling", "late", "abyss", "ties", "counts", "nan"]
KINDS: tuple[str, ...] = get_args(Kind)
ABYSS = 300.0
"""Standard deviation, in nats, of the compressed logits of kind `abyss`: exp(-104) is 0 in float32."""


def kinds_of(p: OracleParameters) -> tuple[str, ...]:
    """The kinds that are meaningful for a spec: `counts` needs given indices, `ties` and `abyss` a selection."""
    telling = {"counts": p.indices_given, "ties": p.computed, "abyss": p.computed and p.scores == "compression"}
    return tuple(kind for kind in KINDS if telling.get(kind, True))


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call and the gradient of its output. Arguments the spec does not take are None.

    Shapes are those of `reference_attention`; `do` has o's shape. `compression` maps phi's parameters by name. `dloss`
    (B,), packed (N,), is the gradient of each sequence's alignment loss, if there is one, in the exact dtype.
    """

    q: Tensor
    do: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    gates: Tensor | None = None
    compression: dict[str, Tensor] | None = None
    k_slc: Tensor | None = None
    v_slc: Tensor | None = None
    k_win: Tensor | None = None
    v_win: Tensor | None = None
    k_cmp: Tensor | None = None
    v_cmp: Tensor | None = None
    q_idx: Tensor | None = None
    k_idx: Tensor | None = None
    indices: Tensor | None = None
    counts: Tensor | None = None
    sink_slc: Tensor | None = None
    sink_win: Tensor | None = None
    sink: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dloss: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """All keyword arguments of `reference_attention`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("do", "dloss")}

    def raw_keys(self) -> Tensor:
        """A tensor with one row per raw key. If no branch reads raw keys, this is q, which has as many rows."""
        return next((x for x in (self.k, self.k_slc, self.k_win) if x is not None), self.q)

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that have a gradient, by name; phi's parameters as `compression.<name>`."""
        skipped = {"do", "dloss", "compression", "q_idx", "k_idx", "indices", "counts", "cu_seqlens"}
        found = {
            f.name: value
            for f in fields(self)
            if f.name not in skipped and (value := getattr(self, f.name)) is not None
        }
        return found | {f"compression.{name}": value for name, value in (self.compression or {}).items()}

    def replace_differentiable(self, tensors: dict[str, Tensor]) -> Inputs:
        """A copy in which the tensors of `differentiable()` are replaced by `tensors`, with the same names."""
        learned = {name.removeprefix("compression."): x for name, x in tensors.items() if "." in name}
        plain: dict[str, Any] = {name: x for name, x in tensors.items() if "." not in name}
        return replace(self, **plain, compression={**(self.compression or {}), **learned} or None)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Inputs:
        """A copy on `device` with floating-point tensors in `dtype`; sinks and `dloss` are in its exact dtype."""

        def move(name: str, x: Tensor) -> Tensor:
            wanted = exact_dtype(dtype) if name in (*SINKS, "dloss") else dtype
            return x.to(device=device, dtype=wanted if x.is_floating_point() else None)

        return mapped(self, move)


def parameter_shapes(p: OracleParameters, hidden: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes of phi's learned parameters, in the order of a package's CompressionParameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    block = p.compression_block
    if block is None:
        return shapes
    sides = (("key", p.phi_key, p.position_key, p.head_dim_qk), ("value", p.phi_value, p.position_value, p.head_dim_v))
    for side, kind, position, dim in sides:
        if kind == "weighted":
            shapes[f"{side}_weight"] = (p.kv_heads, block)
        elif kind == "linear":
            shapes[f"{side}_weight"] = (p.kv_heads, block * dim, dim)
        elif kind == "mlp":
            if hidden is None:
                raise ValueError("hidden: expected a width for an mlp phi, got None; set compression.phi.hidden")
            shapes[f"{side}_weight_in"] = (p.kv_heads, block * dim, hidden)
            shapes[f"{side}_weight_out"] = (p.kv_heads, hidden, dim)
        if position:
            shapes[f"{side}_position"] = (p.kv_heads, block, dim)
    return shapes


def make_indices(p: OracleParameters, position: Tensor, generator: torch.Generator, hot: bool) -> Tensor:
    """Random valid indices (R, S, n) int32 for queries at `position` (R,): ascending, -1 on the right.

    Between 0 and n blocks per row; one row in eight holds only -1. With `hot`, every row takes the first n blocks.
    """
    assert p.selection_block is not None
    rows, n = position.shape[0], p.selection_count
    own = (position // p.selection_block)[:, None, None]
    blocks = int(position.max()) // p.selection_block + 1 if rows else 1
    block = torch.arange(blocks)
    rank = -block.expand(rows, p.scopes, blocks).float()
    wanted = torch.full((rows, p.scopes, 1), n)
    if not hot:
        rank = torch.rand(rows, p.scopes, blocks, generator=generator)
        wanted = torch.randint(1, n + 1, (rows, p.scopes, 1), generator=generator)
        wanted *= torch.randint(0, 8, (rows, p.scopes, 1), generator=generator) > 0
    order = torch.argsort(rank.masked_fill(block > own, -math.inf), dim=-1, descending=True, stable=True)[..., :n]
    kept = (order <= own) & (torch.arange(order.shape[-1]) < wanted)
    order = torch.sort(order.masked_fill(~kept, blocks), dim=-1).values
    order = order.masked_fill(order == blocks, -1)
    return torch.nn.functional.pad(order, (0, n - order.shape[-1]), value=-1).to(torch.int32)


def make_inputs(
    spec: Any,
    *,
    batch: int = 2,
    tokens: int | Sequence[int] = 128,
    tokens_kv: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    kind: Kind = "gaussian",
) -> Inputs:
    """Random inputs for a spec.

    `tokens` is Tq, or the lengths of packed sequences (`batch` is then not used). `tokens_kv` is Tkv >= Tq (default:
    Tq). Kinds:

    - gaussian: unit normal everywhere; phi's parameters are scaled so that K_cmp and V_cmp stay of order 1;
    - strided: the same numbers, but q, k and v are slices of wider rows, as a fused projection returns them;
    - spread: keys of different tokens give logits up to 40 nats apart;
    - hot: queries and the first block's keys share a direction, so that all queries select the same blocks
      (caller-supplied indices: all rows take the first n blocks);
    - rising, falling: logits steadily grow or fall with the key's position, by 20 nats in all;
    - late: the logits of the last keys (one stride) are 24 nats above all others, so that it shows if a query sees one
      too early;
    - abyss: compressed logits hundreds of nats apart, so that most probabilities underflow to 0 in float32;
    - ties: every selection block holds the same keys, so that blocks have bitwise equal importances;
    - counts: caller-supplied indices come with counts, many of them below the number of used slots;
    - nan: two thirds into the keys, one key of the first head and one value of the last hold a NaN (for the forward
      pass: it must reach the outputs that see it, and only those).

    Raises ValueError for an unknown kind, for tokens_kv < tokens and for packed lengths with tokens_kv.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    p = OracleParameters.from_spec(spec)
    packed = not isinstance(tokens, int)
    lengths = list(tokens) if isinstance(tokens, Sequence) else [tokens]
    if packed and tokens_kv is not None:
        raise ValueError("tokens_kv: expected None for packed sequences, whose queries and keys are equally many")
    if tokens_kv is not None and tokens_kv < lengths[0]:
        raise ValueError(f"tokens_kv: expected at least tokens = {lengths[0]}, got {tokens_kv}")
    generator = torch.Generator().manual_seed(seed)
    names = list(dict.fromkeys(argument_suffixes(p).values()))
    if not packed and not names:
        tokens_kv = None  # Tkv = Tq: no branch reads raw keys
    rows = sum(lengths)
    lead_q: tuple[int, ...] = (rows,) if packed else (batch, rows)
    keys = rows if packed or tokens_kv is None else tokens_kv
    lead_kv: tuple[int, ...] = (keys,) if packed else (batch, keys)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found: dict[str, Any] = {"q": draw(*lead_q, p.query_heads, p.head_dim_qk)}
    for suffix in names:
        found[f"k{suffix}"] = draw(*lead_kv, p.kv_heads, p.head_dim_qk)
        found[f"v{suffix}"] = draw(*lead_kv, p.kv_heads, p.head_dim_v)
    if p.gate != "none":
        found["gates"] = draw(*lead_q, p.query_heads, len(p.branches))
    found["do"] = draw(*lead_q, p.query_heads, p.head_dim_v)
    hidden = None if p.compression_block is None else spec.compression.phi.hidden
    learned: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(p, hidden).items():
        if name.endswith("position"):
            learned[name] = 0.5 * draw(*shape)
        elif len(shape) == 2:
            learned[name] = (1 + 0.5 * draw(*shape)) / math.sqrt(shape[-1])
        else:
            learned[name] = draw(*shape) * math.sqrt((2.4 if name.endswith("_out") else 1) / shape[1])
    if learned:
        found["compression"] = learned
    if p.external:
        blocks = rows // (p.compression_stride or 1) if packed else p.compressed_blocks(keys)
        lead = (blocks,) if packed else (batch, blocks)
        found["k_cmp"] = draw(*lead, p.kv_heads, p.head_dim_qk)
        if p.compression_output:
            found["v_cmp"] = draw(*lead, p.kv_heads, p.head_dim_v)
    if p.index_dim:
        found["q_idx"] = draw(*lead_q, p.scopes, p.index_dim)
        found["k_idx"] = draw(*lead_kv, 1, p.index_dim)
    if p.indices_given:
        if packed:
            position = torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.arange(0)
        else:
            position = torch.arange(keys - rows, keys).repeat(batch)
        indices = make_indices(p, position, generator, kind == "hot")
        found["indices"] = indices if packed else indices.view(batch, rows, p.scopes, p.selection_count)
        if kind == "counts":
            shape = found["indices"].shape[:-1]
            found["counts"] = torch.randint(0, p.selection_count + 1, shape, generator=generator, dtype=torch.int32)
    for branch in p.sinks:
        found[sink_name(branch)] = 2.0 * draw(p.query_heads)
    if packed:
        found["cu_seqlens"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    if kind in ("spread", "hot", "rising", "falling", "late"):
        _shape_logits(p, found, kind, generator)
    if kind == "abyss" and p.compression_block is not None:
        averaged = p.compression_block**0.5 if p.phi_key == "mean" else 1.0  # a mean of l keys is smaller by this
        found["q"] = found["q"] * (ABYSS * averaged / (p.scale * p.head_dim_qk**0.5))
    if kind == "ties" and p.selection_block is not None:
        _repeat_keys(p, found)
    if kind == "nan":
        for name, x in found.items():
            if name[0] in "kv" and x.shape[-3]:
                x[..., x.shape[-3] * 2 // 3, 0 if name[0] == "k" else -1, 0] = math.nan
    if p.aligned:
        found["dloss"] = 0.5 + torch.rand(len(lengths) if packed else batch, generator=generator)
    inputs = Inputs(**found).to(dtype, device)
    return _strided(inputs) if kind == "strided" else inputs


def _shape_logits(p: OracleParameters, found: dict[str, Any], kind: str, generator: torch.Generator) -> None:
    """Give all queries a common direction, and each key a component of it that adds `nats` to the logit."""
    direction = torch.nn.functional.normalize(torch.randn(p.head_dim_qk, generator=generator), dim=0)
    strength = 4.0 / p.scale**0.5  # on both sides, so that q and k stay in proportion
    found["q"] = found["q"] * 0.25 + direction * strength
    for name in [name for name in found if name.startswith("k") and name != "k_idx"]:
        k = found[name]
        tokens = k.shape[-3]
        if kind == "spread":
            nats = torch.randint(-40, 41, (tokens,), generator=generator).float()
            nats = nats * (torch.rand(tokens, generator=generator) < 0.25)
        elif kind == "hot":
            nats = 8.0 * (torch.arange(tokens) < (p.selection_block or 64)).float()
        elif kind == "late":
            last = 1 if name == "k_cmp" else p.compression_stride or 4
            nats = 24.0 * (torch.arange(tokens) >= tokens - last).float()
        else:
            nats = torch.linspace(-10, 10, tokens) if tokens > 1 else torch.zeros(tokens)
            nats = nats if kind == "rising" else -nats
        amount = nats / (p.scale * strength)
        found[name] = k + amount[:, None, None] * direction


def _repeat_keys(p: OracleParameters, found: dict[str, Any]) -> None:
    """Repeat the keys with the period of a selection block, and compressed keys with theirs."""
    assert p.selection_block is not None
    for name in [name for name in found if name.startswith("k")]:
        x = found[name]
        period = p.selection_block
        if name == "k_cmp":
            period //= p.compression_stride or 1
        found[name] = x.index_select(x.dim() - 3, torch.arange(x.shape[-3]) % period)


def _strided(inputs: Inputs) -> Inputs:
    """The same numbers in tensors with wider rows than needed, like slices of a fused projection."""
    changed: dict[str, Tensor] = {}
    groups = (
        ("q", "k", "v"),
        ("k_slc", "v_slc"),
        ("k_win", "v_win"),
        ("k_cmp", "v_cmp"),
        ("q_idx",),
        ("k_idx",),
        ("gates",),
        ("do",),
    )
    for group in groups:
        present = {name: x for name in group if (x := getattr(inputs, name)) is not None}
        if len({x.shape[:-2] for x in present.values()}) != 1:
            singles = [{name: x} for name, x in present.items()]
        else:
            singles = [present]
        for tensors in singles:
            lead = next(iter(tensors.values())).shape[:-2]
            widths = [x.shape[-2] * x.shape[-1] for x in tensors.values()]
            like = next(iter(tensors.values()))
            fused = torch.full((*lead, sum(widths) + 16), math.nan, dtype=like.dtype, device=like.device)
            start = 0
            for (name, x), width in zip(tensors.items(), widths, strict=True):
                view = fused[..., start : start + width].unflatten(-1, x.shape[-2:])
                view.copy_(x)
                changed[name] = view
                start += width
    return replace(inputs, **changed)
