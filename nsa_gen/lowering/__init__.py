"""lowering: Spec -> Plan. Turns what is computed into how: kernels, sizes, tunables and costs."""

from nsa_gen.lowering.build import lower
from nsa_gen.lowering.cost import KernelEstimate, explain
from nsa_gen.lowering.plan import Plan

__all__ = ["KernelEstimate", "Plan", "explain", "lower"]
