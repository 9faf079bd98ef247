"""Where the time of our own operator goes: every kernel of one forward and one backward, beside what it must cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nsa_gen.bench.contenders import Prepared
from nsa_gen.lowering import explain, lower

if TYPE_CHECKING:
    from nsa_gen.lowering import KernelEstimate
    from nsa_gen.lowering.plan import Plan
    from nsa_gen.spec import Spec

OTHER = "other"
"""The branch of what is none of the package's kernels: copies, fills and sorts of torch."""


@dataclass(frozen=True)
class KernelTime:
    """GPU time of one kernel in one pass of one call.

    Attributes:
        kernel: the name of the package's kernel, or torch's.
        branch: "cmp", "slc", "win", "all", or "other" for what is not the package's.
        direction: "forward" or "backward".
        ms: GPU milliseconds, all launches together.
        launches: how many there were.
        flops, bytes: what no schedule avoids, by the cost model; 0 for kernels it does not know.
        floor_ms: the least time for these at the peaks of the GPU; None where the GPU is not in the hardware table.
        limited_by: "matrix units" or "memory"; "" where there is no floor.
    """

    kernel: str
    branch: str
    direction: str
    ms: float
    launches: int
    flops: float = 0.0
    bytes: float = 0.0
    floor_ms: float | None = None
    limited_by: str = ""


def estimates(spec: Spec, tokens: int, gpu_key: str | None) -> dict[str, KernelEstimate]:
    """The cost model's estimate of each kernel of a spec, by kernel; FLOPs and bytes are those of any GPU.

    `gpu_key` decides the floors; the H100's are taken for None, and are not to be used then.
    """
    return {one.kernel: one for one in explain(_lowered(spec), tokens=tokens, gpu_key=gpu_key or "h100")}


@functools.lru_cache(maxsize=32)
def _lowered(spec: Spec) -> Plan:
    """A spec's program: lowering takes half a second, and a benchmark asks for each of a few specs many times."""
    return lower(spec)


def breakdown(prepared: Prepared, spec: Spec, tokens: int, gpu_key: str | None) -> list[KernelTime]:
    """Profile one forward and, where the spec has one, one backward of our operator; the longest kernels first."""
    known = estimates(spec, tokens, gpu_key)
    backward = "backward" in spec.passes
    found: dict[str, Any] = {}

    def forward() -> None:
        with torch.set_grad_enabled(backward):
            found["o"] = prepared.call()

    times = _kernel_times(_profiled(forward), "forward", known, gpu_key)
    if backward:
        events = _profiled(lambda: torch.autograd.grad(found.pop("o"), prepared.leaves, prepared.do, allow_unused=True))
        times += _kernel_times(events, "backward", known, gpu_key)
    return sorted(times, key=lambda one: -one.ms)


def _profiled(action: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """Name, milliseconds and launches of every kernel that runs in an action."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        action()
        torch.cuda.synchronize()
    return [
        (event.key, event.self_device_time_total / 1000, event.count)
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total > 0
    ]


def _kernel_times(
    events: Iterable[tuple[str, float, int]], direction: str, known: dict[str, KernelEstimate], gpu_key: str | None
) -> list[KernelTime]:
    """What was profiled, with what the cost model knows of each kernel."""
    times = []
    for name, ms, launches in events:
        one = known.get(name.removesuffix("_kernel"))
        if one is None:
            times.append(KernelTime(name[:120], OTHER, direction, ms, launches))
            continue
        floor, limit = (None, "") if gpu_key is None else (1000 * one.seconds_floor, one.limited_by)
        times.append(KernelTime(one.kernel, one.branch, direction, ms, launches, one.flops, one.bytes, floor, limit))
    return times
