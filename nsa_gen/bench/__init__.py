"""How quick a generated operator is, and against what."""

from nsa_gen.bench.compare import DenseComparison, compare_with_dense

__all__ = ["DenseComparison", "compare_with_dense"]
