"""Record what a package launches, and turn each launch into what Triton's compiler needs.

The generated launch functions are the only statement of a kernel's signature: which arguments it gets, which are
constants, how many warps. So nothing here describes a kernel a second time. The launch functions are called on tensors
without storage, the launches are caught instead of sent to a device, and Triton's own rules (the ones its just-in-time
compiler applies) say how each argument specialises the kernel.

Imports triton, and must run in a process where it is not the interpreter: `TRITON_INTERPRET` unset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from nsa_gen.hardware import Gpu

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](*arguments, **keywords)` that did not happen.

    Attributes:
        kernel: the `@triton.jit` function.
        arguments: what was passed by position: tensors, numbers, None, tuples.
        keywords: what was passed by name: constants, `num_warps`, `num_stages`, further arguments.
        grid: programs along each axis.
    """

    kernel: JITFunction
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    grid: Grid

    @property
    def name(self) -> str:
        """What compilers and profilers call the kernel with these constants."""
        return name_with(self.kernel, self.keywords)


@dataclass(frozen=True)
class Specialization:
    """A kernel with everything that decides its machine code, for one architecture.

    Attributes:
        kernel: the `@triton.jit` function.
        source: signature, constants and argument attributes, as the compiler takes them.
        target: the compiler's name of the architecture.
        options: every compile option, defaults written out.
        key: 16 hexadecimal digits; equal exactly when the machine code would be.
    """

    kernel: JITFunction
    source: ASTSource
    target: GPUTarget
    options: Mapping[str, Any]
    key: str

    @property
    def name(self) -> str:
        """What compilers and profilers call the kernel with these constants."""
        return name_with(self.kernel, self.constants)

    @property
    def constants(self) -> dict[str, Any]:
        """The declared `tl.constexpr` parameters by name, not the arguments that merely happened to be 1 or None."""
        declared = {parameter.num: parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        return {declared[path[0]]: value for path, value in self.source.constants.items() if path[0] in declared}


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Within the block every Triton launch of this process is appended to the list it gives, and none reaches a device.

    Launch functions run as they stand, so they may be called on tensors of the "meta" device. Process-wide: not for use
    while another thread launches kernels in earnest.

    Raises:
        RuntimeError: Triton is the interpreter in this process, so there are no launches to record.
    """
    launches: list[Launch] = []

    def record(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        named = dict(zip(self.arg_names, arguments, strict=False)) | keywords
        launches.append(Launch(self, arguments, keywords, _resolve_grid(grid, named)))

    with launching_by(record):
        yield launches


@contextmanager
def launching_by(run: Callable[..., None]) -> Iterator[None]:
    """Within the block `run(kernel, *arguments, grid=..., warmup=..., **keywords)` is what launches of this process do.

    Raises:
        RuntimeError: Triton is the interpreter in this process, so there are no launches to record.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET: expected unset when triton was imported, got the interpreter, which has no launches to "
            "record; start a process without it"
        )
    original = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def _resolve_grid(grid: Grid | int | Callable[[dict[str, Any]], Any], named: dict[str, Any]) -> Grid:
    if callable(grid):
        grid = grid(named)
    return tuple(grid) if isinstance(grid, tuple | list) else (grid,)


def name_with(kernel: Any, constants: Mapping[str, Any]) -> str:
    """The name that a kernel, also the interpreter's, gives its specialisation by constants: its `repr`, if it has one.

    A function that several steps share names each, so that a step is known by its name wherever kernels are listed.
    """
    named = kernel.kwargs.get("repr") if hasattr(kernel, "kwargs") else kernel._repr
    return kernel.__name__ if named is None else named(SimpleNamespace(constants=constants))


def compiler_target(gpu: Gpu) -> GPUTarget:
    """The architecture in Triton's terms: a compute capability as a number, or AMD's name."""
    arch: int | str = int(gpu.target.removeprefix("sm_")) if gpu.backend == "cuda" else gpu.target
    return GPUTarget(gpu.backend, arch, gpu.warp_size)


def specialize(launch: Launch, gpu: Gpu) -> Specialization:
    """What Triton's just-in-time compiler would compile for this launch on that device.

    The rules are Triton's own, called and not restated: a pointer is `*bf16` and marked divisible by 16 when its
    address is, an integer of 1 and a None become constants, an integer divisible by 16 is marked so, integers beyond
    32 bits are `i64`, floats are `fp32`, tuples are specialised element by element. A tensor without storage has
    address 0, which is as well aligned as an allocator's real ones.

    Raises:
        TypeError: the arguments do not fit the kernel's parameters, or one is of a type Triton does not take.
        KeyError: a keyword is neither a parameter nor a compile option.
    """
    kernel, keywords = launch.kernel, dict(launch.keywords)
    target = compiler_target(gpu)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given_options = binder(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, given_options
    )
    make_source = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make_source(kernel, signature, constants, attributes)
    identity = f"{kernel.module}.{kernel.__name__} {source.hash()} {target} {options.hash()}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Specialization(kernel, source, target, dict(options.__dict__), key)
