"""A stand-in for a GPU: everything that the host does for a call, except the driver's work, on any machine.

Tensors are on the CPU, and their values are meaningless: machine code is neither compiled nor launched. What PyTorch
computes between launches, it computes on the CPU, so lengths should be short. `torch.sort` would take longer than
everything else, so it only allocates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

STANDS_FOR = ("NVIDIA H100 80GB HBM3", 132, "sm_90")


class _NoCode(CompiledKernel):
    """Machine code without the code."""

    function, packed_metadata, module = 0, (4, 1, 0), None

    def __init__(self, name: str) -> None:
        self.name = name

    def launch_metadata(self, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        """Do nothing where the driver would be called."""


class _Driver:
    """Triton's driver of one device."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def _compile(self: JITFunction, key: Any, signature: Any, device: int, *_: Any) -> CompiledKernel:
    return self.device_caches[device][0].setdefault(key, _NoCode(self.__name__))


def _sort(x: Tensor, *, stable: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.int64)


@contextmanager
def no_device(module: ModuleType) -> Iterator[None]:
    """Within the block, a package treats CPU tensors as a GPU's. TRITON_INTERPRET must be unset."""
    gpu = module.configs.lookup.Gpu(*STANDS_FOR)
    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver()),
        mock.patch.object(JITFunction, "_do_compile", _compile),
        mock.patch.object(module.runtime.arguments, "INTERPRETED", True),
        mock.patch.object(module.runtime.arguments, "has_checked_values", lambda cu_seqlens: False),
        mock.patch.object(module.configs.TILES, "gpu_of", lambda device: gpu),
        mock.patch.object(torch, "sort", _sort),
    ):
        yield
