"""A GPU that is none: Triton's driver and compiled kernels replaced by ones that keep a record of what reaches them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction


@dataclass
class Sent:
    """One launch that reached a compiled kernel; `by_triton` if it came by Triton's own way, which passes hooks on."""

    compiled: FakeKernel
    grid: tuple[int, ...]
    stream: int
    arguments: tuple[Any, ...]
    by_triton: bool


class FakeKernel(CompiledKernel):
    """Machine code without the code."""

    function, packed_metadata = 99, (4, 1, 0)

    def __init__(self, name: str, sent: list[Sent]) -> None:
        self.name, self.sent, self.module = name, sent, None

    def launch_metadata(self, grid: tuple[int, ...], stream: int, *arguments: Any) -> str:
        return "metadata"

    def run(
        self, x: int, y: int, z: int, stream: int, function: int, metadata: tuple, launched: Any, enter: Any,
        leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        assert (function, metadata) == (self.function, self.packed_metadata)
        assert (launched is None) == (enter is None) == (leave is None)
        self.sent.append(Sent(self, (x, y, z), stream, arguments, by_triton=enter is not None))


@dataclass
class FakeMachine:
    """Triton's driver of several devices, and what was compiled for and sent to them."""

    backend: str = "cuda"
    device: int = 0
    sent: list[Sent] = field(default_factory=list)
    compiled: list[FakeKernel] = field(default_factory=list)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32) if self.backend == "cuda" else GPUTarget("hip", "gfx942", 64)


@contextmanager
def fake_machine(backend: str = "cuda") -> Iterator[FakeMachine]:
    """Within the block, Triton's kernels are compiled for and launched on a machine of this kind."""
    machine = FakeMachine(backend)

    def compile_(self: JITFunction, key: Any, signature: Any, device: int, *_: Any) -> FakeKernel:
        machine.compiled.append(FakeKernel(self.__name__, machine.sent))
        self.device_caches[device][0][key] = machine.compiled[-1]
        return machine.compiled[-1]

    with (
        mock.patch.object(triton.runtime.driver, "_active", machine),
        mock.patch.object(JITFunction, "_do_compile", compile_),
    ):
        yield machine
