"""What the GPU tests run: every promise of theirs, in numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

from nsa_gen.lowering import lower
from nsa_gen.spec import load_spec, parse_spec, shipped_specs
from nsa_gen.verification.drawing import spec_of_seed
from tests.gpu import far_specs, sanitizer, support
from tests.lowering.drawn_specs import drawn_specs

ON_A_GPU = """
import json
from tests.gpu import test_suite as suite
names = ("CASES", "LENGTHS", "PACKED", "EACH_SHIPPED", "EACH_DRAWN", "DRAWN_SPECS", "REPEATS", "FAR_LIMIT", "RUNNABLE")
print(json.dumps({name: getattr(suite, name) for name in (*names, "EXAMPLE_SEEDS", "DTYPES")}))
"""


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    """The numbers of the suite as they are on a GPU."""
    environment = {**os.environ, "NSA_GEN_TEST_DEVICE": "cuda"}
    project = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU], cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_shipped_spec_is_verified_in_every_dtype_at_every_length(plan: dict[str, Any]) -> None:
    dtypes = ("bfloat16", "float16", "float32")
    assert plan["CASES"] == [[spec, dtype] for spec in shipped_specs() for dtype in dtypes]
    assert plan["LENGTHS"] == [1, 31, 63, 65, 511, 2049, 8192] and plan["RUNNABLE"] == list(shipped_specs())
    assert all(0 in lengths and 1 in lengths for lengths in plan["PACKED"])
    assert all(sum(length > 1 for length in lengths) > 1 for lengths in plan["PACKED"])


def test_two_thousand_examples_and_more_are_checked_over_shipped_and_drawn_specs(plan: dict[str, Any]) -> None:
    assert len(plan["CASES"]) * plan["EACH_SHIPPED"] + plan["DRAWN_SPECS"] * plan["EACH_DRAWN"] >= 2000
    assert max(plan["EACH_SHIPPED"], plan["EACH_DRAWN"]) < plan["EXAMPLE_SEEDS"]  # no two tests share a seed
    drawn = {
        spec_of_seed(number, dtypes=(plan["DTYPES"][number % 3],), wide=True) for number in range(plan["DRAWN_SPECS"])
    }
    assert len(drawn) == plan["DRAWN_SPECS"]


def test_calls_are_repeated_two_hundred_times_batched_and_packed(plan: dict[str, Any]) -> None:
    repeats, (tokens, packed) = plan["REPEATS"]
    assert repeats == 200 and tokens == sum(packed) == 4096 and 0 in packed


@pytest.mark.parametrize("name", far_specs.ALONG)
def test_repeated_sequences_make_tensors_that_pass_the_limit_and_do_not_wrap_onto_themselves(name: str) -> None:
    along = far_specs.ALONG[name]
    spec = parse_spec(along.spec.replace("DTYPE", "bfloat16"))
    tokens = sum(along.lengths)
    stride = spec.compression.stride
    assert not along.packed or (tokens % stride == 0 and sum(along.few) % stride == 0)
    assert along.packed or len(set(along.lengths)) == 1
    heads = {"q": (spec.heads.query, spec.head_dim.qk), "k": (spec.heads.kv, spec.head_dim.qk)}
    heads |= {"v": (spec.heads.kv, spec.head_dim.v), "o": (spec.heads.query, spec.head_dim.v)}
    elements = {name: tokens * prod(shape) for name, shape in heads.items()}
    largest = max(elements.values())
    times = 2**31 // largest * 101 // 100 + 2  # as the job has it
    far = {name for name, size in elements.items() if times * size > 2**31}
    assert far == {"keys": {"q", "k"}, "values": {"v", "o"}, "queries": {"q", "o"}}[name]
    for size in elements.values():
        assert 2**31 % size and 2**32 % size
    assert times * len(along.lengths) < 65536
    # q, k, v, o of each branch and do, gradients in float32 and in bfloat16: two shares of a GPU's memory hold them.
    bytes_needed = times * (
        elements["q"] * (2 + 4 + 2) + (elements["k"] + elements["v"]) * (2 + 4 + 2) + elements["o"] * (2 + 2 + 2 * 3)
    )
    assert bytes_needed < 2 * support.MEMORY_SHARE_GB * 1e9


def test_far_specs_are_legal_and_have_three_of_everything_that_is_spread_out(plan: dict[str, Any]) -> None:
    for text in far_specs.APART.values():
        for dtype in ("bfloat16", "float16"):
            spec = parse_spec(text.replace("DTYPE", dtype))
            assert spec.heads.kv == 3 and spec.heads.query >= 3
    assert plan["FAR_LIMIT"] == 2**31


def launched(spec: Any, target: str) -> set[str]:
    """The kernels that a target's schedules launch."""
    program = lower(spec)
    return {kernel.name for kernel in program.kernels if program.runs(kernel, target) or not kernel.whole}


def test_the_sanitizers_specs_launch_every_kernel_that_any_spec_has() -> None:
    watched = [parse_spec(text) for text in sanitizer.SPECS.values()]
    everything = [*(load_spec(name) for name in shipped_specs()), *drawn_specs()]
    known = {kernel.name for spec in everything for kernel in lower(spec).kernels}
    for target in ("sm_80", "sm_90"):
        assert known <= set().union(*(launched(spec, target) for spec in watched))
    assert all(spec.window is not None and spec.kv == "shared" for spec in watched)  # whose window runs alone as well


def test_each_tool_watches_batched_and_packed_calls() -> None:
    assert set(sanitizer.SHAPES) == {"memcheck", "racecheck"}
    for tool, shapes in sanitizer.SHAPES.items():
        packed = [shape for shape in shapes if isinstance(shape, tuple)]
        assert packed and all(0 in shape and 1 in shape for shape in packed)
        assert sanitizer.command("path", tool)[:3] == ("path", "--tool", tool)
