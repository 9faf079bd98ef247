"""The predicted time of each kernel of a call: the cost model's time, calibrated by measurements.

The cost model (`space.modelled_seconds`) chooses between configurations, for which only ratios matter. This module
turns its times into real ones, with a factor per kernel (measured over modelled time on an H100) and a cost per launch.
`tools/calibrate.py` computes the factors from a benchmark's kernel times. `tests/lowering/test_prediction.py` checks
that every prediction is within a factor of two of the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy

from nsa_gen.hardware import Gpu, gpu
from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.calibration import FACTORS
from nsa_gen.lowering.decode_step import kernels_of_call
from nsa_gen.lowering.parts import Kernel
from nsa_gen.lowering.plan import Plan
from nsa_gen.lowering.space import (
    _L2_OVER_MEMORY,
    _MATRIX_EFFICIENCY,
    _MEMORY_EFFICIENCY,
    _numeric,
    candidates,
    fits,
    matrix_rate,
    modelled_seconds,
)

LAUNCH_SECONDS = 4e-6
"""GPU time of a kernel however little work it has: the start of the launch and the end of its last programs.

What begins when all programs of a launch have arrived takes about as long to begin.
"""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one kernel of one call with the chosen configuration.

    Attributes:
        kernel: the kernel's name.
        seconds: predicted time of all its launches.
        calibrated: whether a kernel of this name has been measured; if not, `seconds` is the uncalibrated model time.
        bound_by: what takes most of the time: "matrix units", "L2" or "memory".
        flops: executed FLOPs, including padding and masked edges.
        traffic: bytes that all programs read and write, mostly through L2.
        legal: number of configurations that satisfy the kernel's constraints and fit the device.
        candidates: number of all configurations.
    """

    kernel: str
    seconds: float
    calibrated: bool
    bound_by: str
    flops: float
    traffic: float
    legal: int
    candidates: int


@dataclass(frozen=True)
class Alternative:
    """A choice between two schedules: the kernels that run only with one of them, and their times.

    The times are uncalibrated times of the cost model, for the call for which the choice is made. Kernels that run with
    both schedules are not listed, unless their work differs. Then they are listed on both sides.
    """

    choice: str
    value: int
    chosen: tuple[str, ...]
    chosen_seconds: float
    other: tuple[str, ...]
    other_seconds: float


def predict(program: Plan, *, tokens: int, batch: int = 1, gpu_key: str = "h100") -> dict[str, Prediction]:
    """Predictions, by kernel name, for the kernels that a call of ``batch`` sequences of ``tokens`` tokens runs.

    Raises:
        UnknownGpuError: ``gpu_key`` is not in the hardware table.
    """
    device = gpu(gpu_key)
    sizes = {**program.sizes_on(device.target), s.T: tokens, s.B: batch}
    running = kernels_of_call(program, device, tokens, batch)
    return {kernel.name: _predict(program, kernel, sizes, device) for kernel in running}


def _predict(program: Plan, kernel: Kernel, sizes: Mapping[sympy.Symbol, int], device: Gpu) -> Prediction:
    config = program.defaults[device.target][kernel.name].mapping()
    needs = kernel.resources
    flops, traffic, memory = (_numeric(each, sizes)(config) for each in (needs.flops, needs.traffic, needs.memory))
    bandwidth = device.bandwidth_tbs * 1e12
    times = {
        "matrix units": flops / (matrix_rate(device, sizes) * _MATRIX_EFFICIENCY),
        "L2": traffic / (_L2_OVER_MEMORY * bandwidth),
        "memory": max(memory, _numeric(kernel.compulsory_bytes, sizes)(config)) / (_MEMORY_EFFICIENCY * bandwidth),
    }
    test = fits(kernel, sizes, device)
    everything = list(candidates(kernel))
    return Prediction(
        kernel=kernel.name,
        seconds=_seconds(program, kernel, sizes, device, FACTORS),
        calibrated=kernel.name in FACTORS,
        bound_by=max(times, key=lambda name: times[name]),
        flops=flops,
        traffic=traffic,
        legal=sum(map(test, everything)),
        candidates=len(everything),
    )


