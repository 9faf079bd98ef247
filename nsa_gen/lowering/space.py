"""The configurations with which a kernel may run on a device, and the cost model's choice among them.

Constraints are symbolic and stated once: those of the kernel, and those of the device. The tuner filters its candidates
with the same functions.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import sympy
from sympy.printing.pycode import PythonCodePrinter

from nsa_gen.hardware import TENSOR_MEMORY_COLUMNS, Gpu
from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.parts import Config, Kernel
from nsa_gen.lowering.plan import Plan

#: Share of a thread's registers for accumulators and score tiles. The rest holds addresses, masks and operands.
_REGISTER_SHARE = 0.66
#: Registers that compilers use for each of those values: they use what a thread may have.
_REGISTERS_TAKEN = 2.0
#: Fraction of the matrix units' peak that a Triton kernel reaches, and ratio of L2 bandwidth to memory bandwidth.
_MATRIX_EFFICIENCY = 0.6
_L2_OVER_MEMORY = 2.5
#: Fraction of the peak memory bandwidth that scattered rows of one head dim reach.
_MEMORY_EFFICIENCY = 0.75
#: Bytes of shared memory that a multiprocessor reserves per program, and the number of programs beyond which more gain
#: nothing.
_RESERVED_MEMORY, _MOST_RESIDENT = 1024, 8
#: Warps on a multiprocessor that suffice to hide one another's latency.
_HIDING_WARPS = 8
#: Rows of a streamed tile whose products take as long as the fixed cost of a step (barriers, softmax bookkeeping).
_STEP_ROWS = 16
#: Time of a loop by pipeline depth, relative to a deep pipeline. With 1 stage no load is hidden, with 2 some are.
_STAGE_COST = {1: 1.3, 2: 1.05}
#: The pipeliner for AMD overlaps two stages. Triton 3.7 fails on some loops with more.
_DEEPEST_PIPELINE = {"cuda": 8, "hip": 2}
#: Rows that the matrix units take at a time on these architectures, and on those that share their tables.
_MATRIX_ROWS = 64
_TALL_TARGETS = ("sm_90", "sm_100")
#: Architectures whose matrix units do not read probabilities from registers.
_STAGED_SCORES = ("sm_100",)
#: float32 products in IEEE precision do not run on the matrix units; their rate is about a sixteenth of bfloat16's.
_IEEE_SLOWDOWN = 16
#: A call of a typical length. The choice depends on it only through the waste at tile edges.
_TYPICAL_CALL = {s.B: 1, s.T: 32768}


def candidates(kernel: Kernel) -> Iterator[dict[str, int]]:
    """Every combination of the values of a kernel's tunables, legal or not."""
    names = [tunable.name for tunable in kernel.tunables]
    for values in itertools.product(*(tunable.values for tunable in kernel.tunables)):
        yield dict(zip(names, values, strict=True))


@dataclass(frozen=True)
class Legal:
    """The legal values of the tunables of a kernel or a decision, whatever the device.

    Attributes:
        values: legal values by tunable.
        rules: Python expressions over several tunables, which must also hold.
    """

    values: Mapping[str, tuple[int, ...] | range]
    rules: tuple[str, ...] = ()


def legal_space(program: Plan) -> dict[str, Legal]:
    """What a package accepts, by kernel and decision: values of the tunables, and the kernels' own constraints."""
    found = {kernel.name: _legal(kernel, program.sizes) for kernel in program.kernels}
    return found | {
        decision.name: Legal({each.name: each.legal for each in decision.tunables}) for decision in program.decisions
    }


def _legal(kernel: Kernel, sizes: Mapping[sympy.Symbol, int]) -> Legal:
    """Constraints on one tunable narrow its values. Those on several become rules, unless they always hold."""
    values = {tunable.name: tunable.legal for tunable in kernel.tunables}
    rules = []
    for constraint in sorted(kernel.constraints, key=lambda each: len(each.free_symbols - sizes.keys())):
        test = _numeric(constraint, sizes)
        names = [symbol.name for symbol in constraint.free_symbols - sizes.keys()]
        choices = [dict(zip(names, each, strict=True)) for each in itertools.product(*(values[name] for name in names))]
        kept = [choice for choice in choices if test(choice)]
        if len(names) == 1:
            values[names[0]] = tuple(choice[names[0]] for choice in kept)
        elif kept != choices:
            text = _PRINTER.doprint(constraint.subs(sizes))
            rules.append(text[1:-1] if constraint.is_Relational else text)
    return Legal(values, tuple(rules))


