"""Checking a spec is quick, because `nsa-gen check` and editors run it at every change."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "triton", "sympy", "numpy", "jinja2", "typer", "rich")

SCRIPT = f"""
import sys
from nsa_gen.spec import load_spec
load_spec("llama3_8b")
print(*[name for name in {HEAVY!r} if name in sys.modules])
"""


def test_loading_a_spec_imports_nothing_heavy() -> None:
    finished = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []
