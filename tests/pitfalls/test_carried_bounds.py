"""No `for` of a kernel carries what bounds a loop inside it: Triton 3.6 and 3.7 leave such bounds as they first are."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.pitfalls.carried_bounds import carried_bounds

COMPILED = Path(__file__).parent / "compiled_bounds.py"
FAULTY = ("3.6.", "3.7.")
"""Versions of Triton that drop the carried bound; 3.8.0 is the first that keeps it."""

ACCUMULATE = "        total += tl.load(x_ptr + index)\n"
HEAD = "for number in range(lists):\n    end = tl.load(bounds_ptr + number + 1)\n"
CARRYING = {
    "a first index": f"{HEAD}    for index in range(start, end):\n{ACCUMULATE}    start = end",
    "an end": f"{HEAD}    for index in tl.range(0, start):\n{ACCUMULATE}    start = end",
    "a step": f"{HEAD}    for index in range(0, end, start):\n{ACCUMULATE}    start = end",
    "a value made of it": f"{HEAD}    first = tl.maximum(2 * start, 7)\n"
    f"    for index in range(first, end):\n{ACCUMULATE}    start = end",
    "a count": f"{HEAD}    for index in range(start, end):\n{ACCUMULATE}    start += 1",
    "one of two assignments": f"{HEAD}    for index in range(start, end):\n{ACCUMULATE}"
    "    if number % 2 == 0:\n        start = end",
    "a condition of a bound": f"{HEAD}    first = 0\n    if start > 3:\n        first = 3\n"
    f"    for index in range(first, end):\n{ACCUMULATE}    start = end",
    "a bound two loops down": f"{HEAD}    for _time in range(0, 3):\n        for index in range(start, end):\n"
    f"    {ACCUMULATE}    start = end",
    "a bound of a called function": f"{HEAD}    total = sum_between(x_ptr, total, end=end, start=start)\n"
    "    start = end",
}
SOUND = {
    "bounds that each step loads": "for number in range(lists):\n    start = tl.load(bounds_ptr + number)\n"
    f"    end = tl.load(bounds_ptr + number + 1)\n    for index in range(start, end):\n{ACCUMULATE}",
    "a while outside": "number = 0\nwhile number < lists:\n    end = tl.load(bounds_ptr + number + 1)\n"
    f"    for index in range(start, end):\n{ACCUMULATE}    start = end\n    number += 1",
    "a loop outside that is unrolled": f"{HEAD.replace('range(lists)', 'tl.static_range(3)')}"
    f"    for index in range(start, end):\n{ACCUMULATE}    start = end",
    "a sum alone": f"{HEAD}    for index in range(0, end):\n{ACCUMULATE}    start = end",
}


def kernel(body: str) -> ast.Module:
    """A kernel with these statements between the load of a first bound and the store of a sum."""
    source = (
        "@triton.jit\ndef sum_between(x_ptr, total, start, end):\n    for index in range(start, end):\n"
        f"{ACCUMULATE}    return total\n\n"
        "@lean\n@triton.jit(do_not_specialize=['lists'])\ndef kernel(bounds_ptr, x_ptr, out_ptr, lists):\n"
    )
    statements = f"total = 0.0\nstart = tl.load(bounds_ptr)\n{body}\ntl.store(out_ptr, total)\n"
    return ast.parse(source + textwrap.indent(statements, "    "))


@pytest.mark.parametrize("body", CARRYING.values(), ids=CARRYING)
def test_a_for_that_carries_what_bounds_a_loop_inside_it_is_found(body: str) -> None:
    (found,) = carried_bounds([kernel(body)])
    assert found.startswith("kernel:") and found.endswith(": start")


@pytest.mark.parametrize("body", SOUND.values(), ids=SOUND)
def test_loops_that_triton_compiles_rightly_are_left_alone(body: str) -> None:
    assert carried_bounds([kernel(body)]) == []


def test_no_kernel_of_a_shipped_package_carries_what_bounds_a_loop_inside_it(project_root: Path) -> None:
    packages = [path.parent for path in sorted((project_root / "generated").glob("*/configs.py"))]
    assert packages
    for package in packages:
        assert carried_bounds([ast.parse(path.read_text()) for path in package.rglob("*.py")]) == [], package.name


def test_the_installed_triton_drops_the_carried_bound_just_where_that_is_known() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(COMPILED)], capture_output=True, text=True, env=environment, check=True)
    found = json.loads(done.stdout)
    # How many values the outer loop carries, before and after the compiler's passes.
    assert (found["reloading_kernel"], found["while_kernel"]) == ([1, 1], [3, 3])
    kept = [2, 1] if found["triton"].startswith(FAULTY) else [2, 2]
    assert found["for_kernel"] == kept, f"Triton {found['triton']}: FAULTY no longer says which versions have the fault"
