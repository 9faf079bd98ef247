"""A first table of times: the operator and dense causal attention, interleaved in one process, and time by kernel."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa_gen.rendering import import_package
from nsa_gen.verification.cases import Case
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.inputs import Inputs, make_inputs
from nsa_gen.verification.verify import check_case, environment
from tools.gpu.correctness import say
from tools.gpu.packages import package_of, variant

WARM_UP = 2
REPEATS = (5, 20)
"""Fewest and most timed rounds; in between as many as SECONDS allow."""
SECONDS = 4.0
DENSE = (
    (SDPBackend.CUDNN_ATTENTION, True),
    (SDPBackend.CUDNN_ATTENTION, False),
    (SDPBackend.FLASH_ATTENTION, True),
    (SDPBackend.FLASH_ATTENTION, False),
    (SDPBackend.EFFICIENT_ATTENTION, False),
)
"""Dense contenders in order of preference: backend, and whether it takes fewer KV heads than query heads."""

Call = Callable[[], Tensor]


class Contender:
    """Something to time: a call, the tensors it has gradients for, and the gradient of its output."""

    def __init__(self, name: str, call: Call, leaves: Sequence[Tensor], do: Tensor) -> None:
        self.name, self.call, self.leaves, self.do = name, call, list(leaves), do

    def once(self) -> tuple[float, float]:
        """Milliseconds of one forward and one backward, by CUDA events."""
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        o = self.call()
        middle.record()
        torch.autograd.grad(o, self.leaves, self.do, allow_unused=True)
        end.record()
        end.synchronize()
        return start.elapsed_time(middle), middle.elapsed_time(end)


def bench_job(
    result: dict[str, Any], *, spec: str, dtype: str, lengths: Sequence[int], profile_at: int, seed: int, root: str
) -> None:
    """Time one spec at each length, one gaussian sequence; profile one forward and backward at `profile_at`.

    The operator is verified at a ragged length first: times of a wrong kernel are no times.
    """
    meaning = variant(spec, dtype)
    module = import_package(package_of(meaning, Path(root)))
    element = getattr(torch, dtype)
    result.update(environment=asdict(environment(torch.device("cuda"))), rows=[], kernels=[], dense_refusals={})
    say(f"{spec}: verifying")
    case = Case(511, batch=1, twice=False)
    if meaning.selection is not None and meaning.selection.indices == "input":
        raise ValueError(f"spec: expected one that chooses its blocks itself, got {spec}")
    ragged = make_inputs(meaning, batch=1, tokens=case.tokens, dtype=element, device="cuda", seed=seed)
    checks = check_case(module, OracleParameters.from_spec(meaning), case, ragged, with_gradients=True)
    if bad := [f"{row.quantity} {row.error:.3g} of {row.bound:.3g}{row.problem}" for row in checks if not row.ok]:
        result["error"] = f"wrong at 511 tokens, so not timed: {'; '.join(bad)}"
        return
    for tokens in lengths:
        say(f"{spec}: {tokens} tokens")
        inputs = _lengthened(ragged, tokens, seed)
        operator = _operator(module, inputs)
        dense, refusals = _dense(inputs, meaning.scale_value)
        result["dense_refusals"][str(tokens)] = refusals
        contenders = [operator, dense] if dense is not None else [operator]
        result["rows"] += [{"spec": spec, "tokens": tokens, **row} for row in _time(contenders)]
        if tokens == profile_at:
            say(f"{spec}: profiling")
            result["kernels"] = _profile(operator)
            result["profiled_tokens"] = tokens
        del inputs, operator, dense, contenders
        gc.collect()
        torch.cuda.empty_cache()
    result["ok"] = True


def _lengthened(inputs: Inputs, tokens: int, seed: int) -> Inputs:
    """Gaussian inputs like these of another length, drawn on the GPU; phi's parameters are kept.

    `make_inputs` draws on the CPU, where half a billion numbers take longer than all that is timed here.
    """
    generator = torch.Generator(inputs.q.device).manual_seed(seed)
    changed: dict[str, Tensor] = {}
    for name, x in {**inputs.arguments(), "do": inputs.do}.items():
        if isinstance(x, Tensor):
            shape = (1, tokens, *x.shape[2:])
            changed[name] = torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
    return replace(inputs, **changed)


def _operator(module: Any, inputs: Inputs) -> Contender:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
    arguments = {n: x for n, x in inputs.replace_differentiable(leaves).arguments().items() if x is not None}
    if "compression" in arguments:
        arguments["compression"] = module.CompressionParameters(**arguments["compression"])
    positional = [arguments.pop(name, None) for name in ("q", "k", "v")]
    return Contender(
        "nsa_gen", lambda: module.nsa_attention(*positional, **arguments), list(leaves.values()), inputs.do
    )


def _dense(inputs: Inputs, scale: float) -> tuple[Contender | None, dict[str, str]]:
    """The first dense contender that runs forward and backward at this shape, and why those before it do not."""
    assert inputs.k is not None and inputs.v is not None
    group = inputs.q.shape[2] // inputs.k.shape[2]
    do = inputs.do.transpose(1, 2).contiguous()
    refusals: dict[str, str] = {}
    for backend, grouped in DENSE:
        if grouped and group == 1:
            continue
        repeat = 1 if grouped else group
        name = f"dense {backend.name.removesuffix('_ATTENTION').lower()}{'' if repeat == 1 else ', repeated kv'}"
        try:
            contender = _dense_contender(name, inputs, do, scale, backend, grouped, repeat)
            contender.once()
            torch.cuda.synchronize()
        except (RuntimeError, torch.OutOfMemoryError) as error:
            refusals[name] = str(error).strip().splitlines()[0][:200]
            torch.cuda.empty_cache()
            continue
        return contender, refusals
    return None, refusals


def _dense_contender(
    name: str, inputs: Inputs, do: Tensor, scale: float, backend: SDPBackend, grouped: bool, repeat: int
) -> Contender:
    """Dense causal attention on the same q, k and v in torch's (B, H, T, D) layout, KV heads repeated where needed."""
    assert inputs.k is not None and inputs.v is not None
    wide = (inputs.q, inputs.k.repeat_interleave(repeat, 2), inputs.v.repeat_interleave(repeat, 2))
    leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in wide]

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, enable_gqa=grouped)

    return Contender(name, call, leaves, do)


