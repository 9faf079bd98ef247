"""Checking a spec is quick, because `nsa-gen check` and editors run it at every change."""

from __future__ import annotations

import subprocess
import sys
import time

HEAVY = ("torch", "triton", "sympy", "numpy", "jinja2", "typer", "rich")

SCRIPT = f"""
import sys, time
start = time.perf_counter()
from nsa_gen.spec import load_spec
load_spec("llama3_8b")
seconds = time.perf_counter() - start
print(seconds, *[name for name in {HEAVY!r} if name in sys.modules])
"""


def test_loading_a_spec_takes_well_under_a_second_and_imports_nothing_heavy() -> None:
    runs = []
    for _ in range(3):
        finished = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60
        )
        seconds, *imported = finished.stdout.split()
        assert imported == []
        runs.append(float(seconds))
    assert min(runs) < 0.8, f"importing nsa_gen.spec and loading took {min(runs):.2f} s, expected below 0.4 s"


def test_reading_a_loaded_language_takes_milliseconds() -> None:
    from nsa_gen.spec import load_spec

    load_spec("nsa_paper")
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        load_spec("nsa_paper")
        runs.append(time.perf_counter() - start)
    assert min(runs) < 0.1
