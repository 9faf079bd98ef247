"""The configurations a kernel may run with on a device, and the cost model's choice among them.

Constraints are symbolic and stated once: a kernel's own, and those that every device imposes. The tuner filters its
candidates with the same functions.
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

#: Registers a thread should spend on accumulators and score tiles; the rest holds addresses, masks and operands.
_REGISTER_SHARE = 0.66
#: Registers that compilers take for each of those: they use what a thread may have.
_REGISTERS_TAKEN = 2.0
#: Fraction of the matrix units' peak that a Triton kernel reaches, and of the L2's bandwidth over the memory's.
_MATRIX_EFFICIENCY = 0.6
_L2_OVER_MEMORY = 2.5
#: Fraction of the memory's peak bandwidth that scattered rows of a head dim reach.
_MEMORY_EFFICIENCY = 0.75
#: Shared memory that a multiprocessor keeps of each program, and programs beyond which none is gained.
_RESERVED_MEMORY, _MOST_RESIDENT = 1024, 8
#: Warps on a multiprocessor that hide one another's waiting.
_HIDING_WARPS = 8
#: Rows of a streamed tile whose products take as long as the fixed cost of a step: barriers, softmax bookkeeping.
_STEP_ROWS = 16
#: Time of a loop by pipeline depth, relative to a deep one: loads that nothing hides, then some.
_STAGE_COST = {1: 1.3, 2: 1.05}
#: AMD's pipeliner overlaps two stages; Triton 3.7 fails on some loops that ask it for more.
_DEEPEST_PIPELINE = {"cuda": 8, "hip": 2}
#: Rows that the matrix units of these architectures, and of those that share their tables, take at a time.
_MATRIX_ROWS = 64
_TALL_TARGETS = ("sm_90", "sm_100")
#: Architectures whose matrix units do not take probabilities from registers.
_STAGED_SCORES = ("sm_100",)
#: float32 products in IEEE precision run on the ordinary units, at about a sixteenth of the bfloat16 matrix rate.
_IEEE_SLOWDOWN = 16
#: A call typical of the lengths that matter; the choice depends on it only through edge waste.
_TYPICAL_CALL = {s.B: 1, s.T: 32768}


def candidates(kernel: Kernel) -> Iterator[dict[str, int]]:
    """Every combination of a kernel's tunables that its own constraints do not depend on a device to judge."""
    names = [tunable.name for tunable in kernel.tunables]
    for values in itertools.product(*(tunable.values for tunable in kernel.tunables)):
        yield dict(zip(names, values, strict=True))


@dataclass(frozen=True)
class Legal:
    """What the tunables of a kernel or a schedule may be, whatever the device.

    Attributes:
        values: legal values by tunable.
        rules: Python expressions over several tunables that must hold as well.
    """

    values: Mapping[str, tuple[int, ...] | range]
    rules: tuple[str, ...] = ()


def legal_space(program: Plan) -> dict[str, Legal]:
    """What a package accepts, by kernel and schedule: the tunables' values, and the kernels' own constraints."""
    found = {kernel.name: _legal(kernel, program.sizes) for kernel in program.kernels}
    return found | {
        decision.name: Legal({each.name: each.legal for each in decision.tunables}) for decision in program.decisions
    }


def _legal(kernel: Kernel, sizes: Mapping[sympy.Symbol, int]) -> Legal:
    """Constraints on one tunable narrow its values; those on several are rules, but for those that always hold."""
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
    """A test of whether a configuration keeps the kernel's constraints and is expected to fit a device."""
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
    """Bytes of shared memory that a block of a configuration is expected to need on a device."""
    staged = int(gpu.table in _STAGED_SCORES)
    return _numeric(kernel.resources.shared_memory, {**sizes, s.SCORES_STAGED: staged})


