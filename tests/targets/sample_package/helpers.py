"""A device function and a constant that kernels of another module use."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    return tl.math.exp2(x * LOG2E)
