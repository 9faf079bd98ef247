"""Run by test_workers: launches kernels on a GPU that is none, by Triton and past it, says so, and hangs.

Triton compiles them in earnest; only its driver, which loads and launches machine code, is replaced.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

from nsa_gen.hangs import note_launches, watched

watched()
note_launches()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from generated.tiny.runtime.launch import lean  # noqa: E402

launched: list[int] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        launched.append(arguments[4])


class Driver:
    launcher_cls = Launcher
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
        load_binary=lambda name, *_: (object(), hash(name), 32, 0, 1024),
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@triton.jit
def first_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), 1.0)


@triton.jit
def second_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), 2.0)


def main() -> None:
    triton.runtime.driver._active = Driver()
    x = torch.empty(64)
    first, second = lean(first_kernel), lean(second_kernel)
    for kernel in (first, second, *(first_kernel, second_kernel, first, second)[: int(sys.argv[1])]):
        kernel[(1,)](x, SIZE=64, num_warps=4)
    assert len(launched) == 2 + int(sys.argv[1]), launched
    assert first._found and second._found, "launched past Triton from the second time on"
    print("begun", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
