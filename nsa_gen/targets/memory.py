"""Bytes that a package's forward and backward hold at the same time, counted without a GPU.

The package's own launch functions and its autograd function run on tensors without storage, and launches do nothing.
Any length is therefore possible. Counted is what the package allocates and frees on a device.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_gen.targets.launches import launching_by
from nsa_gen.targets.tracing import agreed_values, empty_call

SORT_BYTES = 20
"""Scratch bytes of torch.sort on CUDA per 4-byte element: the numbers 0, 1, ... (8), and CUB's second buffer of keys
and numbers (12). Its results, 4 and 8 bytes, are tensors."""


@dataclass(frozen=True)
class Allocation:
    """One storage: its name in the code that made it, and its first tensor's shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Peak:
    """The most bytes that live at the same time in a pass and the passes before it, without the inputs.

    `at` is the allocation at which the peak was reached; `live` are all storages alive then, the largest first.
    """

    name: str
    bytes: int
    at: str
    live: tuple[Allocation, ...]


class LiveStorages(TorchDispatchMode):
    """Counts the storages that operations make within the block, by name, for as long as anything holds them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = str(folder)
        self._live: dict[int, Allocation] = {}
        self.bytes = 0
        self.forget_peak()

    def forget_peak(self) -> None:
        """Start to look for a peak, from what is alive now."""
        self.peak, self.at, self.at_peak = self.bytes, "the begin", tuple(self._live.values())

    def found(self, name: str) -> Peak:
        """The peak since `forget_peak`."""
        return Peak(name, self.peak, self.at, tuple(sorted(self.at_peak, key=lambda each: -each.bytes)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self._meet(x)
        if func is torch.ops.aten.sort.stable:
            x = args[0]
            self._reach([Allocation(f"{self._name()}: scratch", tuple(x.shape), "bytes", SORT_BYTES * x.numel())])
        return result

    def _meet(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or not size:
            return
        self._live[key] = Allocation(self._name(), tuple(x.shape), str(x.dtype), size)
        self.bytes += size

        def gone() -> None:
            self.bytes -= size
            del self._live[key]

        weakref.finalize(storage, gone)
        self._reach([])

    def _reach(self, besides: Sequence[Allocation]) -> None:
        total = self.bytes + sum(each.bytes for each in besides)
        if total > self.peak:
            self.peak, self.at, self.at_peak = total, self._name(), (*self._live.values(), *besides)

    def _name(self) -> str:
        """Module, function and variable of the package's running code."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.startswith(self._folder):
            frame = frame.f_back
        if frame is None:
            return "torch"
        path = frame.f_code.co_filename
        return f"{Path(path).stem}.{frame.f_code.co_name}: {_assigned(path, frame.f_lineno)}"


@functools.cache
def _assignments(path: str) -> tuple[tuple[int, int, str], ...]:
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    nodes = [each for each in ast.walk(tree) if isinstance(each, ast.Assign)]
    return tuple((each.lineno, each.end_lineno or 0, ast.unparse(each.targets[0])) for each in nodes)


def _assigned(path: str, line: int) -> str:
    """The variable that the statement at a line assigns to; "" if none."""
    found = [each for each in _assignments(path) if each[0] <= line <= each[1]]
    return max(found)[2] if found else ""


def _nothing(*_: Any, **__: Any) -> None:
    """Launch no kernel."""


@contextmanager
def _past_the_dispatcher(library: Any) -> Iterator[None]:
    """Within the block, the package's operators launch as for CUDA tensors, where they would otherwise be traced."""

    def route(name: str, arguments: Sequence[Any]) -> Callable[..., Any]:
        needed = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments)
        return library._eager[name].apply if needed else library._launches[name]

    library._route = route
    try:
        yield
    finally:
        del library._route


def measure_memory(
    package: ModuleType,
    tokens: int,
    target: str,
    batch: int = 1,
    recompute: Sequence[str] = (),
    workspace_bytes: int | None = None,
) -> list[Peak]:
    """Peaks of forward and backward of the whole operator, for a batch of sequences of `tokens` tokens on `target`.

    The output of the forward stays alive in the backward, as if a caller kept it. `recompute` and `workspace_bytes` are
    those of `nsa_attention`. Raises RuntimeError in a process in which Triton interprets kernels.
    """
    arguments, sequences = empty_call(package, tokens, batch, "meta")
    leaves = [x.requires_grad_() for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    library = importlib.import_module(f"{package.__name__}.registration").LIBRARY
    with package.configs.use_target(target), launching_by(_nothing), _past_the_dispatcher(library):
        agreed = agreed_values(package, leaves[0], sequences, " ".join(recompute), workspace_bytes)
        live = LiveStorages(Path(package.__file__ or "").parent)
        with live:
            o = library.call("attention", *arguments, *agreed)[0]
        peaks = [live.found("forward")]
        if "backward" in package.SPEC["passes"]:
            do = torch.empty_like(o)
            live.forget_peak()
            with live:
                gradients = torch.autograd.grad(o, leaves, do)
            peaks.append(live.found("backward"))
            del gradients
    return peaks
