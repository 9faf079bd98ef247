"""What tests marked `gpu` run on: a GPU, or, where NSA_GEN_TEST_DEVICE=cpu, Triton's interpreter at tiny sizes."""

from __future__ import annotations

import os

DEVICE = os.environ.get("NSA_GEN_TEST_DEVICE", "cuda")
SEED = int(os.environ.get("NSA_GEN_TEST_SEED", "0"))
"""The first seed of everything that is drawn."""
