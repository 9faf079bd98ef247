"""Run by test_carried_bounds in its own process: what Triton's compiler leaves of a value that a loop carries.

Prints JSON: for each kernel how many values its outer loop carries, before and after the passes for the GPU.
"""

import json
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def for_kernel(bounds_ptr, x_ptr, out_ptr, lists):
    total = 0.0
    start = tl.load(bounds_ptr)
    for number in range(lists):
        end = tl.load(bounds_ptr + number + 1)
        for index in range(start, end):
            total += tl.load(x_ptr + index)
        start = end
    tl.store(out_ptr, total)


@triton.jit
def reloading_kernel(bounds_ptr, x_ptr, out_ptr, lists):
    total = 0.0
    for number in range(lists):
        start, end = tl.load(bounds_ptr + number), tl.load(bounds_ptr + number + 1)
        for index in range(start, end):
            total += tl.load(x_ptr + index)
    tl.store(out_ptr, total)


@triton.jit
def while_kernel(bounds_ptr, x_ptr, out_ptr, lists):
    total = 0.0
    start = tl.load(bounds_ptr)
    number = 0
    while number < lists:
        end = tl.load(bounds_ptr + number + 1)
        for index in range(start, end):
            total += tl.load(x_ptr + index)
        start = end
        number += 1
    tl.store(out_ptr, total)


def carried(kernel: triton.JITFunction) -> list[int]:
    """How many values the outermost loop of a kernel carries as Triton reads it, and as it is compiled."""
    signature = {"bounds_ptr": "*i32", "x_ptr": "*fp32", "out_ptr": "*fp32", "lists": "i32"}
    compiled = triton.compile(ASTSource(kernel, signature=signature), target=GPUTarget("cuda", 90, 32))
    loops = [
        re.search(r"scf\.(?:for|while) .*?\) ->|scf\.while \(.*?\)", compiled.asm[form]) for form in ("ttir", "ttgir")
    ]
    return [loop.group().count("=") - loop.group().startswith("scf.for") for loop in loops if loop]


if __name__ == "__main__":
    kernels = (for_kernel, reloading_kernel, while_kernel)
    print(json.dumps({"triton": triton.__version__, **{each.__name__: carried(each) for each in kernels}}))
