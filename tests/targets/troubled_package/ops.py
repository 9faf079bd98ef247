"""Kernels too big for some devices, and kernels that do not compile, end the compiler, or never finish."""

import os
import time

import torch
import triton
import triton.language as tl


@triton.jit
def wide_kernel(q, k, o, n):
    """163,840 bytes of shared memory on sm_120: more than it has; fits sm_90."""
    rows, keys, dims = tl.arange(0, 64), tl.arange(0, 128), tl.arange(0, 256)
    query = tl.load(q + rows[:, None] * 256 + dims[None, :])
    total = tl.zeros([64, 128], tl.float32)
    for start in range(0, n, 128):
        total = tl.dot(query, tl.load(k + (start + keys)[None, :] * 256 + dims[:, None]), total)
    tl.store(o + rows[:, None] * 128 + keys[None, :], total)


@triton.jit
def spilling_kernel(x, y, o):
    """512 accumulators a thread, of 255 registers."""
    rows, columns, dims = tl.arange(0, 64), tl.arange(0, 256), tl.arange(0, 16)
    a = tl.load(x + rows[:, None] * 16 + dims[None, :])
    b = tl.load(y + dims[:, None] * 256 + columns[None, :])
    tl.store(o + columns[None, :] * 64 + rows[:, None], tl.exp(tl.dot(a, b)))


@triton.jit
def broken_kernel(x):
    tl.store(x + tl.arange(0, 96), 1.0)


@triton.constexpr_function
def end_the_process():
    getattr(os, "abort")()  # noqa: B009 (Triton refuses to read a direct call of a builtin)


@triton.jit
def deadly_kernel(x):
    end_the_process()
    tl.store(x, 1.0)


@triton.constexpr_function
def dawdle():
    getattr(time, "sleep")(600)  # noqa: B009


@triton.jit
def endless_kernel(x):
    dawdle()
    tl.store(x, 1.0)


@triton.jit
def sound_kernel(x):
    tl.store(x, 1.0)


def trace(tokens: int, batch: int, device: str, packed: bool, passes: tuple[str, ...]) -> None:
    """Launch the kernels named in `passes`; a packed call adds nothing."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    if "wide" in passes:
        wide_kernel[(1,)](empty(64, 256), empty(tokens, 256), empty(64, 128), tokens, num_stages=3)
    if "spilling" in passes:
        spilling_kernel[(1,)](empty(64, 16), empty(16, 256), empty(64, 256), num_warps=1)
    if "broken" in passes:
        broken_kernel[(1,)](empty(96))
    if "misfit" in passes:
        sound_kernel[(1,)](empty(1), 2, 3)
    if "deadly" in passes:
        deadly_kernel[(1,)](empty(1))
    if "endless" in passes:
        endless_kernel[(1,)](empty(1))
    if "untraceable" in passes:
        raise ValueError("heads: expected 4, got 3")
    if "sound" in passes:
        sound_kernel[(1,)](empty(1))
