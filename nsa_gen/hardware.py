"""The table of GPU data that the cost model, the tile filter and the ahead-of-time compiler use.

This module imports only the standard library. So every package may import it, and `nsa-gen check` stays fast.

The numbers are the vendors' published ones for the board named in `product`: dense (not sparse) bfloat16 matrix
throughput with float32 accumulation, peak memory bandwidth, and the limits in the CUDA and HIP programming guides (for
CUDA, the table of technical specifications by compute capability). They are peaks: a floor computed from them is a
lower bound of the time, never a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Backend = Literal["cuda", "hip"]
TENSOR_MEMORY_COLUMNS = 512
"""Columns of the tensor memory of a Blackwell multiprocessor. A column has 128 numbers of 32 bits."""


@dataclass(frozen=True)
class Gpu:
    """What one device offers a kernel.

    Attributes:
        key: short name used on the command line and in file names, e.g. "h100".
        name: what to call the device in a report.
        product: part of the name that the driver reports; `gpu_for_device` looks for it.
        target: the compiler's name for the architecture, e.g. "sm_90" or "gfx942".
        backend: "cuda" or "hip".
        warp_size: threads that run in lockstep.
        shared_memory_per_block: bytes of shared memory (LDS) that one block may use, including opt-in memory.
        shared_memory_per_sm: bytes of shared memory that one multiprocessor divides among its resident blocks.
        registers_per_sm: 32-bit registers of one multiprocessor (including the accumulation registers of CDNA).
        registers_per_thread: most registers that one thread may hold before the compiler must spill.
        threads_per_block: most threads that one block may have.
        sm_count: multiprocessors (compute units).
        bf16_tflops: dense bfloat16 matrix throughput, TFLOP/s.
        bandwidth_tbs: peak memory bandwidth, TB/s (10^12 bytes per second).
        l2_bytes: capacity of the L2 cache, all partitions together.
        source: the vendor's document with throughput, bandwidth, number of multiprocessors and L2 capacity.
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
        """The architecture whose default configurations this device uses: its own, or the one in SHARED_TABLES."""
        return SHARED_TABLES.get(self.target, self.target)


_BOARDS = (
    # key, name, product, target, KiB of shared memory per multiprocessor, multiprocessors, TFLOP/s, TB/s, MiB of L2
    ("a100", "A100 SXM 80 GB", "A100", "sm_80", 164, 108, 312.0, 2.039, 40),
    ("rtx3090", "GeForce RTX 3090", "RTX 3090", "sm_86", 100, 82, 71.0, 0.936, 6),
    # Half of the 85 TOPS for dense int8 products in the brief.
    ("orin", "Jetson AGX Orin 64 GB", "Orin", "sm_87", 164, 16, 42.5, 0.2048, 4),
    ("rtx4090", "GeForce RTX 4090", "RTX 4090", "sm_89", 100, 128, 165.2, 1.008, 72),
    ("h100", "H100 SXM", "H100", "sm_90", 228, 132, 989.4, 3.35, 50),
    ("h200", "H200 SXM", "H200", "sm_90", 228, 132, 989.4, 4.8, 60),
    ("b200", "B200", "B200", "sm_100", 228, 148, 2250.0, 8.0, 126),
    ("b300", "B300", "B300", "sm_103", 228, 160, 2250.0, 8.0, 126),
    ("rtx5090", "GeForce RTX 5090", "RTX 5090", "sm_120", 100, 170, 209.5, 1.792, 96),
    # An eighth of the petaFLOP/s for sparse FP4 products in the data sheet.
    ("gb10", "GB10 (DGX Spark)", "GB10", "sm_121", 100, 48, 125.0, 0.273, 24),
    ("mi300x", "Instinct MI300X", "MI300X", "gfx942", 64, 304, 1307.4, 5.3, 32),
    ("mi355x", "Instinct MI355X", "MI355X", "gfx950", 160, 256, 2516.6, 8.0, 32),
)
_SOURCES = {
    "a100": "NVIDIA A100 Tensor Core GPU data sheet",
    "rtx3090": "NVIDIA Ampere GA102 GPU Architecture white paper",
    "orin": "NVIDIA Jetson AGX Orin Series Technical Brief",
    "rtx4090": "NVIDIA Ada GPU Architecture white paper",
    "h100": "NVIDIA H100 Tensor Core GPU data sheet",
    "h200": "NVIDIA H200 Tensor Core GPU data sheet",
    "b200": "NVIDIA HGX B200 data sheet; Blackwell Tuning Guide",
    "b300": "NVIDIA HGX B300 data sheet; Inside NVIDIA Blackwell Ultra (NVIDIA Technical Blog)",
    "rtx5090": "NVIDIA RTX Blackwell GPU Architecture white paper",
    "gb10": "NVIDIA DGX Spark data sheet",
    "mi300x": "AMD Instinct MI300X data sheet",
    "mi355x": "AMD Instinct MI355X data sheet",
}


