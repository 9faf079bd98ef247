"""Jobs that check drawn examples: so many of one spec, or of one drawn spec after the other for so many seconds."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch

from nsa_gen.spec import Spec
from nsa_gen.verification.drawing import spec_of_seed
from nsa_gen.verification.examples import Example, ExampleResult, drawn_example, reproduction, run_example, shrink
from nsa_gen.verification.report import Row, environment
from nsa_gen.verification.verify import adapt
from tests.gpu.common import release, save, say
from tests.gpu.support import builder, memory_slot, spec_of_request

SHRINK_SECONDS = 40.0
"""How long a job looks for a smaller example of its first failure."""
KEPT_FAILURES = 20
CACHE_BYTES = 2**30
"""Cached memory above which a process gives it back after an example: the others on the GPU may need it."""
SPEC_SEEDS = 10_000
"""Specs that a worker of a soak may draw before it would meet the seeds of the next."""
GPU_DTYPES = ("bfloat16", "float16", "float32")
CPU_DTYPES = ("float32", "float16")


class Tally:
    """What has been checked, as the result of a job: counts, the rows nearest to their bounds, failures in full."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.properties: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.failed: list[dict[str, Any]] = []
        self.worst: dict[str, tuple[float, dict[str, Any]]] = {}
        result.update(examples=0, comparisons=0, failed=0, rows=[], failures=[], worst=[], drawn=[])

    def add(self, spec: Spec, found: ExampleResult, device: str) -> None:
        """Count an example."""
        result, example = self.result, found.example
        self.properties[example.property] += 1
        self.kinds[example.case.kind] += 1
        for row in found.rows:
            if row.ok and row.bound > 0 and row.usage >= self.worst.get(row.quantity, (0.0,))[0]:
                self.worst[row.quantity] = (row.usage, {**asdict(row), "spec": spec.name, "seed": example.seed})
        result["examples"] += 1
        result["comparisons"] += len(found.rows)
        result["drawn"].append(f"{spec.name} {example.seed} {example.text}")
        result["properties"], result["kinds"] = dict(self.properties), dict(self.kinds)
        result["worst"] = [row for _, row in sorted(self.worst.values(), key=lambda pair: -pair[0])[:12]]
        if not found.ok:
            result["failed"] += 1
            result["rows"] += [asdict(row) for row in found.rows if not row.ok][:10]
            if len(result["failures"]) < KEPT_FAILURES:
                result["failures"].append(_failure(spec, found, device))

    def judge(self, missing: str = "") -> None:
        """Say whether all is well: something was checked, nothing failed and nothing is `missing`."""
        problems = [f"{self.result['failed']} of {self.result['examples']} examples failed"] * bool(
            self.result["failed"]
        )
        if self.result["failures"]:
            problems.append(self.result["failures"][0]["command"].splitlines()[0])
        if missing:
            problems.append(missing)
        if not self.result["examples"]:
            problems.append("no example was checked")
        self.result["ok"] = not problems
        self.result["error"] = "; ".join(problems)


def _failure(spec: Spec, found: ExampleResult, device: str) -> dict[str, Any]:
    example = found.example
    return {
        "spec": spec.resolved_yaml(),
        "seed": example.seed,
        "example": example.text,
        "wrong": sorted(found.failing),
        "rows": [asdict(row) for row in found.rows if not row.ok][:10],
        "command": reproduction(spec, example, device, None, None),
    }


