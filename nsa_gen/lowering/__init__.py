"""lowering: Spec -> Plan. What is computed becomes how: kernels, sizes, tunables, costs."""

from nsa_gen.lowering.build import lower
from nsa_gen.lowering.cost import KernelEstimate, explain
from nsa_gen.lowering.plan import Plan

__all__ = ["KernelEstimate", "Plan", "explain", "lower"]
