"""The resources of a compiled kernel, read from the binary itself: registers, local memory and shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_gen.hardware import TENSOR_MEMORY_COLUMNS, Gpu


@dataclass(frozen=True)
class Resources:
    """What one block of a kernel needs.

    Attributes:
        threads: threads per block.
        registers: 32-bit registers per thread; None if they could not be read.
        spill_bytes: local memory per thread, in bytes, for values that found no register. None if unknown.
        shared_memory: bytes of shared memory per block.
        tensor_memory: columns of Blackwell's tensor memory (of 512); 0 if the kernel uses none.
        binary_bytes: size of the machine code file.
        unread: why registers and spills are None; empty if they were read.
    """

    threads: int
    registers: int | None
    spill_bytes: int | None
    shared_memory: int
    tensor_memory: int
    binary_bytes: int
    unread: str = ""


_USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+)")


def read_resources(compiled: Any, gpu: Gpu) -> Resources:
    """The resources of a `triton.compiler.CompiledKernel` made for `gpu`. Runs nothing and needs no driver.

    NVIDIA: from `cuobjdump -res-usage` of the cubin; Triton ships this tool. AMD: from the kernel descriptor in the
    assembly, where vector registers include the accumulation registers.
    """
    metadata = compiled.metadata
    binary = compiled.kernel
    if gpu.backend == "cuda":
        registers, spill_bytes, unread = _read_cubin(binary)
    else:
        registers, spill_bytes, unread = parse_amdgcn(compiled.asm["amdgcn"])
    return Resources(
        threads=metadata.num_warps * gpu.warp_size,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_memory=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        binary_bytes=len(binary),
        unread=unread,
    )


def _read_cubin(cubin: bytes) -> tuple[int | None, int | None, str]:
    import triton

    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        return None, None, f"cuobjdump was not found: {error}"
    with tempfile.TemporaryDirectory(prefix="nsa_gen_cubin_") as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        try:
            done = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, None, f"cuobjdump could not run: {error}"
    if done.returncode != 0:
        return None, None, f"cuobjdump exited with {done.returncode}: {done.stderr.strip()[:200]}"
    return parse_res_usage(done.stdout)


def parse_res_usage(text: str) -> tuple[int | None, int | None, str]:
    """Registers and local bytes per thread from the output of `cuobjdump -res-usage`, or why they are missing.

    Triton's kernels declare no local arrays, so their stack frame is what the register allocator spilled.
    """
    found = _USAGE.search(text)
    if found is None:
        return None, None, f"cuobjdump -res-usage does not name REG and STACK: {text.strip()[:200]!r}"
    return int(found["registers"]), int(found["stack"]), ""


def parse_amdgcn(text: str) -> tuple[int | None, int | None, str]:
    """Vector registers and scratch bytes per thread from AMD assembly, or why they are missing."""
    registers = re.search(r"^\s*\.vgpr_count:\s*(\d+)", text, re.MULTILINE)
    scratch = re.search(r"^\s*\.private_segment_fixed_size:\s*(\d+)", text, re.MULTILINE)
    if registers is None or scratch is None:
        return None, None, "the assembly has no .vgpr_count and .private_segment_fixed_size"
    return int(registers[1]), int(scratch[1]), ""


def excess(used: Resources, gpu: Gpu) -> str:
    """The device limits that a block exceeds, in words with both numbers; empty if it fits."""
    if used.shared_memory > gpu.shared_memory_per_block:
        return (
            f"shared memory: {used.shared_memory:,} bytes a block, {gpu.name} has {gpu.shared_memory_per_block:,}; "
            "use a smaller tile or fewer stages"
        )
    if used.tensor_memory > TENSOR_MEMORY_COLUMNS:
        return (
            f"tensor memory: {used.tensor_memory} columns a block, {gpu.name} has {TENSOR_MEMORY_COLUMNS}; "
            "use a smaller tile"
        )
    if used.threads > gpu.threads_per_block:
        return f"threads: {used.threads:,} a block, {gpu.name} admits {gpu.threads_per_block:,}; use fewer warps"
    if used.registers is not None and used.registers * used.threads > gpu.registers_per_sm:
        return (
            f"registers: {used.registers} x {used.threads} threads = {used.registers * used.threads:,} a block, "
            f"{gpu.name} has {gpu.registers_per_sm:,}; use fewer warps or a smaller tile"
        )
    return ""
