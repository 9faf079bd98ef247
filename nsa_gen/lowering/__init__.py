"""lowering: Spec -> Program. What is computed becomes how: kernels, sizes, tunables, costs."""

from nsa_gen.lowering.cost import KernelEstimate, explain
from nsa_gen.lowering.lower import lower
from nsa_gen.lowering.program import Program

__all__ = ["KernelEstimate", "Program", "explain", "lower"]
