"""What is asked for: a frozen, validated `Spec`, read from YAML with the place of every mistake."""

from nsa_gen.spec.constraints import CONSTRAINTS, Constraint
from nsa_gen.spec.errors import Problem, SpecError
from nsa_gen.spec.fields import RANGES, IntegerRange
from nsa_gen.spec.model import (
    BranchName,
    Combine,
    Compression,
    DType,
    HeadDim,
    Heads,
    Indexer,
    IndexScores,
    Phi,
    PhiKind,
    Position,
    PositionKind,
    Selection,
    Spec,
    Window,
)
from nsa_gen.spec.parse import parse_spec
from nsa_gen.spec.shipped import load_spec, shipped_specs

__all__ = [
    "CONSTRAINTS",
    "RANGES",
    "BranchName",
    "Combine",
    "Compression",
    "Constraint",
    "DType",
    "HeadDim",
    "Heads",
    "IndexScores",
    "Indexer",
    "IntegerRange",
    "Phi",
    "PhiKind",
    "Position",
    "PositionKind",
    "Problem",
    "Selection",
    "Spec",
    "SpecError",
    "Window",
    "load_spec",
    "parse_spec",
    "shipped_specs",
]
