"""The one table of GPU facts: what the cost model, the tile filter and the ahead-of-time compiler know of each device.

A leaf module: it imports the standard library alone, so every room may read it and `nsa-gen check` stays fast.

Figures are the vendors' published ones for the board named in `product`: dense (not sparse) bfloat16 matrix throughput
with float32 accumulation, peak memory bandwidth, and the limits of the CUDA and HIP programming guides (for CUDA the
table of technical specifications by compute capability). They are peaks: a floor computed from them is a lower bound of
the time, never a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
        source: the vendor's document that throughput, bandwidth, multiprocessors and L2 are from.
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
    source: str

    @property
    def table(self) -> str:
        """The architecture whose default configurations it launches with: its own, or one that it shares them with."""
        return SHARED_TABLES.get(self.target, self.target)


_KIB = 1024
_MIB = 1024 * 1024


def _nvidia(*, shared_memory_per_sm: int, **facts: Any) -> Gpu:
    """A CUDA device of compute capability 8.0 or newer: a block may use all shared memory but 1 KiB."""
    limits = {"warp_size": 32, "registers_per_sm": 65_536, "registers_per_thread": 255, "threads_per_block": 1024}
    a_block = shared_memory_per_sm - _KIB
    return Gpu(
        backend="cuda", shared_memory_per_block=a_block, shared_memory_per_sm=shared_memory_per_sm, **limits, **facts
    )


def _amd(*, shared_memory_per_sm: int, **facts: Any) -> Gpu:
    """A HIP device of CDNA 3 or newer: a block may use all of the LDS."""
    limits = {"warp_size": 64, "registers_per_sm": 131_072, "registers_per_thread": 512, "threads_per_block": 1024}
    memory = {"shared_memory_per_block": shared_memory_per_sm, "shared_memory_per_sm": shared_memory_per_sm}
    return Gpu(backend="hip", **memory, **limits, **facts)


GPUS: tuple[Gpu, ...] = (
    _nvidia(
        key="a100",
        name="A100 SXM 80 GB",
        product="A100",
        target="sm_80",
        shared_memory_per_sm=164 * _KIB,
        sm_count=108,
        bf16_tflops=312.0,
        bandwidth_tbs=2.039,
        l2_bytes=40 * _MIB,
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    _nvidia(
        key="rtx3090",
        name="GeForce RTX 3090",
        product="RTX 3090",
        target="sm_86",
        shared_memory_per_sm=100 * _KIB,
        sm_count=82,
        bf16_tflops=71.0,
        bandwidth_tbs=0.936,
        l2_bytes=6 * _MIB,
        source="NVIDIA Ampere GA102 GPU Architecture white paper",
    ),
    _nvidia(
        key="orin",
        name="Jetson AGX Orin 64 GB",
        product="Orin",
        target="sm_87",
        shared_memory_per_sm=164 * _KIB,
        sm_count=16,
        # Half of the 85 TOPS of dense int8 products that the brief gives.
        bf16_tflops=42.5,
        bandwidth_tbs=0.2048,
        l2_bytes=4 * _MIB,
        source="NVIDIA Jetson AGX Orin Series Technical Brief",
    ),
    _nvidia(
        key="rtx4090",
        name="GeForce RTX 4090",
        product="RTX 4090",
        target="sm_89",
        shared_memory_per_sm=100 * _KIB,
        sm_count=128,
        bf16_tflops=165.2,
        bandwidth_tbs=1.008,
        l2_bytes=72 * _MIB,
        source="NVIDIA Ada GPU Architecture white paper",
    ),
    _nvidia(
        key="h100",
        name="H100 SXM",
        product="H100",
        target="sm_90",
        shared_memory_per_sm=228 * _KIB,
        sm_count=132,
        bf16_tflops=989.4,
        bandwidth_tbs=3.35,
        l2_bytes=50 * _MIB,
        source="NVIDIA H100 Tensor Core GPU data sheet",
    ),
    _nvidia(
        key="h200",
        name="H200 SXM",
        product="H200",
        target="sm_90",
        shared_memory_per_sm=228 * _KIB,
        sm_count=132,
        bf16_tflops=989.4,
        bandwidth_tbs=4.8,
        l2_bytes=60 * _MIB,
        source="NVIDIA H200 Tensor Core GPU data sheet",
    ),
    _nvidia(
        key="b200",
        name="B200",
        product="B200",
        target="sm_100",
        shared_memory_per_sm=228 * _KIB,
        sm_count=148,
        bf16_tflops=2250.0,
        bandwidth_tbs=8.0,
        l2_bytes=126 * _MIB,
        source="NVIDIA HGX B200 data sheet; Blackwell Tuning Guide",
    ),
    _nvidia(
        key="b300",
        name="B300",
        product="B300",
        target="sm_103",
        shared_memory_per_sm=228 * _KIB,
        sm_count=160,
        bf16_tflops=2250.0,
        bandwidth_tbs=8.0,
        l2_bytes=126 * _MIB,
        source="NVIDIA HGX B300 data sheet; Inside NVIDIA Blackwell Ultra (NVIDIA Technical Blog)",
    ),
    _nvidia(
        key="rtx5090",
        name="GeForce RTX 5090",
        product="RTX 5090",
        target="sm_120",
        shared_memory_per_sm=100 * _KIB,
        sm_count=170,
        bf16_tflops=209.5,
        bandwidth_tbs=1.792,
        l2_bytes=96 * _MIB,
        source="NVIDIA RTX Blackwell GPU Architecture white paper",
    ),
    _nvidia(
        key="gb10",
        name="GB10 (DGX Spark)",
        product="GB10",
        target="sm_121",
        shared_memory_per_sm=100 * _KIB,
        sm_count=48,
        # An eighth of the petaFLOP of sparse FP4 products that the data sheet gives.
        bf16_tflops=125.0,
        bandwidth_tbs=0.273,
        l2_bytes=24 * _MIB,
        source="NVIDIA DGX Spark data sheet",
    ),
    _amd(
        key="mi300x",
        name="Instinct MI300X",
        product="MI300X",
        target="gfx942",
        shared_memory_per_sm=64 * _KIB,
        sm_count=304,
        bf16_tflops=1307.4,
        bandwidth_tbs=5.3,
        l2_bytes=32 * _MIB,
        source="AMD Instinct MI300X data sheet",
    ),
    _amd(
        key="mi355x",
        name="Instinct MI355X",
        product="MI355X",
        target="gfx950",
        shared_memory_per_sm=160 * _KIB,
        sm_count=256,
        bf16_tflops=2516.6,
        bandwidth_tbs=8.0,
        l2_bytes=32 * _MIB,
        source="AMD Instinct MI355X data sheet",
    ),
)
"""Every device known, oldest first, those of one vendor together."""

SHARED_TABLES: dict[str, str] = {
    "sm_86": "sm_120",
    "sm_87": "sm_80",
    "sm_89": "sm_120",
    "sm_103": "sm_100",
    "sm_121": "sm_120",
}
"""Architectures without default configurations of their own, and whose they take.

Each has the matrix instructions that Triton uses on the other, and as much shared memory a block. By the cost model the
operators of the shipped specs lose less than 1% by it; on sm_121, whose board has a quarter of the memory bandwidth for
its FLOPs, up to 14%.
"""

TARGETS: tuple[str, ...] = tuple(dict.fromkeys(gpu.target for gpu in GPUS))
"""Every architecture that kernels may be compiled for."""

TABLES: tuple[str, ...] = tuple(target for target in TARGETS if target not in SHARED_TABLES)
"""The architectures that have default configurations of their own: compiled for where none is named."""


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
    raise UnknownGpuError(f"gpu: expected one of {', '.join(g.key for g in GPUS)}, got {key!r:.60}")


def gpu_for_target(target: str) -> Gpu:
    """The first device of an architecture (`"sm_90"` gives the H100), in any case; it stands for its family's limits.

    Raises:
        UnknownGpuError: no such architecture.
    """
    for candidate in GPUS:
        if candidate.target == target.strip().lower():
            return candidate
    raise UnknownGpuError(f"target: expected one of {', '.join(TARGETS)}, got {target!r:.60}")


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
    raise UnknownGpuError(f"gpu: expected a device ({devices}) or an architecture ({architectures}), got {name!r:.60}")


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