def modelled_seconds(kernel: Kernel, sizes: Mapping[sympy.Symbol, int], gpu: Gpu) -> Callable[[dict[str, int]], float]:
    """Time of a call by the cost model, in seconds: of the one that `sizes` has B and T of, else of a typical one.

    Matrix work and traffic add up where one or two programs share a multiprocessor, and overlap where many do.
    """
    flops = _numeric(kernel.resources.flops, sizes)
    traffic = _numeric(kernel.resources.traffic, sizes)
    memory = _numeric(kernel.resources.memory, sizes)
    streamed = _numeric(kernel.resources.streamed, sizes)
    height = _numeric(kernel.resources.height, sizes)
    programs = _numeric(kernel.resources.programs, sizes)
    resident = _resident_programs(kernel, sizes, gpu)
    # Where the matrix units take 64 rows, lower tiles run on the older path at about half the rate.
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
    """Programs of a configuration that are expected to share a multiprocessor."""
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
    """Peak FLOP/s of products in the spec's dtype; float32 is taken to be IEEE."""
    return gpu.bf16_tflops * 1e12 / (_IEEE_SLOWDOWN if sizes[s.E] == 4 else 1)


def choose(kernel: Kernel, sizes: Mapping[sympy.Symbol, int], gpu: Gpu) -> Config:
    """The cost model's choice for a device: least modelled time, then deepest pipeline, then fewest warps.

    Where nothing is expected to fit the device, the configuration that needs least of it is chosen: the estimate is
    on the safe side, and compiling ahead of time tells what is true.
    """
    test = fits(kernel, sizes, gpu)
    legal = [config for config in candidates(kernel) if test(config)]
    if not legal:
        return _least(kernel, sizes, gpu)
    seconds = modelled_seconds(kernel, sizes, gpu)
    best = min(legal, key=lambda config: (seconds(config), -config["num_stages"], config["num_warps"]))
    return Config(kernel.name, tuple(best.items()))


def _least(kernel: Kernel, sizes: Mapping[sympy.Symbol, int], gpu: Gpu) -> Config:
    """The configuration whose shared memory, then registers a thread, are least."""
    shared_memory = shared_memory_of(kernel, sizes, gpu)
    registers = _numeric(kernel.resources.registers, sizes)
    best = min(
        filter(_keeping(kernel, sizes), candidates(kernel)),
        key=lambda config: (shared_memory(config), registers(config) / config["num_warps"]),
    )
    return Config(kernel.name, tuple(best.items()))


def _keeping(kernel: Kernel, sizes: Mapping[sympy.Symbol, int]) -> Callable[[dict[str, int]], bool]:
    """A test of whether a configuration keeps the kernel's own constraints, whatever the device."""
    constraints = [_numeric(constraint, sizes) for constraint in kernel.constraints]
    return lambda config: all(constraint(config) for constraint in constraints)


def legal(
    kernel: Kernel, sizes: Mapping[sympy.Symbol, int], kept: Mapping[str, tuple[int, ...]]
) -> Iterator[dict[str, int]]:
    """The configurations that keep a kernel's own constraints, with `kept` in place of some tunables' values."""
    names = [tunable.name for tunable in kernel.tunables]
    values = itertools.product(*(kept.get(tunable.name, tunable.values) for tunable in kernel.tunables))
    return filter(_keeping(kernel, sizes), (dict(zip(names, each, strict=True)) for each in values))


def smallest(kernel: Kernel, sizes: Mapping[sympy.Symbol, int]) -> Config:
    """The smallest legal tiles: on the interpreter a short sequence then still crosses tile edges."""
    best = next(filter(_keeping(kernel, sizes), candidates(kernel)))
    return Config(kernel.name, tuple(best.items()))


def _numeric(expression: sympy.Basic, sizes: Mapping[sympy.Symbol, int]) -> Callable[[dict[str, int]], float]:
    """An expression over tunables as a function of a configuration, with sizes and, lacking one, a typical call."""
    known = {symbol.name: value for symbol, value in {**_TYPICAL_CALL, **sizes}.items()}
    names = _names(expression)
    tunables = tuple(name for name in names if name not in known)
    sized = tuple(name for name in names if name in known)
    # Symbols that are known come first, so that a configuration is asked for its tunables alone.
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
    """An expression as a function of its symbols' values, in the order of their names: a quicker `sympy.lambdify`."""
    return eval(f"lambda {', '.join(names)}: {_PRINTER.doprint(expression)}", {"math": math})


_PRINTER = PythonCodePrinter()