def fits(kernel: Kernel, sizes: Mapping[sympy.Symbol, int], gpu: Gpu) -> Callable[[dict[str, int]], bool]:
    """A test whether a configuration satisfies the kernel's constraints and is expected to fit a device."""
    keeps = _keeping(kernel, sizes)
    shared_memory = shared_memory_of(kernel, sizes, gpu)
    registers = _numeric(kernel.resources.registers, sizes)
    tensor_memory = _numeric(kernel.resources.tensor_memory, sizes)

    def test(config: dict[str, int]) -> bool:
        threads = config["num_warps"] * gpu.warp_size
        return (
            keeps(config)
            and config["num_stages"] <= _DEEPEST_PIPELINE[gpu.backend]
            and shared_memory(config) <= gpu.shared_memory_per_block
            and (gpu.table not in _STAGED_SCORES or tensor_memory(config) <= TENSOR_MEMORY_COLUMNS)
            and registers(config) <= threads * gpu.registers_per_thread * _REGISTER_SHARE
        )

    return test


def shared_memory_of(kernel: Kernel, sizes: Mapping[sympy.Symbol, int], gpu: Gpu) -> Callable[[dict[str, int]], float]:
    """Bytes of shared memory that a program with a configuration is expected to need on a device."""
    staged = int(gpu.table in _STAGED_SCORES)
    return _numeric(kernel.resources.shared_memory, {**sizes, s.SCORES_STAGED: staged})


def modelled_seconds(kernel: Kernel, sizes: Mapping[sympy.Symbol, int], gpu: Gpu) -> Callable[[dict[str, int]], float]:
    """The cost model's time of a kernel in a call, in seconds.

    The call has the B and T of `sizes`, or is a typical one if `sizes` lacks them. Times of matrix work and of traffic
    add up if one program has a multiprocessor to itself; the more programs share one, the more these times overlap.
    """
    flops = _numeric(kernel.resources.flops, sizes)
    traffic = _numeric(kernel.resources.traffic, sizes)
    memory = _numeric(kernel.resources.memory, sizes)
    streamed = _numeric(kernel.resources.streamed, sizes)
    height = _numeric(kernel.resources.height, sizes)
    programs = _numeric(kernel.resources.programs, sizes)
    resident = _resident_programs(kernel, sizes, gpu)
    # If the matrix units take 64 rows, tiles with fewer rows use older instructions at about half the rate.
    full_height = _MATRIX_ROWS if gpu.table in _TALL_TARGETS and sizes[s.E] < 4 else 1
    rate = matrix_rate(gpu, sizes) * _MATRIX_EFFICIENCY
    bandwidth = gpu.bandwidth_tbs * 1e12

    def seconds(config: dict[str, int]) -> float:
        stages = _STAGE_COST.get(config["num_stages"], 1.0)
        low = 2.0 if height(config) < full_height else 1.0
        idle = 1 + gpu.sm_count / programs(config)
        matrix = flops(config) / rate * stages * low * idle * (1 + _STEP_ROWS / streamed(config))
        moving = (traffic(config) / _L2_OVER_MEMORY + memory(config) / _MEMORY_EFFICIENCY) / bandwidth
        together = resident(config)
        exposed = max(1.0, _HIDING_WARPS / (together * config["num_warps"])) ** 0.75 * (1.12 if together == 1 else 1.0)
        overlap = min(2.0, 0.5 + together / 2)
        return exposed * (matrix**overlap + moving**overlap) ** (1 / overlap)

    return seconds


def _resident_programs(kernel: Kernel, sizes: Mapping[sympy.Symbol, int], gpu: Gpu) -> Callable[[dict[str, int]], int]:
    """The number of programs of a configuration that are expected to share a multiprocessor."""
    shared_memory = shared_memory_of(kernel, sizes, gpu)
    registers = _numeric(kernel.resources.registers, sizes)

    def programs(config: dict[str, int]) -> int:
        threads = config["num_warps"] * gpu.warp_size
        a_thread = min(gpu.registers_per_thread, 32 + _REGISTERS_TAKEN * registers(config) / threads)
        by_registers = gpu.registers_per_sm / (threads * a_thread)
        by_memory = gpu.shared_memory_per_sm / (shared_memory(config) + _RESERVED_MEMORY)
        return max(1, int(min(by_registers, by_memory, _MOST_RESIDENT)))

    return programs


