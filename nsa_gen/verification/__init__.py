"""Verification: a dense oracle, fresh inputs, derived tolerances, and a report.

`reference_attention` is the specification in code. `verify` compares a generated package with it.
"""

from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.gradients import Reference, reference_gradients
from nsa_gen.verification.reference.inputs import Inputs, make_inputs
from nsa_gen.verification.reference.oracle import OracleResult, reference_attention
from nsa_gen.verification.reference.selection import SelectionCheck, check_indices, check_selection
from nsa_gen.verification.reference.tolerance import Comparison, compare
from nsa_gen.verification.report import Row, VerifyReport, print_report
from nsa_gen.verification.verify import assert_verified, verify

__all__ = [
    "Comparison",
    "Inputs",
    "OracleParameters",
    "OracleResult",
    "Reference",
    "Row",
    "SelectionCheck",
    "VerifyReport",
    "assert_verified",
    "check_indices",
    "check_selection",
    "compare",
    "make_inputs",
    "print_report",
    "reference_attention",
    "reference_gradients",
    "verify",
]
