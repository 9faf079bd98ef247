"""GPU facts as this room's callers know them; the table itself is `nsa_gen.hardware`, which every room may import."""

from nsa_gen.hardware import GPUS, TABLES, TARGETS, Gpu, UnknownGpuError, find_gpu, gpu, gpu_for_device, gpu_for_target

__all__ = ["GPUS", "TABLES", "TARGETS", "Gpu", "UnknownGpuError", "find_gpu", "gpu", "gpu_for_device", "gpu_for_target"]
