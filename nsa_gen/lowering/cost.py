"""What a call costs: FLOPs, bytes and the floor of each kernel, from the symbolic model."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from nsa_gen.hardware import Gpu, gpu
from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.decode_step import kernels_of_call
from nsa_gen.lowering.parts import Kernel
from nsa_gen.lowering.plan import Plan
from nsa_gen.lowering.space import matrix_rate


@dataclass(frozen=True)
class KernelEstimate:
    """One kernel of one call.

    ``flops`` and ``bytes`` are those that no schedule can avoid. ``seconds_floor`` is the larger of the two times that
    they take at the device's peak rates; ``limited_by`` says which one ("matrix units" or "memory"). ``config`` is the
    configuration that the cost model chose. The formulas use the symbols of `nsa_gen.lowering.symbols`.
    """

    kernel: str
    branch: str
    direction: str
    purpose: str
    schedule: str
    flops: float
    bytes: float
    seconds_floor: float
    limited_by: str
    config: dict[str, int]
    flops_formula: str
    bytes_formula: str


def explain(program: Plan, *, tokens: int = 65536, batch: int = 1, gpu_key: str = "h100") -> list[KernelEstimate]:
    """Estimates of every kernel that the program runs for a call of ``batch`` sequences of ``tokens`` tokens.

    Raises:
        UnknownGpuError: ``gpu_key`` is not in the hardware table.
        ValueError: ``tokens`` or ``batch`` is not positive.
    """
    if tokens < 1 or batch < 1:
        raise ValueError(f"tokens and batch: expected positive numbers, got tokens={tokens}, batch={batch}")
    device = gpu(gpu_key)
    return [
        _estimate(program, kernel, tokens, batch, device) for kernel in kernels_of_call(program, device, tokens, batch)
    ]


def _estimate(program: Plan, kernel: Kernel, tokens: int, batch: int, device: Gpu) -> KernelEstimate:
    sizes = {**program.sizes_on(device.target), s.T: tokens, s.B: batch}
    flops = float(kernel.useful_flops.subs(sizes))
    moved = float(kernel.compulsory_bytes.subs(sizes))
    compute_seconds = flops / matrix_rate(device, program.sizes)
    memory_seconds = moved / (device.bandwidth_tbs * 1e12)
    return KernelEstimate(
        kernel=kernel.name,
        branch=kernel.branch,
        direction=kernel.direction,
        purpose=kernel.purpose,
        schedule=kernel.schedule,
        flops=flops,
        bytes=moved,
        seconds_floor=max(compute_seconds, memory_seconds),
        limited_by="matrix units" if compute_seconds >= memory_seconds else "memory",
        config=program.defaults[device.target][kernel.name].mapping(),
        flops_formula=sympy.sstr(sympy.factor_terms(kernel.useful_flops)),
        bytes_formula=sympy.sstr(sympy.factor_terms(kernel.compulsory_bytes)),
    )
