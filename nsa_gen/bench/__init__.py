"""How quick a generated operator is, and against what."""
