"""A generated operator beside dense causal attention on the GPU at hand: the short comparison of `nsa-gen demo`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from nsa_gen.bench.contenders import Contender, Operator, keys_and_values
from nsa_gen.bench.inputs import draw_inputs
from nsa_gen.bench.measure import Measurement, race
from nsa_gen.bench.registry import CUDNN, EFFICIENT, FA2
from nsa_gen.verification.inputs import Inputs

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

DENSE = (CUDNN, FA2, EFFICIENT)
"""Torch's own dense attention, in order of preference: the first that runs is compared with."""


@dataclass(frozen=True)
class DenseComparison:
    """Median times, in milliseconds, of one sequence of `tokens` tokens.

    `dense` is torch's scaled_dot_product_attention, causal, with the same heads and head dims; it computes another
    function, so the ratio says what sparsity saves, not which of two implementations of one thing is better.
    """

    tokens: int
    forward_ms: float
    backward_ms: float
    dense_forward_ms: float
    dense_backward_ms: float


def compare_with_dense(package: ModuleType, spec: Spec, lengths: Sequence[int]) -> Iterator[DenseComparison]:
    """Time a generated package's operator and dense causal attention at each length, on the current CUDA device.

    Inputs are one sequence of gaussian numbers in the spec's dtype, drawn on the GPU. Times are medians of at most
    twenty rounds after two, by CUDA events; compilation is not in them. A spec without a backward pass gets 0 for it.

    Raises:
        RuntimeError: torch sees no GPU, or the operator or every dense attention fails.
        ValueError: the operator has no keys and values of its own to compare on (external compression alone).
    """
    if not torch.cuda.is_available():
        raise RuntimeError("compare_with_dense: expected a GPU, torch sees none")
    for tokens in lengths:
        inputs = draw_inputs(spec, tokens, device="cuda")
        keys_and_values(inputs)
        mine, dense, refusals = beside_dense(Operator(package), spec, inputs)
        if mine.problem:
            raise RuntimeError(f"{spec.name} at {tokens} tokens: {mine.problem}")
        if dense is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
            raise RuntimeError(f"no dense attention runs {spec.name} at {tokens} tokens: {reasons}")
        yield DenseComparison(tokens, *_medians(mine), *_medians(dense))


def beside_dense(
    operator: Contender, spec: Spec, inputs: Inputs
) -> tuple[Measurement, Measurement | None, dict[str, str]]:
    """An operator in turn with the first of torch's dense attentions that runs both passes.

    Returns the operator's measurement, the dense one's (None if none runs), and by name why those before it do not.
    """
    refusals: dict[str, str] = {}
    for dense in DENSE:
        mine, other = race((operator, dense), spec, inputs, passes=spec.passes)
        if mine.problem or not other.problem:
            return mine, None if other.problem else other, refusals
        refusals[dense.name] = other.problem
    return mine, None, refusals


def _medians(one: Measurement) -> tuple[float, float]:
    """Milliseconds of the forward and the backward pass."""
    forward, backward = (one.timings.get(name) for name in ("forward", "backward"))
    assert forward is not None
    return forward.median_ms, 0.0 if backward is None else backward.median_ms
