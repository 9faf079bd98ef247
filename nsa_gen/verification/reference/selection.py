"""Is a choice of blocks legal, and is it as good as the best?

Two right implementations may choose different blocks where importances differ by less than rounding error. A choice is
therefore not compared with the oracle's: it is checked for the rules of section 3, and the importance of what was
chosen against the importance of the best that was not.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nsa_gen.verification.reference.dense import OracleParameters

NEGLIGIBLE = 1e-6
"""Importance (a probability summed over the group) below which a relative error says nothing."""
EQUAL = 1e-12
"""Relative difference of two float64 importances that are equal: their rounding, far below that of float32."""


def magnitude_of(importance: Tensor, magnitude: Tensor | None) -> Tensor:
    """What the rounding of each block's importance or score is relative to.

    A score by mean keys is a sum of terms of either sign: its rounding is relative to the sum of their sizes,
    `magnitude`. An importance is a sum of probabilities: it is relative to itself (`magnitude` is None).
    """
    return importance.abs().clamp(min=NEGLIGIBLE) if magnitude is None else magnitude


@dataclass(frozen=True)
class SelectionCheck:
    """What was found: broken rules (empty: legal), and the choice's worst shortfall against its bound.

    `shortfall` is the largest amount, in units of the tolerance of its row, by which a block left out surpasses a
    chosen, not forced one; at most 1 is within rounding error.
    """

    problems: tuple[str, ...]
    shortfall: float

    @property
    def ok(self) -> bool:
        """Legal, and as good as the oracle's choice."""
        return not self.problems and self.shortfall <= 1.0


