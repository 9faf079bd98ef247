"""Record what a package launches, and turn each launch into what Triton's compiler needs.

The generated launch functions are the only statement of a kernel's signature: its arguments, its constants, its number
of warps. Nothing here describes a kernel a second time. The launch functions are called on tensors without storage, and
the launches are caught instead of sent to a device. Triton's own rules, those of its just-in-time compiler, say how
each argument specialises the kernel.

Imports triton, and must run in a process where Triton compiles: `TRITON_INTERPRET` unset.
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
    """A caught `kernel[grid](*arguments, **keywords)` that was not executed.

    Attributes:
        kernel: the `@triton.jit` function.
        arguments: the positional arguments: tensors, numbers, None, tuples.
        keywords: the keyword arguments: constants, `num_warps`, `num_stages`, others.
        grid: programs along each axis.
    """

    kernel: JITFunction
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    grid: Grid

    @property
    def name(self) -> str:
        """The kernel's name, with these constants, for compilers and profilers."""
        return name_with(self.kernel, self.keywords)


@dataclass(frozen=True)
class Specialization:
    """A kernel with everything that decides its machine code, for one architecture.

    Attributes:
        kernel: the `@triton.jit` function.
        source: signature, constants and argument attributes, as the compiler takes them.
        target: the compiler's name for the architecture.
        options: every compile option, including defaults.
        key: 16 hexadecimal digits that are equal exactly when the machine code would be.
    """

    kernel: JITFunction
    source: ASTSource
    target: GPUTarget
    options: Mapping[str, Any]
    key: str

    @property
    def name(self) -> str:
        """The kernel's name, with these constants, for compilers and profilers."""
        return name_with(self.kernel, self.constants)

    @property
    def constants(self) -> dict[str, Any]:
        """The declared `tl.constexpr` parameters by name, without arguments that merely happened to be 1 or None."""
        declared = {parameter.num: parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        return {declared[path[0]]: value for path, value in self.source.constants.items() if path[0] in declared}


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Within the block, every Triton launch of this process is appended to the yielded list, and none reaches a device.

    Launch functions run unchanged, so they may be called on tensors of the "meta" device. Process-wide: do not use it
    while another thread really launches kernels.

    Raises:
        RuntimeError: Triton interprets kernels in this process, so there are no launches to record.
    """
    launches: list[Launch] = []

    def record(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        named = dict(zip(self.arg_names, arguments, strict=False)) | keywords
        launches.append(Launch(self, arguments, keywords, _resolve_grid(grid, named)))

    with launching_by(record):
        yield launches


@contextmanager
def launching_by(run: Callable[..., None]) -> Iterator[None]:
    """Within the block, launches of this process call `run(kernel, *arguments, grid=..., warmup=..., **keywords)`.

    Raises:
        RuntimeError: Triton interprets kernels in this process, so there are no launches to record.
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
    """The name that a kernel gives its specialisation by constants: its `repr`, if it has one. Also in the interpreter.

    A function that several steps share names each specialisation, so that lists of kernels show the step's name.
    """
    named = kernel.kwargs.get("repr") if hasattr(kernel, "kwargs") else kernel._repr
    return kernel.__name__ if named is None else named(SimpleNamespace(constants=constants))


def compiler_target(gpu: Gpu) -> GPUTarget:
    """The architecture in Triton's terms: a compute capability as a number, or AMD's name."""
    arch: int | str = int(gpu.target.removeprefix("sm_")) if gpu.backend == "cuda" else gpu.target
    return GPUTarget(gpu.backend, arch, gpu.warp_size)


def specialize(launch: Launch, gpu: Gpu) -> Specialization:
    """What Triton's just-in-time compiler would compile for this launch on that device.

    Triton's own rules are called here, not copied. A pointer is `*bf16`, and marked divisible by 16 if its address is.
    An integer of 1 and None become constants. An integer divisible by 16 is marked so, and integers beyond 32 bits are
    `i64`. Floats are `fp32`. Tuples are specialised element by element. A tensor without storage has address 0, which
    is aligned as well as a real allocation.

    Raises:
        TypeError: the arguments do not fit the kernel's parameters, or Triton does not accept the type of one.
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
