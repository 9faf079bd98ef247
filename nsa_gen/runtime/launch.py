"""Launches that cost the host little: a kernel that was launched alike before is looked up here, not by Triton.

Triton's own launch binds arguments, reads knobs and compares every global a kernel uses, some 30 us. `lean` keeps what
that found under a key at least as fine as Triton's, and hands later launches to the compiled kernel itself. `prepare`
does once for calls of the same sizes what depends on sizes alone, and leaves the tensors to each launch.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

# Versions of Triton whose compiled kernels are launched as here; others launch by themselves.
KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))

# What launches a kernel on the tensors that it is given, and strides of several tensors.
Launch = Callable[..., None]
Strides = tuple[tuple[int, ...], ...]
# Keeps the launches that a function of a configuration and of sizes prepares, so many at most: lengths that never come
# again are forgotten.
kept = functools.lru_cache(maxsize=1024)


class Constants(dict[str, Any]):
    """Constants of launches by name, such as a configuration: never changed, so that launches are kept by identity."""

    __hash__ = object.__hash__  # type: ignore[assignment]


_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
# What launches a kernel, its function and metadata, and the constants that follow the arguments.
Found = tuple[Any, int, Any, tuple]

_RUN = JITFunction.run
_ENTER, _EXIT = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook


def lean(kernel: JITFunction) -> Any:
    """A kernel that is launched as before, `kernel[grid](*arguments, **constants)`, in less time on the host.

    Arguments come by position, constants and options by name. What they point to is taken to be on the current device,
    as Triton found when it first launched their like. The kernel itself is returned with a version of Triton that is
    not known. In the interpreter, launches wait for each other.
    """
    if not isinstance(kernel, JITFunction):
        return Interpreted(kernel)
    return Lean(kernel) if KNOWN else kernel


def prepare(kernel: Any, grid: tuple[int, ...], *numbers: int, **constants: Any) -> Launch:
    """`kernel[grid](*tensors, *numbers, **constants)` as a function of the tensors, any of which may be None.

    The kernel is one that `lean` returned. The less of a call is prepared anew, the less time it takes: see `kept`.
    """
    if isinstance(kernel, Lean):
        return Prepared(kernel, grid, numbers, constants)
    return lambda *tensors: kernel[grid](*tensors, *numbers, **constants)


class Lean:
    """See `lean`. `kernel` is what Triton made; compiled code is kept for as long as this lives."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self._found: dict[tuple | None, Found] = {}
        self.__name__ = kernel.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        self.launch(grid, arguments, constants)

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> Found | None:
        """Launch; what launches their like without Triton, if it may be kept."""
        if observed() or self.kernel.pre_run_hooks:
            self.kernel[grid](*arguments, **constants)
            return None
        driver: Any = triton.runtime.driver.active
        device = driver.get_current_device()
        key, pointers = key_of(device, arguments, constants)
        found = self._found.get(key)
        if found is None:
            return self._launch_by_triton(key, grid, arguments, constants)
        run, function, metadata, rest = found
        stream, numbers = driver.get_current_stream(device), arguments[len(pointers) :]
        run(*extents_of(grid), stream, function, metadata, None, None, None, *pointers, *numbers, *rest)
        return found

    def _launch_by_triton(
        self, key: tuple | None, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> Found | None:
        """Launch as Triton does, and keep what it launched where later launches may go without it."""
        compiled = self.kernel[grid](*arguments, **constants)
        if key is None or not isinstance(compiled, CompiledKernel):
            return None
        given, named = self.kernel.params[: len(arguments)], self.kernel.params[len(arguments) :]
        as_agreed = not any(each.is_constexpr for each in given)
        as_agreed &= all(each.is_constexpr and each.name in constants for each in named)
        driver: Any = triton.runtime.driver.active
        if as_agreed and driver.get_current_target().backend == "cuda":
            rest = tuple(constants[each.name] for each in named)
            self._found[key] = compiled.run, compiled.function, compiled.packed_metadata, rest
        return self._found.get(key)


class Prepared:
    """See `prepare`."""

    def __init__(
        self, kernel: Lean, grid: tuple[int, ...], numbers: tuple[int, ...], constants: dict[str, Any]
    ) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        # By device, and dtypes and alignments of tensors: what launches, the grid, its function and metadata, and what
        # follows the tensors. None before the first call: many lengths never come again.
        self._found: dict[tuple, tuple[Any, int, int, int, int, Any, tuple]] | None = None

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        if observed() or self._kernel.kernel.pre_run_hooks:
            self._kernel.kernel[self._grid](*tensors, *self._numbers, **self._constants)
            return
        if self._found is None:
            self._found = {}
            self._kernel.launch(self._grid, (*tensors, *self._numbers), self._constants)
            return
        driver: Any = triton.runtime.driver.active
        device = driver.get_current_device()
        kinds: list[Any] = [device]
        pointers: list[int | None] = []
        bits = 0
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
                kinds.append(None)
            else:
                pointer = tensor.data_ptr()
                bits |= pointer
                pointers.append(pointer)
                kinds.append(tensor.dtype)
        # Nearly always all of them are aligned, as the bits that they have between them show.
        if bits % 16:
            kinds += [pointer and pointer % 16 for pointer in pointers]
        key = tuple(kinds)
        found = self._found.get(key)
        if found is None:
            launched = self._kernel.launch(self._grid, (*tensors, *self._numbers), self._constants)
            if launched is not None:
                run, function, metadata, rest = launched
                self._found[key] = run, *extents_of(self._grid), function, metadata, (*self._numbers, *rest)
            return
        run, x, y, z, function, metadata, rest = found
        stream = driver.get_current_stream(device)
        run(x, y, z, stream, function, metadata, None, None, None, *pointers, *rest)


def extents_of(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Programs along all three axes."""
    return grid if len(grid) == 3 else (*grid, 1, 1)[:3]


class Interpreted:
    """A kernel in Triton's interpreter, which can serve one thread at a time."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.__name__ = kernel.__name__
        self._alone = _interpreter_lock()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        with self._alone:
            self.kernel[grid](*arguments, **constants)


def _interpreter_lock() -> threading.RLock:
    """The lock that generated packages of this process share: launches change Triton's language and its one builder."""
    from triton.runtime.interpreter import interpreter_builder

    return vars(interpreter_builder).setdefault("nsa_gen_lock", threading.RLock())


def read_kernels(package: str) -> None:
    """Have the interpreter read a package's kernels now, as the compiler does, and not when each is first launched.

    Until then, their files may have been generated again.
    """
    if not knobs.runtime.interpret:
        return
    from triton.runtime.interpreter import InterpretedFunction

    for module in [module for name, module in tuple(sys.modules.items()) if name.startswith(f"{package}.")]:
        for value in tuple(vars(module).values()):
            kernel = value.kernel if isinstance(value, Interpreted) else value
            if isinstance(kernel, InterpretedFunction):
                kernel.rewrite()


def strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Strides of batch entry, token and head of tensors (B, T, H, D), tensor by tensor, as kernels take them."""
    return row_strides(x.stride() for x in tensors)


def row_strides(strides: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The same of the strides of tensors, such as a launch is kept by."""
    return tuple(stride for each in strides for stride in each[:3])


def observed() -> bool:
    """Whether launches are watched, replaced or changed by something that only Triton's own launch serves."""
    runtime = knobs.runtime
    return bool(
        JITFunction.run is not _RUN
        or runtime.launch_enter_hook is not _ENTER
        or runtime.launch_exit_hook is not _EXIT
        or _ENTER.calls
        or _EXIT.calls
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


def key_of(device: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[tuple | None, list[int | None]]:
    """What decides which machine code serves a launch, and the addresses of the tensors that its arguments begin with.

    Triton compiles anew for another device or constant, for a tensor of another dtype or alignment to 16 bytes, and for
    a number by its `classes_of`. No key serves arguments that are not tensors or None first and then ints.
    """
    kinds: list[Any] = []
    pointers: list[int | None] = []
    bits = 0
    for argument in arguments:
        if type(argument) in _TENSORS:
            pointer = argument.data_ptr()
            bits |= pointer
            pointers.append(pointer)
            kinds.append(argument.dtype)
        elif argument is None:
            pointers.append(None)
            kinds.append(None)
        else:
            break
    # Nearly always all of them are aligned, as the bits that they have between them show.
    if bits % 16:
        kinds += [pointer and pointer % 16 for pointer in pointers]
    classes = classes_of(*arguments[len(pointers) :])
    if classes is None:
        return None, pointers
    return (device, classes, *kinds, *constants, *constants.values()), pointers


@functools.lru_cache(maxsize=4096, typed=True)
def classes_of(*numbers: int) -> int | None:
    """What Triton looks at in ints: whether they are 1, divisible by 16, and of 32 or 64 bits; None for other types.

    Four bits a number, after a leading 1: one int, since tuples are hashed anew by every launch.
    """
    if not all(type(number) is int for number in numbers):
        return None
    classes = 1
    for number in numbers:
        signed, wide = number < 2**63, not -(2**31) <= number < 2**31
        classes = classes << 4 | (number == 1) << 3 | (number % 16 == 0) << 2 | wide << 1 | signed
    return classes
