"""Kernel launches with low host overhead: compiled kernels are cached here, and later launches bypass Triton.

Triton's own launch binds arguments, reads knobs and compares every global that the kernel uses, which takes about
30 us. `lean` caches the compiled kernel under a key at least as fine as Triton's, and calls it directly in later
launches. `prepare` goes further: for calls of equal sizes it does the work that depends only on sizes once, so that
each launch handles only the tensors.
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

# Versions of Triton for which the direct launch below is correct. With others, Triton launches the kernels.
KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))

# A function that launches a kernel on tensors, and the strides of several tensors.
Launch = Callable[..., None]
Strides = tuple[tuple[int, ...], ...]
# Decorator that caches the launches that a function prepares from a configuration and sizes. The cache is bounded,
# since many lengths occur only once.
kept = functools.lru_cache(maxsize=1024)


class Constants(dict[str, Any]):
    """Constants of launches by name, such as a configuration. Never changed after creation, so hashed by identity."""

    __hash__ = object.__hash__  # type: ignore[assignment]


_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
# A compiled kernel: its run function, function handle and metadata, and the constants that follow the arguments.
Found = tuple[Any, int, Any, tuple]

_RUN = JITFunction.run
_ENTER, _EXIT = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook


def lean(kernel: JITFunction) -> Any:
    """Wrap a kernel so that launches, `kernel[grid](*arguments, **constants)`, take less time on the host.

    Pass arguments by position, and constants and options by name. Tensors must be on the current device; only the first
    launch of each kind checks this, in Triton. With a version of Triton that is not in `KNOWN`, the kernel is returned
    unchanged. In the interpreter, a lock runs one launch at a time.
    """
    if not isinstance(kernel, JITFunction):
        return Interpreted(kernel)
    return Lean(kernel) if KNOWN else kernel


def prepare(kernel: Any, grid: tuple[int, ...], *numbers: int, **constants: Any) -> Launch:
    """Return `kernel[grid](*tensors, *numbers, **constants)` as a function of the tensors, any of which may be None.

    The kernel must come from `lean`. Reuse the returned launch, for example with `kept`, to save time on the host.
    """
    if isinstance(kernel, Lean):
        return Prepared(kernel, grid, numbers, constants)
    return lambda *tensors: kernel[grid](*tensors, *numbers, **constants)


class Lean:
    """See `lean`. `kernel` is Triton's kernel. The cache of compiled code lives as long as this object."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self._found: dict[tuple | None, Found] = {}
        self.__name__ = kernel.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        self.launch(grid, arguments, constants)

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> Found | None:
        """Launch the kernel, and return the cache entry for launches of this kind, or None if there is none."""
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
        """Launch through Triton, and cache the compiled kernel if later launches can bypass Triton."""
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
        # By device and the dtypes and alignments of tensors: run function, grid, function handle, metadata, and the
        # arguments after the tensors. None before the first call, since many lengths occur only once.
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
        # Nearly always all pointers are aligned to 16 bytes. The OR of their bits shows this in one test.
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
    """Grid extents along all three axes."""
    return grid if len(grid) == 3 else (*grid, 1, 1)[:3]


class Interpreted:
    """A kernel in Triton's interpreter, which supports only one thread at a time."""

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
    """A lock that all generated packages in this process share: the interpreter patches global state of Triton."""
    from triton.runtime.interpreter import interpreter_builder

    return vars(interpreter_builder).setdefault("nsa_gen_lock", threading.RLock())


def read_kernels(package: str) -> None:
    """Make the interpreter read the source of a package's kernels now rather than at the first launch of each.

    The compiler reads it at import too. Before the first launch, the files may have been generated again.
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
    """Strides of the dims B, T and H of tensors (B, T, H, D), in one tuple, as kernels take them."""
    return row_strides(x.stride() for x in tensors)


def row_strides(strides: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The same, from the strides of tensors, such as a key of prepared launches has."""
    return tuple(stride for each in strides for stride in each[:3])


def observed() -> bool:
    """Whether a hook or knob is active that only Triton's own launch respects, such as a profiler's."""
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
    """The cache key of a launch, and the addresses of the tensors at the start of its arguments.

    Triton compiles again for another device or constant, for a tensor of another dtype or alignment to 16 bytes, and
    for ints with other `classes_of`. The key is None unless the arguments are tensors or None first, and then only
    ints.
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
    # Nearly always all pointers are aligned to 16 bytes. The OR of their bits shows this in one test.
    if bits % 16:
        kinds += [pointer and pointer % 16 for pointer in pointers]
    classes = classes_of(*arguments[len(pointers) :])
    if classes is None:
        return None, pointers
    return (device, classes, *kinds, *constants, *constants.values()), pointers


@functools.lru_cache(maxsize=4096, typed=True)
def classes_of(*numbers: int) -> int | None:
    """The properties of ints on which Triton specializes: equal to 1, divisible by 16, and int32, int64 or uint64.

    The result has four bits per number, after a leading 1, or is None if an argument is not an int. It is an int
    because a tuple would be hashed again at every launch.
    """
    if not all(type(number) is int for number in numbers):
        return None
    classes = 1
    for number in numbers:
        signed, wide = number < 2**63, not -(2**31) <= number < 2**31
        classes = classes << 4 | (number == 1) << 3 | (number % 16 == 0) << 2 | wide << 1 | signed
    return classes