class _Clock:
    """Time until the end, and what each kind of work has taken at most."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.longest: dict[str, float] = {}

    def has_time_for(self, kind: str) -> bool:
        """Whether the longest work of a kind so far would still fit; something that was never done gets its chance."""
        return time.monotonic() + self.longest.get(kind, 0.0) < self.until

    def took(self, kind: str, seconds: float) -> None:
        """Remember how long a piece of work took."""
        self.longest[kind] = max(seconds, self.longest.get(kind, 0.0))


class _Checker:
    """One package and the examples run on it, with care for the memory of a GPU that others use too."""

    def __init__(self, spec: Spec, device: str) -> None:
        self.spec, self.device, self.build = spec, device, builder()
        self.module = self.build(spec)

    def run(self, example: Example) -> ExampleResult:
        """Check an example; once more with a share of the memory to itself where there was too little."""
        found = run_example(self.spec, self.module, example, self.device, self.build)
        if "OutOfMemoryError" in found.failing:
            release(self.device)
            with memory_slot():
                found = run_example(self.spec, self.module, example, self.device, self.build)
                release(self.device)
        elif self.device == "cuda" and not self.lost() and torch.cuda.memory_reserved() > CACHE_BYTES:
            release(self.device)
        return found

    def smallest(self, failed: ExampleResult) -> dict[str, Any] | None:
        """The smallest example that fails in the same way, where there is time to look for it."""
        if self.lost():
            return None

        def run(spec: Spec, example: Example) -> ExampleResult:
            return run_example(spec, self.module, example, self.device, self.build)

        found = shrink(self.spec, failed, self.device, run, seconds=SHRINK_SECONDS, progress=say)
        return {**_failure(found.spec, found.result, self.device), "tries": found.tries}

    def lost(self) -> bool:
        """Whether the device no longer answers this process: after an illegal access every call fails."""
        if self.device != "cuda":
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False


def examples_job(
    result: dict[str, Any],
    *,
    spec: str | None,
    spec_seed: int | None,
    dtype: str | None,
    count: int,
    device: str,
    seed: int,
) -> None:
    """Check `count` examples, of seeds `seed`, `seed + 1`, ..., of a shipped spec in a dtype or of a drawn spec."""
    if spec_seed is None:
        assert spec is not None
        meaning = spec_of_request(spec, dtype)
    else:
        meaning = spec_of_seed(spec_seed, dtypes=(dtype,) if dtype else GPU_DTYPES, wide=device == "cuda")
    meaning, notes = adapt(meaning, interpreted=device == "cpu", dtype=None, fixed=False)
    result.update(spec=meaning.name, spec_seed=spec_seed, dtype=meaning.dtype, notes=list(notes))
    result.update(yaml=meaning.resolved_yaml(), first_seed=seed, planned=count)
    result["environment"] = asdict(environment(torch.device(device)))
    tally = Tally(result)
    save(result)
    checker = _Checker(meaning, device)
    missing = ""
    for number in range(seed, seed + count):
        example = drawn_example(meaning, number, device)
        say(f"{meaning.name} {meaning.dtype}: {number - seed + 1} of {count}, seed {number}: {example.text}")
        found = checker.run(example)
        tally.add(meaning, found, device)
        save(result)
        if not found.ok and "smallest" not in result:
            result["smallest"] = checker.smallest(found)
            save(result)
        if not found.ok and checker.lost():
            missing = f"the device was lost after {number - seed + 1} of {count} examples"
            break
    tally.judge(missing)


def soak_job(
    result: dict[str, Any],
    *,
    worker: int,
    seconds: float,
    per_spec: int,
    device: str,
    seed: int,
) -> None:
    """Draw spec after spec from this worker's own seeds for `seconds`, and check `per_spec` examples of each.

    It begins nothing that it is not likely to end in time, judging by what took longest so far.
    """
    first = seed + worker * SPEC_SEEDS
    started = time.monotonic()
    result.update(worker=worker, seconds_wanted=seconds, first_spec_seed=first, per_spec=per_spec, specs=[])
    result["environment"] = asdict(environment(torch.device(device)))
    tally = Tally(result)
    clock = _Clock(started + seconds)
    dtypes = GPU_DTYPES if device == "cuda" else CPU_DTYPES
    lost = ""
    for spec_seed in range(first, first + SPEC_SEEDS):
        if lost or not clock.has_time_for("spec"):
            break
        meaning = spec_of_seed(spec_seed, dtypes=dtypes, wide=device == "cuda")
        record = {
            "seed": spec_seed,
            "dtype": meaning.dtype,
            "examples": 0,
            "failed": 0,
            "yaml": meaning.resolved_yaml(),
        }
        result["specs"].append(record)
        say(f"spec {spec_seed}")
        before = time.monotonic()
        try:
            checker = _Checker(meaning, device)
        except Exception as error:
            tally.add(meaning, _not_generated(meaning, spec_seed, error), device)
            record["failed"] += 1
            save(result)
            continue
        example_seeds = random.Random(spec_seed).sample(range(2**31), per_spec)
        lost = _check(checker, example_seeds[:1], tally, record, None)
        clock.took("spec", time.monotonic() - before)
        if not lost:
            lost = _check(checker, example_seeds[1:], tally, record, clock)
    result["seconds_run"] = round(time.monotonic() - started, 1)
    tally.judge(lost)


def _check(checker: _Checker, seeds: list[int], tally: Tally, record: dict[str, Any], clock: _Clock | None) -> str:
    """Check the examples of some seeds while there is time; why no more can be checked, or ""."""
    for number in seeds:
        if clock is not None and not clock.has_time_for("example"):
            return ""
        example = drawn_example(checker.spec, number, checker.device)
        say(f"{checker.spec.name} {checker.spec.dtype}: seed {number}: {example.text}")
        before = time.monotonic()
        found = checker.run(example)
        if clock is not None:
            clock.took("example", time.monotonic() - before)
        tally.add(checker.spec, found, checker.device)
        record["examples"] += 1
        record["failed"] += not found.ok
        save(tally.result)
        if not found.ok and "smallest" not in tally.result:
            tally.result["smallest"] = checker.smallest(found)
            save(tally.result)
        if not found.ok and checker.lost():
            return "the device was lost"
    return ""


def _not_generated(spec: Spec, seed: int, error: Exception) -> ExampleResult:
    example = drawn_example(spec, seed, "cpu")
    problem = f"no package: {type(error).__name__}: {error}"
    row = Row(example.case.label, "package", "raised", float("inf"), 0.0, False, problem)
    return ExampleResult(example, (row,))
