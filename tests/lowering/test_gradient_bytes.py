"""Bytes of gradients that branches add up: float32 between the branches, the operator's dtype at the end."""

from __future__ import annotations

import pytest
import sympy

from nsa_gen.lowering import lower
from nsa_gen.lowering import symbols as s
from tests.support import small_spec

DQ = s.B * s.T * s.Hq * s.Dk
KEYS_AND_VALUES = s.B * s.T * s.Hkv * (s.Dk + s.Dv)


def bytes_of(branches: str, kernel: str, **changes: str) -> sympy.Expr:
    """Compulsory bytes of a kernel of small_spec(branches)."""
    return lower(small_spec(branches, gate="none", **changes)).kernel(kernel).compulsory_bytes


@pytest.mark.parametrize(
    ("kernel", "alone", "branches", "more"),
    [
        ("compressed_backward_dq", "cmp", "cmp win", 4 - s.E),
        ("window_backward_dq", "win", "cmp win", 4),
        ("window_backward_dq", "win", "cmp slc win", 4 + 4 - s.E),
        ("selected_backward_dq", "slc", "cmp slc win", 4),
        ("merge_dq", "slc", "slc win", 4),
    ],
)
def test_a_kernel_reads_the_sum_of_the_branches_before_and_the_last_writes_dq_itself(
    kernel: str, alone: str, branches: str, more: sympy.Expr
) -> None:
    given = {"indices": "computed" if "cmp" in branches else "input"}
    by_itself = bytes_of(alone, kernel, indices="input" if alone == "slc" else "computed")
    assert sympy.expand(bytes_of(branches, kernel, **given) - by_itself - DQ * more) == 0


@pytest.mark.parametrize(("kv", "more"), [("shared", 4), ("per_branch", 0)])
@pytest.mark.parametrize(("phi", "kernel"), [("mean", "pool_backward_input"), ("linear", "linear_backward_input")])
def test_phi_reads_the_sums_of_dk_and_dv_that_other_branches_left(phi: str, kernel: str, kv: str, more: int) -> None:
    found = bytes_of("cmp win", kernel, phi=phi, kv=kv) - bytes_of("cmp", kernel, phi=phi)
    assert sympy.expand(found - KEYS_AND_VALUES * more) == 0