def _gpu(
    key: str,
    name: str,
    product: str,
    target: str,
    shared_kib: int,
    sm_count: int,
    bf16_tflops: float,
    bandwidth_tbs: float,
    l2_mib: int,
) -> Gpu:
    """A board with its vendor's limits: those of CUDA from compute capability 8.0, or of HIP from CDNA 3.

    One block may use all shared memory of an AMD multiprocessor, and all except 1 KiB on NVIDIA.
    """
    amd = target.startswith("gfx")
    return Gpu(
        key=key,
        name=name,
        product=product,
        target=target,
        backend="hip" if amd else "cuda",
        warp_size=64 if amd else 32,
        shared_memory_per_block=(shared_kib - (0 if amd else 1)) * 1024,
        shared_memory_per_sm=shared_kib * 1024,
        registers_per_sm=131_072 if amd else 65_536,
        registers_per_thread=512 if amd else 255,
        threads_per_block=1024,
        sm_count=sm_count,
        bf16_tflops=bf16_tflops,
        bandwidth_tbs=bandwidth_tbs,
        l2_bytes=l2_mib * 2**20,
        source=_SOURCES[key],
    )


GPUS: tuple[Gpu, ...] = tuple(_gpu(*board) for board in _BOARDS)
"""All known devices, grouped by vendor, oldest first."""

SHARED_TABLES: dict[str, str] = {
    "sm_86": "sm_120",
    "sm_87": "sm_80",
    "sm_89": "sm_120",
    "sm_103": "sm_100",
    "sm_121": "sm_120",
}
"""Architectures without their own default configurations, and the architecture whose configurations each one uses.

Both have the matrix instructions that Triton uses on the latter, and the same shared memory per block. According to the
cost model, the operators of the shipped specs lose less than 1%. On sm_121, whose board has a quarter of the memory
bandwidth per FLOP, they lose up to 14%.
"""

TARGETS: tuple[str, ...] = tuple(dict.fromkeys(gpu.target for gpu in GPUS))
"""All architectures for which kernels may be compiled."""

TABLES: tuple[str, ...] = tuple(target for target in TARGETS if target not in SHARED_TABLES)
"""Architectures with their own default configurations. Kernels are compiled for these unless others are named."""


_KEYS = {gpu.key: gpu for gpu in GPUS}
_FIRST_OF_TARGET = {gpu.target: gpu for gpu in reversed(GPUS)}


class UnknownGpuError(ValueError):
    """The name is neither a known device nor a known architecture. The message lists the known names."""


def gpu(key: str) -> Gpu:
    """The device with this key (`"h100"`), in upper or lower case.

    Raises:
        UnknownGpuError: there is no such key.
    """
    return _named(key, f"gpu: expected one of {', '.join(_KEYS)}", _KEYS)


def gpu_for_target(target: str) -> Gpu:
    """The first device of an architecture, for the limits of its family: `"sm_90"` (or `"SM_90"`) gives the H100.

    Raises:
        UnknownGpuError: there is no such architecture.
    """
    return _named(target, f"target: expected one of {', '.join(TARGETS)}", _FIRST_OF_TARGET)


def find_gpu(name: str) -> Gpu:
    """The device with a key (`"h100"`), or the first of an architecture (`"sm_90"`), in upper or lower case.

    Raises:
        UnknownGpuError: the name is neither.
    """
    devices, architectures = ", ".join(_KEYS), ", ".join(TARGETS)
    expected = f"gpu: expected a device ({devices}) or an architecture ({architectures})"
    return _named(name, expected, {**_FIRST_OF_TARGET, **_KEYS})


def _named(name: str, expected: str, known: dict[str, Gpu]) -> Gpu:
    found = known.get(name.strip().lower())
    if found is None:
        raise UnknownGpuError(f"{expected}, got {name!r:.60}")
    return found


def gpu_for_device(device_name: str) -> Gpu | None:
    """The device with this driver name, e.g. "NVIDIA H100 80GB HBM3", or None if the table does not have it.

    Boards of one family differ: an "NVIDIA H100 PCIe" has fewer multiprocessors and less bandwidth than the H100 SXM in
    the table. Ask the driver for numbers that must be exact, and use the table for the limits of the architecture.
    """
    name = device_name.lower()
    for candidate in GPUS:
        if candidate.product.lower() in name:
            return candidate
    return None


def target_of(properties: Any, *, hip: bool) -> str:
    """The architecture of a device from `torch.cuda.get_device_properties`. `hip`: torch is built for ROCm."""
    return properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