def predict_kernel_seconds(
    program: Plan, name: str, tokens: int, gpu_key: str = "h100", factors: Mapping[str, float] = FACTORS
) -> float | None:
    """The predicted time of one kernel, even if the chosen schedule does not run it; None if the program lacks it."""
    kernel = next((each for each in program.kernels if each.name == name), None)
    if kernel is None:
        return None
    device = gpu(gpu_key)
    return _seconds(program, kernel, {**program.sizes_on(device.target), s.T: tokens, s.B: 1}, device, factors)


def _seconds(
    program: Plan, kernel: Kernel, sizes: Mapping[sympy.Symbol, int], device: Gpu, factors: Mapping[str, float]
) -> float:
    modelled, floor = _modelled_and_floor(program, kernel, sizes, device)
    return max(factors.get(kernel.name, 1.0) * modelled, floor) + LAUNCH_SECONDS * (1 + kernel.waits)


def _modelled_and_floor(
    program: Plan, kernel: Kernel, sizes: Mapping[sympy.Symbol, int], device: Gpu
) -> tuple[float, float]:
    """The modelled time, to be scaled by a factor, and the floor at the device's peaks, which it is never below."""
    config = program.defaults[device.target][kernel.name].mapping()
    moving = _numeric(kernel.compulsory_bytes, sizes)(config) / (device.bandwidth_tbs * 1e12)
    floor = max(moving, _numeric(kernel.useful_flops, sizes)(config) / matrix_rate(device, sizes))
    return max(modelled_seconds(kernel, sizes, device)(config), floor), floor


def calibrate(measured: Iterable[tuple[Plan, str, int, float]], gpu_key: str = "h100") -> dict[str, float]:
    """Factors by kernel from measured times: (program, kernel, tokens, seconds of all launches), each of one sequence.

    The launch cost is subtracted from each measured time, and the rest divided by the modelled time. A kernel's factor
    is the middle of the range of these ratios on a logarithmic scale, which minimises the worst error. Kernels that a
    program does not have are skipped.
    """
    device = gpu(gpu_key)
    ratios: dict[str, list[float]] = {}
    for program, name, tokens, seconds in measured:
        kernel = next((each for each in program.kernels if each.name == name), None)
        if kernel is not None:
            sizes = {**program.sizes_on(device.target), s.T: tokens, s.B: 1}
            modelled, _ = _modelled_and_floor(program, kernel, sizes, device)
            ratios.setdefault(name, []).append(math.log(max(seconds - LAUNCH_SECONDS, 0.1 * seconds) / modelled))
    return {name: round(math.exp((min(logs) + max(logs)) / 2), 2) for name, logs in sorted(ratios.items())}


def alternatives(program: Plan, gpu_key: str = "h100") -> list[Alternative]:
    """A program's choices between schedules on a device, each with the time of the schedule that was not chosen."""
    target = gpu(gpu_key).target
    found = []
    for decision in program.decisions:
        values = program.defaults[target][decision.name].mapping()
        for choice in decision.choices:
            chosen = _side(program, choice, values[choice], gpu_key)
            other = _side(program, choice, 1 - values[choice], gpu_key)
            found.append(Alternative(choice, values[choice], *chosen, *other))
    return found


def _side(program: Plan, choice: str, value: int, gpu_key: str) -> tuple[tuple[str, ...], float]:
    """The kernels that run only with one value of a choice, or whose work depends on it, and their time."""
    device = gpu(gpu_key)
    symbol = next((each for each in program.sizes if each.name == choice), None)
    sizes = program.sizes_on(device.target) | ({} if symbol is None else {symbol: value})
    kernels = [kernel for kernel in program.kernels if kernel.choice == (choice, value)]
    if symbol is not None:
        running = (kernel for kernel in program.kernels if program.runs(kernel, device.target))
        kernels = [kernel for kernel in running if symbol in kernel.resources.symbols]
    configs = program.defaults[device.target]
    seconds = sum(modelled_seconds(kernel, sizes, device)(configs[kernel.name].mapping()) for kernel in kernels)
    return tuple(kernel.name for kernel in kernels), seconds
