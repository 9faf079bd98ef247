"""A generated operator beside dense causal attention on the GPU at hand: forward and backward, one sequence."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_gen.verification.inputs import Inputs, make_inputs

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

WARM_UP, REPEATS = 3, 10


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

    Inputs are one sequence of gaussian numbers in the spec's dtype. Times are medians of ten calls after three, by
    CUDA events; compilation is not in them.

    Raises:
        RuntimeError: torch sees no GPU.
        ValueError: the operator has no keys and values of its own to compare on (external compression alone).
    """
    if not torch.cuda.is_available():
        raise RuntimeError("compare_with_dense: expected a GPU, torch sees none")
    for tokens in lengths:
        inputs = make_inputs(spec, batch=1, tokens=tokens, dtype=getattr(torch, spec.dtype), device="cuda")
        if inputs.k is None or inputs.v is None:
            raise ValueError(f"{spec.name} takes no k and v, so there is no dense attention of the same shape")
        yield DenseComparison(tokens, *_time(*_operator(package, inputs)), *_time(*_dense(inputs, spec.scale_value)))


Call = Callable[[], Tensor]


def _operator(package: ModuleType, inputs: Inputs) -> tuple[Call, list[Tensor], Tensor]:
    """The operator as a call without arguments, the tensors it has gradients for, and the gradient of its output."""
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.differentiable().items()}
    ready = inputs.replace_differentiable(leaves)
    arguments = {name: value for name, value in ready.arguments().items() if value is not None}
    if "compression" in arguments:
        arguments["compression"] = package.CompressionParameters(**arguments["compression"])
    for required in ("q", "k", "v"):
        arguments.setdefault(required, None)
    return lambda: package.nsa_attention(**arguments), list(leaves.values()), inputs.do


def _dense(inputs: Inputs, scale: float) -> tuple[Call, list[Tensor], Tensor]:
    """Dense causal attention on the same q, k and v, in torch's (B, H, T, D) layout."""
    assert inputs.k is not None and inputs.v is not None
    leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

    def call() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, enable_gqa=True)

    return call, leaves, inputs.do.transpose(1, 2)


def _time(call: Call, leaves: list[Tensor], do: Tensor) -> tuple[float, float]:
    """Median milliseconds of the call and of its backward pass."""
    forward: list[float] = []
    backward: list[float] = []
    for _ in range(WARM_UP + REPEATS):
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        o = call()
        middle.record()
        torch.autograd.grad(o, leaves, do, allow_unused=True)
        end.record()
        end.synchronize()
        forward.append(start.elapsed_time(middle))
        backward.append(middle.elapsed_time(end))
    return statistics.median(forward[WARM_UP:]), statistics.median(backward[WARM_UP:])
