"""Tolerances: a kernel's error is compared with the error of plain PyTorch at the same dtype.

All tolerances are derived. The truth is the float64 oracle. The baseline is the same oracle at the dtype of the inputs.
The bound is twice the baseline's error, plus what one rounding of the result and of its terms may add.
docs/tolerances.md has the reasons, and what each of the three measures detects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 2.0
"""A kernel rounds in other places than plain PyTorch, but should not round more than twice as much."""

HARDWARE_UNITS = {torch.float32: 8.0}
"""Extra units of rounding error by dtype, 1 if absent. In float32, operations have errors besides the rounding of the
result: the hardware's exp2 has 2 units, the logit's factor log2(e) one, and the sums over tiles of keys, which are
rescaled once per tile, the rest. Lower precisions hide all of these."""


class Measure(NamedTuple):
    """A relative error and its bound."""

    error: float
    bound: float

    @property
    def usage(self) -> float:
        """The error as a share of its bound."""
        return self.error / self.bound if self.error > 0 else 0.0


@dataclass(frozen=True)
class Comparison:
    """One tensor compared with the truth by three measures, and the location of the worst row.

    `row` is the error of the row nearest to its bound (which differs by row), `norm` is the whole tensor's (Frobenius),
    and `bias` is the part of the error that is a multiple of the truth. `problem` says what else is wrong (shape,
    dtype, a NaN, an infinity), or is "".
    """

    row: Measure
    norm: Measure
    bias: Measure
    worst_row: tuple[int, ...] = ()
    problem: str = ""

    @property
    def worst(self) -> tuple[str, Measure]:
        """The measure that came nearest to its bound, and its name."""
        measures = {"row": self.row, "norm": self.norm, "bias": self.bias}
        return max(measures.items(), key=lambda each: each[1].usage)

    @property
    def usage(self) -> float:
        """The largest error as a share of its bound; inf if there is a problem."""
        return math.inf if self.problem else self.worst[1].usage

    @property
    def ok(self) -> bool:
        """Whether every measure is within its bound and nothing else is wrong."""
        return self.usage <= 1.0

    def describe(self) -> str:
        """What is wrong, or how near the bounds are, in one line."""
        shown = [f"{error:.2e} of {bound:.2e}" for error, bound in (self.row, self.norm, self.bias)]
        return self.problem or f"worst row {self.worst_row}: {shown[0]}; norm {shown[1]}; bias {shown[2]}"


def unit_roundoff(dtype: torch.dtype, tf32: bool = False) -> float:
    """Half the distance from 1 to the next number: the largest relative error of one rounding."""
    return 2.0**-11 if tf32 else torch.finfo(dtype).eps / 2


def likely_largest(rows: int) -> float:
    """How large the root mean square of `rows` independent normal errors may become, in standard deviations.

    The root mean square of n errors has itself a standard deviation of 1 / sqrt(2 n). The result is 1 plus 2.8 of
    these, which is 3 for one error.
    """
    return 1.0 + 2.0 / math.sqrt(rows)


def _problem(actual: Tensor, truth: Tensor) -> str:
    if actual.shape != truth.shape:
        return f"expected shape {tuple(truth.shape)}, got {tuple(actual.shape)}"
    for name, pattern in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (pattern(actual) != pattern(truth)).nonzero()
        if wrong.shape[0]:
            place = tuple(wrong[0].tolist())
            return (
                f"{name} in {wrong.shape[0]} places where only one of the two has it, first at {place}: "
                f"expected {truth[place].item():.6g}, got {actual[place].item():.6g}"
            )
    return ""


def compare(
    actual: Tensor,
    truth: Tensor,
    baseline: Tensor,
    *,
    dtype: torch.dtype,
    noise: Tensor | None = None,
    drift: Tensor | None = None,
    sources: int | None = None,
    tf32: bool = False,
    rows: bool = True,
) -> Comparison:
    """Compare `actual` with `truth` (float64 oracle). The error of `baseline` (the oracle at `dtype`) is the scale.

    All three have the same shape (..., D). A row is the last dimension; with `rows=False` (lse), an element. `dtype` is
    that of the operator's inputs. `noise` is the noise scale of each element (`Reference`). Its default is 0, and 1 for
    lse (a logarithm's absolute error is the relative error of its argument). `drift` is the standard deviation of each
    element due to float32 sums, in units of float32's roundoff (default: 0). `sources` is the number of independent
    rows of errors that it comes from, if that may be less than the number of rows. Infinities and NaN must be where the
    truth has them.
    """
    unit = unit_roundoff(dtype, tf32)
    slack = unit * (1.0 if tf32 else HARDWARE_UNITS.get(dtype, 1.0))
    problem = _problem(actual, truth)
    if problem or actual.numel() == 0:
        nothing = Measure(0.0, slack)
        return Comparison(nothing, nothing, nothing, problem=problem)
    finite = torch.isfinite(truth)
    truth = truth.double().masked_fill(~finite, 0.0)

    def error_of(x: Tensor) -> Tensor:
        return torch.where(finite & torch.isfinite(x), x.double() - truth, 0.0)

    errors = [error_of(x) for x in (actual, baseline)]
    if noise is None:
        noise = torch.full_like(truth, 0.0 if rows else 1.0)
    scale = truth.square() + noise.double().nan_to_num(0.0, 0.0, 0.0).square()
    scale += (torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / slack) ** 2  # slack is a subnormal step
    moved = torch.zeros_like(truth) if drift is None else drift.double().nan_to_num(0.0, 0.0, 0.0)
    moved = (moved * unit_roundoff(torch.float32)).masked_fill(~finite, 0.0)
    if not rows:
        errors, scale, truth = ([e[..., None] for e in errors], scale[..., None], truth[..., None])
        moved = moved[..., None]

    row_scale = scale.sum(-1).sqrt()
    row = [e.norm(dim=-1) / row_scale for e in errors]
    row_bound = FACTOR * row[1].max() + slack + likely_largest(1) * moved.norm(dim=-1) / row_scale
    worst = torch.unravel_index((row[0] / row_bound).argmax(), row[0].shape)
    norm = [(e.norm() / row_scale.norm()).item() for e in errors]
    number = row_scale.numel()
    independent = number if sources is None else max(1, min(number, sources))
    wandered = likely_largest(independent) * (moved.norm() / row_scale.norm()).item()
    # A bias shows far below the norm: independent errors average out over the elements, but a wrong factor does not.
    weight = (truth / scale.sqrt()).square().sum().clamp(min=0.01 * truth.numel())  # where the truth is noise: no bias
    bias = [((e * truth / scale).sum() / weight).abs().item() for e in errors]
    # Every row has equal weight, including small ones, whose relative errors the norm does not show.
    drifted = moved.norm(dim=-1) / row_scale
    # A rounding error's deviation is its maximum / sqrt 3. The norm of a few elements may reach their maximum.
    rounded = slack * min(1.0, likely_largest(truth.numel()) / math.sqrt(3.0))
    typical = [x.square().mean().sqrt().item() for x in (row[1], drifted)]
    chance = 4.0 * (FACTOR * typical[0] + slack + likely_largest(independent) * typical[1]) / math.sqrt(independent)
    return Comparison(
        Measure(row[0][worst].item(), row_bound[worst].item()),
        Measure(norm[0], FACTOR * norm[1] + rounded + wandered),
        Measure(bias[0], FACTOR * bias[1] + slack / 4 + chance),
        tuple(int(x) for x in worst),
    )