def _time(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Rounds of every contender in turn: a row for each contender and direction."""
    for _ in range(WARM_UP):
        spent = sum(sum(contender.once()) for contender in contenders) / 1000
    repeats = min(REPEATS[1], max(REPEATS[0], int(SECONDS / max(spent, 1e-6))))
    samples: list[list[tuple[float, float]]] = [[] for _ in contenders]
    peaks = [0] * len(contenders)
    for _ in range(repeats):
        for number, contender in enumerate(contenders):
            torch.cuda.reset_peak_memory_stats()
            samples[number].append(contender.once())
            peaks[number] = torch.cuda.max_memory_allocated()
    rows = []
    for contender, found, peak in zip(contenders, samples, peaks, strict=True):
        for direction, times in zip(("forward", "backward"), zip(*found, strict=True), strict=True):
            rows.append(
                {
                    "contender": contender.name,
                    "direction": direction,
                    "median_ms": statistics.median(times),
                    "least_ms": min(times),
                    "most_ms": max(times),
                    "repeats": repeats,
                    "peak_bytes": peak,
                }
            )
    return rows


def _profile(contender: Contender) -> list[dict[str, Any]]:
    """GPU time by kernel of one forward and backward, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        contender.once()
    kernels = [
        {"kernel": event.key[:120], "ms": event.self_device_time_total / 1000, "launches": event.count}
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total > 0
    ]
    return sorted(kernels, key=lambda kernel: -kernel["ms"])
