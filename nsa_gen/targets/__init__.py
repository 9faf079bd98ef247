"""Ahead-of-time compilation for every supported architecture, without a GPU: registers, shared memory, spills.

    launches    record what a package launches, and what Triton would compile for it
    resources   read registers, local memory and shared memory from a binary, and compare with the device
    worker      the process that imports, records and compiles
    compile     all kernels for all architectures -> CompileReport
    report      the CompileReport as text

Importing this package imports neither torch nor triton: both stay in the worker processes.
"""

from nsa_gen.targets.compile import HEAVY_SPILL_BYTES, VARIANTS, Compilation, CompileReport, compile_spec
from nsa_gen.targets.report import print_report
from nsa_gen.targets.resources import Resources

__all__ = [
    "HEAVY_SPILL_BYTES",
    "VARIANTS",
    "Compilation",
    "CompileReport",
    "Resources",
    "compile_spec",
    "print_report",
]