def matrix_rate(gpu: Gpu, sizes: Mapping[sympy.Symbol, int]) -> float:
    """Peak FLOP/s of products in the spec's dtype. float32 is assumed to be in IEEE precision."""
    return gpu.bf16_tflops * 1e12 / (_IEEE_SLOWDOWN if sizes[s.E] == 4 else 1)


def choose(kernel: Kernel, sizes: Mapping[sympy.Symbol, int], gpu: Gpu) -> Config:
    """The cost model's choice for a device: least modelled time, then deepest pipeline, then fewest warps.

    If no configuration is expected to fit the device, the one with the smallest needs is chosen. The estimate is
    conservative, and ahead-of-time compilation shows whether it fits.
    """
    test = fits(kernel, sizes, gpu)
    legal = [config for config in candidates(kernel) if test(config)]
    if not legal:
        return _least(kernel, sizes, gpu)
    seconds = modelled_seconds(kernel, sizes, gpu)
    best = min(legal, key=lambda config: (seconds(config), -config["num_stages"], config["num_warps"]))
    return Config(kernel.name, tuple(best.items()))


def _least(kernel: Kernel, sizes: Mapping[sympy.Symbol, int], gpu: Gpu) -> Config:
    """The configuration with the least shared memory, then the fewest registers per thread."""
    shared_memory = shared_memory_of(kernel, sizes, gpu)
    registers = _numeric(kernel.resources.registers, sizes)
    best = min(
        filter(_keeping(kernel, sizes), candidates(kernel)),
        key=lambda config: (shared_memory(config), registers(config) / config["num_warps"]),
    )
    return Config(kernel.name, tuple(best.items()))


def _keeping(kernel: Kernel, sizes: Mapping[sympy.Symbol, int]) -> Callable[[dict[str, int]], bool]:
    """A test whether a configuration satisfies the kernel's own constraints, whatever the device."""
    constraints = [_numeric(constraint, sizes) for constraint in kernel.constraints]
    return lambda config: all(constraint(config) for constraint in constraints)


def legal(
    kernel: Kernel, sizes: Mapping[sympy.Symbol, int], kept: Mapping[str, tuple[int, ...]]
) -> Iterator[dict[str, int]]:
    """Configurations that satisfy a kernel's own constraints. `kept` replaces the values of some tunables."""
    names = [tunable.name for tunable in kernel.tunables]
    values = itertools.product(*(kept.get(tunable.name, tunable.values) for tunable in kernel.tunables))
    return filter(_keeping(kernel, sizes), (dict(zip(names, each, strict=True)) for each in values))


def smallest(kernel: Kernel, sizes: Mapping[sympy.Symbol, int]) -> Config:
    """The smallest legal tiles, so that a short sequence on the interpreter still crosses tile edges."""
    best = next(filter(_keeping(kernel, sizes), candidates(kernel)))
    return Config(kernel.name, tuple(best.items()))


def _numeric(expression: sympy.Basic, sizes: Mapping[sympy.Symbol, int]) -> Callable[[dict[str, int]], float]:
    """An expression as a function of a configuration. `sizes` may lack B and T; then a typical call's are used."""
    known = {symbol.name: value for symbol, value in {**_TYPICAL_CALL, **sizes}.items()}
    names = _names(expression)
    tunables = tuple(name for name in names if name not in known)
    sized = tuple(name for name in names if name in known)
    # Known symbols come first and are bound here, so only tunables are looked up in a configuration.
    function = functools.partial(_compiled(expression, sized + tunables), *(known[name] for name in sized))
    if not tunables:
        value = function()
        return lambda config: value
    if len(tunables) == 1:
        (only,) = tunables
        return lambda config: function(config[only])
    values_of = operator.itemgetter(*tunables)
    return lambda config: function(*values_of(config))


@functools.cache
def _names(expression: sympy.Basic) -> tuple[str, ...]:
    return tuple(sorted(symbol.name for symbol in expression.free_symbols))


@functools.cache
def _compiled(expression: sympy.Basic, names: tuple[str, ...]) -> Callable[..., float]:
    """An expression as a function of the values of `names`, in this order: a faster `sympy.lambdify`."""
    return eval(f"lambda {', '.join(names)}: {_PRINTER.doprint(expression)}", {"math": math})


_PRINTER = PythonCodePrinter()
