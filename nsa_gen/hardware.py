"""The one table of GPU facts: what the cost model, the tile filter and the ahead-of-time compiler know of each device.

A leaf module: it imports the standard library alone, so every room may read it and `nsa-gen check` stays fast.

Figures are the vendors' published ones for the board named in `product`: dense (not sparse) bfloat16 matrix throughput
with float32 accumulation, peak memory bandwidth, and the limits of the CUDA and HIP programming guides. They are peaks:
a floor computed from them is a lower bound of the time, never a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Backend = Literal["cuda", "hip"]
TENSOR_MEMORY_COLUMNS = 512
"""Of the tensor memory of a multiprocessor of Blackwell, 128 numbers of 32 bits each."""


@dataclass(frozen=True)
class Gpu:
    """What one device offers a kernel.

    Attributes:
        key: short name used on the command line and in file names, e.g. "h100".
        name: what to call the device in a report.
        product: part of the name the driver reports; decides `gpu_for_device`.
        target: the compiler's name of the architecture, e.g. "sm_90" or "gfx942".
        backend: "cuda" or "hip".
        warp_size: threads that run in lockstep.
        shared_memory_per_block: bytes of shared memory (LDS) one block may use, opt-in included.
        shared_memory_per_sm: bytes of shared memory one multiprocessor divides among its resident blocks.
        registers_per_sm: 32-bit registers of one multiprocessor (the accumulation registers of CDNA included).
        registers_per_thread: most registers one thread may hold before the compiler must spill.
        threads_per_block: most threads one block may have.
        sm_count: multiprocessors (compute units).
        bf16_tflops: dense bfloat16 matrix throughput, TFLOP/s.
        bandwidth_tbs: peak memory bandwidth, TB/s (10^12 bytes a second).
        l2_bytes: capacity of the L2 cache, all partitions together.
    """

    key: str
    name: str
    product: str
    target: str
    backend: Backend
    warp_size: int
    shared_memory_per_block: int
    shared_memory_per_sm: int
    registers_per_sm: int
    registers_per_thread: int
    threads_per_block: int
    sm_count: int
    bf16_tflops: float
    bandwidth_tbs: float
    l2_bytes: int


_KIB = 1024
_MIB = 1024 * 1024

GPUS: tuple[Gpu, ...] = (
    Gpu(
        key="a100",
        name="A100 SXM 80 GB",
        product="A100",
        target="sm_80",
        backend="cuda",
        warp_size=32,
        shared_memory_per_block=163 * _KIB,
        shared_memory_per_sm=164 * _KIB,
        registers_per_sm=65_536,
        registers_per_thread=255,
        threads_per_block=1024,
        sm_count=108,
        bf16_tflops=312.0,
        bandwidth_tbs=2.039,
        l2_bytes=40 * _MIB,
    ),
    Gpu(
        key="h100",
        name="H100 SXM",
        product="H100",
        target="sm_90",
        backend="cuda",
        warp_size=32,
        shared_memory_per_block=227 * _KIB,
        shared_memory_per_sm=228 * _KIB,
        registers_per_sm=65_536,
        registers_per_thread=255,
        threads_per_block=1024,
        sm_count=132,
        bf16_tflops=989.4,
        bandwidth_tbs=3.35,
        l2_bytes=50 * _MIB,
    ),
    Gpu(
        key="h200",
        name="H200 SXM",
        product="H200",
        target="sm_90",
        backend="cuda",
        warp_size=32,
        shared_memory_per_block=227 * _KIB,
        shared_memory_per_sm=228 * _KIB,
        registers_per_sm=65_536,
        registers_per_thread=255,
        threads_per_block=1024,
        sm_count=132,
        bf16_tflops=989.4,
        bandwidth_tbs=4.8,
        l2_bytes=60 * _MIB,
    ),
    Gpu(
        key="b200",
        name="B200",
        product="B200",
        target="sm_100",
        backend="cuda",
        warp_size=32,
        shared_memory_per_block=227 * _KIB,
        shared_memory_per_sm=228 * _KIB,
        registers_per_sm=65_536,
        registers_per_thread=255,
        threads_per_block=1024,
        sm_count=148,
        bf16_tflops=2250.0,
        bandwidth_tbs=8.0,
        l2_bytes=126 * _MIB,
    ),
    Gpu(
        key="rtx5090",
        name="GeForce RTX 5090",
        product="RTX 5090",
        target="sm_120",
        backend="cuda",
        warp_size=32,
        shared_memory_per_block=99 * _KIB,
        shared_memory_per_sm=100 * _KIB,
        registers_per_sm=65_536,
        registers_per_thread=255,
        threads_per_block=1024,
        sm_count=170,
        bf16_tflops=209.5,
        bandwidth_tbs=1.792,
        l2_bytes=96 * _MIB,
    ),
    Gpu(
        key="mi300x",
        name="Instinct MI300X",
        product="MI300X",
        target="gfx942",
        backend="hip",
        warp_size=64,
        shared_memory_per_block=64 * _KIB,
        shared_memory_per_sm=64 * _KIB,
        registers_per_sm=131_072,
        registers_per_thread=512,
        threads_per_block=1024,
        sm_count=304,
        bf16_tflops=1307.4,
        bandwidth_tbs=5.3,
        l2_bytes=32 * _MIB,
    ),
)
"""Every device known, oldest first."""

TARGETS: tuple[str, ...] = tuple(dict.fromkeys(gpu.target for gpu in GPUS))
"""Every architecture kernels are compiled for: sm_80, sm_90, sm_100, sm_120, gfx942."""


class UnknownGpuError(ValueError):
    """A name is neither a known device nor a known architecture; the message lists the known ones."""


def gpu(key: str) -> Gpu:
    """The device with this key (`"h100"`), in any case.

    Raises:
        UnknownGpuError: no such key.
    """
    for candidate in GPUS:
        if candidate.key == key.strip().lower():
            return candidate
    raise UnknownGpuError(f"gpu: expected one of {', '.join(g.key for g in GPUS)}, got {key!r}")


def gpu_for_target(target: str) -> Gpu:
    """The first device of an architecture (`"sm_90"` gives the H100), in any case; it stands for its family's limits.

    Raises:
        UnknownGpuError: no such architecture.
    """
    for candidate in GPUS:
        if candidate.target == target.strip().lower():
            return candidate
    raise UnknownGpuError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")


def find_gpu(name: str) -> Gpu:
    """The device meant by a key (`"h100"`) or an architecture (`"sm_90"`), in any case.

    Raises:
        UnknownGpuError: neither.
    """
    wanted = name.strip().lower()
    for candidate in GPUS:
        if wanted == candidate.key:
            return candidate
    for candidate in GPUS:
        if wanted == candidate.target:
            return candidate
    devices, architectures = ", ".join(g.key for g in GPUS), ", ".join(TARGETS)
    raise UnknownGpuError(f"gpu: expected a device ({devices}) or an architecture ({architectures}), got {name!r}")


def gpu_for_device(device_name: str) -> Gpu | None:
    """The device a driver's name means, e.g. "NVIDIA H100 80GB HBM3"; None when it is not in the table.

    Boards of one family differ (an "NVIDIA H100 PCIe" has fewer multiprocessors and less bandwidth than the H100 SXM
    in the table): what must be exact is asked of the driver, and the table serves the limits of the architecture.
    """
    name = device_name.lower()
    for candidate in GPUS:
        if candidate.product.lower() in name:
            return candidate
    return None
