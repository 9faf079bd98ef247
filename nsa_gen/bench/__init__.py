"""How quick a generated operator is, and against what."""

from nsa_gen.bench.dense import DenseComparison, compare_with_dense

__all__ = ["DenseComparison", "compare_with_dense"]
