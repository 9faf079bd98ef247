"""What the suite plans to run: every promise of a part, in numbers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest

from nsa_gen.lowering import lower
from nsa_gen.spec import load_spec, parse_spec, shipped_specs
from nsa_gen.verification.drawing import spec_of_seed
from tests.lowering.drawn_specs import drawn_specs
from tools.gpu import far_specs, plan, sanitizer, sizes
from tools.gpu.worker import KINDS

DTYPES = ("bfloat16", "float16", "float32")


def the_plan(**changes: Any) -> plan.Plan:
    specs = tuple(shipped_specs())
    whole = plan.Plan(specs, sizes.PARTS, sizes.DTYPES, sizes.LENGTHS, "cuda", 0, Path("packages"), workers=15)
    return replace(whole, **changes)


def requests(part: str, **changes: Any) -> list[dict[str, Any]]:
    return [json.loads(job.command[-1]) for job in the_plan(**changes).jobs(part)]


def test_every_part_belongs_to_one_phase_and_its_jobs_have_names_of_their_own() -> None:
    phased = [part for phase in sizes.PHASES for part in phase]
    assert sorted([*phased, "decode", "bench"]) == sorted(sizes.PARTS) and set(sizes.CPU_PARTS) <= set(sizes.PARTS)
    for phase in sizes.PHASES:
        names = [job.name for part in phase for job in the_plan().jobs(part)]
        assert len(set(names)) == len(names)
    assert all(request["kind"] in KINDS for part in sizes.PARTS for request in requests(part))


def test_two_thousand_examples_and_more_are_planned_over_shipped_and_drawn_specs_in_every_dtype() -> None:
    found = requests("examples")
    assert sum(each["count"] for each in found) == 2240 >= 2000
    shipped = {(each["spec"], each["dtype"]) for each in found if each["spec"]}
    assert shipped == {(spec, dtype) for spec in shipped_specs() for dtype in DTYPES}
    drawn = [each for each in found if each["spec_seed"] is not None]
    assert 15 <= len(drawn) <= 25 and {each["dtype"] for each in drawn} == set(DTYPES)
    assert all(45 <= each["count"] <= 100 for each in drawn)
    assert len({spec_of_seed(each["spec_seed"], dtypes=(each["dtype"],), wide=True) for each in drawn}) == len(drawn)


def test_no_two_jobs_share_a_seed_of_an_example() -> None:
    for seed in (0, 7):
        ranges = sorted((each["seed"], each["seed"] + each["count"]) for each in requests("examples", seed=seed))
        assert all(end <= start for (_, end), (start, _) in pairwise(ranges))


def test_three_hundred_examples_are_planned_on_the_cpu_and_any_number_that_is_asked_for() -> None:
    cpu = {"device": "cpu", "dtypes": ("float32",), "specs": ("tiny",)}
    assert sum(each["count"] for each in requests("examples", **cpu)) == 300
    for count in (1, 5, 37, 2001):
        assert sum(each["count"] for each in requests("examples", examples=count)) == count
    assert all(each["count"] > 0 for each in requests("examples", examples=5))


def test_every_shipped_spec_repeats_its_calls_two_hundred_times_batched_and_packed() -> None:
    found = requests("repeats")
    assert {each["spec"] for each in found} == set(shipped_specs())
    for each in found:
        assert each["repeats"] == 200
        assert each["shapes"][0] == 4096 and sum(each["shapes"][1]) == 4096 and 0 in each["shapes"][1]


def test_a_soak_has_a_worker_a_process_and_each_has_seeds_of_its_own() -> None:
    found = requests("soak", soak_seconds=77.0)
    assert [each["worker"] for each in found] == list(range(15)) and {each["seconds"] for each in found} == {77.0}
    assert len({each["seed"] for each in found}) == 1  # a worker adds its number times SPEC_SEEDS


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
    assert bytes_needed < 2 * sizes.MEMORY_SHARE_GB * 1e9


def test_far_specs_are_legal_and_have_three_of_everything_that_is_spread_out() -> None:
    for text in far_specs.APART.values():
        for dtype in ("bfloat16", "float16"):
            spec = parse_spec(text.replace("DTYPE", dtype))
            assert spec.heads.kv == 3 and spec.heads.query >= 3
    found = requests("far")
    assert len(found) == 6 and {each["limit"] for each in found} == {2**31}


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


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return program


def test_each_tool_wraps_each_spec_and_the_caching_allocator_is_off(installed: Path) -> None:
    jobs = the_plan().jobs("sanitizer")
    assert {job.name for job in jobs} == {
        f"{tool} {name}" for tool in ("memcheck", "racecheck") for name in sanitizer.SPECS
    }
    for job in jobs:
        assert job.command[:3] == (str(installed), "--tool", job.name.split()[0])
        assert job.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        request = json.loads(job.command[-1])
        assert parse_spec(request["spec"]).name == job.name.split()[1]
        packed = [shape for shape in request["shapes"] if isinstance(shape, list)]
        assert packed and all(0 in shape and 1 in shape for shape in packed)


def test_without_the_sanitizer_there_is_nothing_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "program", lambda: None)
    assert the_plan().jobs("sanitizer") == []


def test_hoppers_kernel_is_compared_with_the_ordinary_ones_for_every_spec_that_has_it() -> None:
    found = requests("hopper")
    has = {(s, d) for s in shipped_specs() for d in DTYPES if lower(plan.variant(s, d)).hopper}
    assert {(each["spec"], each["dtype"]) for each in found} == has and ("llama3_8b", "float16") in has
    assert all(dtype != "float32" for _, dtype in has)