def query_positions(rows: int, tokens: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Positions (rows,) int64 of the queries of one sequence of `tokens` keys, or of packed ones; -1 for padding."""
    if cu_seqlens is None:
        return torch.arange(tokens - rows, tokens)
    bounds = cu_seqlens.tolist()
    parts = [torch.arange(stop - start) for start, stop in pairwise(bounds)]
    return torch.cat([*parts, torch.full((rows - bounds[-1],), -1)])


def _first(name: str, broken: Tensor, shown: Tensor, rule: str) -> list[str]:
    """One message for the first place where `broken` (rows, heads) holds, and how many more there are."""
    where = broken.nonzero()
    if where.shape[0] == 0:
        return []
    place = tuple(where[0].tolist())
    more = f" ({where.shape[0] - 1} more)" if where.shape[0] > 1 else ""
    return [f"{name}: {rule}; at row {place[0]}, KV head {place[1]} it is {shown[place].tolist()}{more}"]


def _flat(x: Tensor, trailing: int) -> Tensor:
    """Batched or packed to (rows, heads, ...)."""
    return x.detach().cpu().flatten(0, x.dim() - 2 - trailing)


def check_indices(
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    selection_block: int,
    tokens: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[str, ...]:
    """Check block indices that a caller passes: returns a message for each broken rule, () if there is none.

    indices (B, Tq, Hkv, n) or packed (T_total, Hkv, n) int32, counts the same without n; `tokens` is Tkv (Tq if left
    out). A legal row has only blocks of the past or the query's own, no duplicates, and any number of -1; counts, if
    given, are in 0..n. The operator ignores future blocks and never reads beyond n slots, but it counts a duplicate
    block twice. This is the caller's error, and only this function finds it. Raises ValueError for wrong shapes or
    dtypes.
    """
    if indices.dtype != torch.int32:
        raise ValueError(f"indices: expected int32, got {indices.dtype}; convert with .to(torch.int32)")
    expected = 4 if cu_seqlens is None else 3
    if indices.dim() != expected:
        raise ValueError(f"indices: expected {expected} dimensions, got shape {tuple(indices.shape)}")
    if counts is not None and (counts.dtype != torch.int32 or counts.shape != indices.shape[:-1]):
        raise ValueError(
            f"counts: expected int32 of shape {tuple(indices.shape[:-1])}, got {counts.dtype} of {tuple(counts.shape)}"
        )
    n, rows = indices.shape[-1], indices.shape[-3]
    position = query_positions(rows, tokens if tokens is not None else rows, cu_seqlens)
    if cu_seqlens is None:
        position = position.repeat(indices.shape[0])
    flat = _flat(indices, 1).long()
    own = (position // selection_block)[:, None, None]
    used = (flat != -1) & (own >= 0)  # what padding holds is not read
    problems: list[str] = []
    if counts is not None:
        number = _flat(counts, 0).long()
        wrong = ((number < 0) | (number > n)) & (own >= 0)[..., 0]
        problems += _first("counts", wrong, number, f"expected 0..{n}")
        used &= torch.arange(n) < number[..., None]
    problems += _first("indices", ((flat < -1) & used).any(-1), flat, "expected block numbers or -1")
    problems += _first("indices", ((flat > own) & used).any(-1), flat, "a block in the future of its query")
    unique = torch.where(used, flat, -2 - torch.arange(n)).sort(-1).values
    problems += _first("indices", (unique[..., 1:] == unique[..., :-1]).any(-1), flat, "a block is given twice")
    return tuple(problems)


def check_selection(
    parameters: OracleParameters,
    indices: Tensor,
    counts: Tensor,
    importance: Tensor,
    *,
    tolerance: float,
    fingerprint: Tensor | None = None,
    magnitude: Tensor | None = None,
    tokens: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> SelectionCheck:
    """Check a computed choice against section 3, ties allowed.

    indices (B, Tq, Hkv, n), counts (B, Tq, Hkv) int32 (packed: no B) are the choice; importance (..., blocks) is the
    oracle's on the same inputs. Legal: ascending, -1 on the right, min(n, t // l' + 1) blocks, none from the future,
    none twice, forced ones present. As good: no block left out surpasses a chosen, not forced one by more than
    `tolerance` times the larger of the two (their sums of up to G * l / d probabilities carry that relative error;
    blocks below NEGLIGIBLE count as that), or of the two blocks' `magnitude` where scores are by mean keys; see
    `magnitude_of`. Where importances are equal, or NaN on both sides, the order is by index;
    given the oracle's `fingerprint` (like importance), only where they are equal term by term.
    """
    p = parameters
    assert p.selection_block is not None
    n, rows = indices.shape[-1], indices.shape[-3]
    position = query_positions(rows, tokens if tokens is not None else rows, cu_seqlens)
    if cu_seqlens is None:
        position = position.repeat(indices.shape[0])
    flat, number, value = _flat(indices, 1).long(), _flat(counts, 0).long(), _flat(importance, 1).double()
    terms = None if fingerprint is None else _flat(fingerprint, 1).double().nan_to_num(-1.0)
    blocks = value.shape[-1]
    own = position[:, None] // p.selection_block
    due = torch.clamp(own + 1, max=n).expand(number.shape)
    slot = torch.arange(n)
    problems: list[str] = []
    problems += _first("counts", number != due, number, "expected min(n, t // l' + 1)")
    used = slot < due[..., None]
    problems += _first("indices", ((flat < 0) & used).any(-1), flat, "a slot is empty that has a block to hold")
    problems += _first("indices", ((flat != -1) & ~used).any(-1), flat, "expected -1 beyond the count")
    problems += _first("indices", (flat > own[..., None]).any(-1), flat, "a block in the future of its query")
    falling = (flat[..., 1:] <= flat[..., :-1]) & used[..., 1:]
    problems += _first("indices", falling.any(-1), flat, "expected ascending blocks, none twice")

    chosen = torch.zeros(*flat.shape[:2], blocks + 1, dtype=torch.bool)
    inside = (flat >= 0) & (flat < blocks)
    chosen = chosen.scatter(-1, torch.where(inside, flat, blocks), True)[..., :blocks]
    block = torch.arange(blocks)
    candidate = (block <= own[..., None]).expand(chosen.shape)
    forced = ((block < p.initial) | (block > own[..., None] - p.local)) & candidate
    problems += _first("indices", (forced & ~chosen).any(-1), flat, "a forced block is missing")
    if problems or blocks == 0 or flat.numel() == 0:
        return SelectionCheck(tuple(problems), 0.0)

    unknown = torch.isnan(value)
    size = magnitude_of(value, None if magnitude is None else _flat(magnitude, 1).double()).nan_to_num(0.0)
    # Unknown ones are last among the candidates, as in the oracle, and by far.
    known = value.masked_fill(unknown | ~candidate, 0.0)
    last = known.amin(-1, keepdim=True) - size.masked_fill(~candidate, 0.0).amax(-1, keepdim=True) - 1.0
    rank = torch.where(unknown, last, value)
    weakest, lowest = rank.masked_fill(~(chosen & ~forced), torch.inf).min(-1)
    strongest, highest = rank.masked_fill(~(candidate & ~chosen), -torch.inf).max(-1)
    gap = (strongest - weakest).clamp(min=0.0)
    larger = size.gather(-1, highest[..., None])[..., 0]
    if magnitude is not None:
        larger = torch.maximum(larger, size.gather(-1, lowest[..., None])[..., 0])
    shortfall = torch.where(torch.isfinite(gap) & (gap > 0), gap / (tolerance * larger), 0.0)
    problems += _ties(flat, rank, chosen & ~forced, candidate & ~chosen, weakest, strongest, terms)
    return SelectionCheck(tuple(problems), shortfall.max().item())


def _ties(
    flat: Tensor,
    rank: Tensor,
    taken: Tensor,
    left: Tensor,
    weakest: Tensor,
    strongest: Tensor,
    terms: Tensor | None,
) -> list[str]:
    """Where the weakest block taken and the strongest one left are equal, the lower must be taken; NaN equals NaN.

    Equal means to within the rounding of float64: blocks of the same keys, or of none that is visible yet.
    """
    blocks = rank.shape[-1]
    block = torch.arange(blocks)
    margin = EQUAL * strongest.abs()
    equal = torch.isfinite(strongest) & torch.isfinite(weakest) & ((strongest - weakest).abs() <= margin)
    taken = taken & (rank <= (weakest + margin)[..., None])
    left = left & (rank >= (strongest - margin)[..., None])
    highest = torch.where(taken, block, -1).amax(-1)
    lowest = torch.where(left, block, blocks).amin(-1)
    broken = equal & (lowest < highest)
    for row, head in broken.nonzero().tolist() if terms is not None else ():
        own = terms[row, head]
        one, other = own[left[row, head], None], own[taken[row, head]]
        same = (one - other).abs() <= EQUAL * torch.maximum(one.abs(), other.abs())
        lower = block[left[row, head], None] < block[taken[row, head]]
        broken[row, head] = (same & lower).any()
    return _first("indices", broken, flat, "equal importances: expected the lower blocks")
