"""Right before quick: an operator is held against the oracle before it is timed."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch

from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.inputs import make_inputs

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

RAGGED = 511
"""A length that ends inside every kind of block."""


def faults(package: ModuleType, spec: Spec, *, device: str = "cuda", tokens: int = RAGGED, seed: int = 0) -> list[str]:
    """What is wrong with a package's outputs, gradients and selection at a ragged length; empty if nothing."""
    case = Case(tokens, batch=1, twice=False)
    inputs = make_inputs(spec, batch=1, tokens=tokens, dtype=getattr(torch, spec.dtype), device=device, seed=seed)
    rows = check_case(package, OracleParameters.from_spec(spec), case, inputs, with_gradients="backward" in spec.passes)
    return [f"{row.quantity} {row.error:.3g} of {row.bound:.3g} {row.problem}".strip() for row in rows if not row.ok]
