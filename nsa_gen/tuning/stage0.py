"""Stage 0, which needs no GPU: candidates are compiled ahead of time, and most of them are dropped.

Processes compile in parallel for the target. A configuration is dropped if it does not compile, does not fit the device
or spills beyond a limit. Configurations with the same machine code are merged. The machine code stays in Triton's
cache, where the measuring process finds it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nsa_gen._files import read_text
from nsa_gen.hardware import Gpu
from nsa_gen.lowering import Plan
from nsa_gen.lowering.decode_step import kernels_of_call
from nsa_gen.targets.compile import COMPILER, compiler_environment
from nsa_gen.targets.resources import Resources, excess
from nsa_gen.tuning.space import Bucket, KernelSpace, kernel_space
from nsa_gen.workers import Worker, WorkerFailure, share

MOST_SPILL_BYTES = 256
"""Local memory per thread (64 registers) beyond which a candidate is dropped, unless the default spills more."""
COMPILE_SECONDS = 120.0
KEPT_SHARE = 3
"""One in this many candidates of a kernel goes on from the short race to the longer one, and at least two do."""


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        name: its name in EFFORTS.
        candidates: at most this many are compiled per kernel.
        seconds: time for the rounds of a race.
        final_seconds: time for the rounds of the final.
        finalists: candidates in the final, besides the default.
        sweeps: sweeps over the kernels.
        every_kind: whether races before the final use every kind of input.
    """

    name: str
    candidates: int
    seconds: float
    final_seconds: float
    finalists: int = 8
    sweeps: int = 1
    every_kind: bool = True


EFFORTS = {
    each.name: each
    for each in (
        Effort("quick", 6, 0.15, 1.0, finalists=3, every_kind=False),
        Effort("default", 16, 0.4, 4.0),
        Effort("thorough", 24, 2.0, 12.0, sweeps=2),
    )
}


Compiled = dict[str, Any]
"""An answer of the compiling process: {"binaries": [...], "digest": ...} or {"error": ...}."""


@dataclass(frozen=True)
class Survivor:
    """A candidate worth measuring.

    `seconds` is the modelled time. Registers, spill and shared memory are the largest over its binaries (None if they
    could not be read). `digest` identifies its machine code.
    """

    config: dict[str, int]
    seconds: float
    registers: int | None
    spill_bytes: int | None
    shared_memory: int
    digest: str

    @property
    def cost(self) -> tuple[float, ...]:
        """A sort key: what the candidate takes of a multiprocessor."""
        return (self.shared_memory, (self.registers or 0) * self.config.get("num_warps", 1))


@dataclass(frozen=True)
class Selection:
    """What stage 0 left of a kernel's space for a bucket. The default comes first and is never dropped.

    `dropped` maps configurations, as text, to the reason. `compile_seconds` is the time of all of them on one core.
    """

    kernel: str
    direction: str
    total: int
    legal: int
    compiled: int
    survivors: tuple[Survivor, ...]
    dropped: dict[str, str] = field(default_factory=dict)
    merged: int = 0
    compile_seconds: float = 0.0

    @property
    def default(self) -> dict[str, int]:
        """The cost model's choice."""
        return self.survivors[0].config


def spaces_of(program: Plan, gpu: Gpu, bucket: Bucket, most: int, passes: Sequence[str]) -> list[KernelSpace]:
    """The spaces of the operator's kernels for the passes to tune, without kernels that have only one configuration."""
    if bucket.decode:
        # Only the launches of decode itself: adding tokens to a cache is not timed.
        running = kernels_of_call(program, gpu, bucket.tokens, bucket.batch)
        kernels = [kernel for kernel in running if kernel.module.startswith("decode")]
    else:
        kernels = [kernel for kernel in program.kernels if kernel.whole and kernel.direction in passes]
    found = (kernel_space(program, kernel, gpu, bucket, most) for kernel in kernels)
    return [each for each in found if len(each.candidates) > 1]


class Compiler:
    """Compiles candidates of one package for one target in several processes.

    Args:
        package: the package's folder.
        target: an architecture.
        passes: the traced passes.
        triton_cache: folder of machine code, shared with the process that launches it.
        jobs: number of processes; None: as many as CPU cores.
    """

    def __init__(
        self,
        package: Path,
        target: str,
        passes: Sequence[str],
        triton_cache: Path,
        jobs: int | None = None,
    ) -> None:
        self._opening = {"package": str(package), "tokens": 4096, "batch": 1, "passes": list(passes)}
        self._environment = compiler_environment(triton_cache.resolve())
        self._target, self._jobs = target, jobs or os.cpu_count() or 1
        self._kept = triton_cache.parent / f"stage0-{target}-{version('triton')}.jsonl"
        self._known: dict[str, Compiled] = dict(_lines(self._kept)) if triton_cache.is_dir() else {}

    def compile(
        self,
        wanted: Mapping[str, tuple[str, dict[str, int], list[dict[str, Any]]]],
        done: Callable[[str, Compiled], None] = lambda key, answer: None,
    ) -> dict[str, Compiled]:
        """Compile (kernel, configuration, calls) by key. `done` is called with each new answer, one at a time."""
        found = {key: self._known[key] for key in wanted if key in self._known}
        todo = [key for key in wanted if key not in found]

        def keep(key: str, answer: Compiled) -> None:
            found[key] = self._known[key] = answer
            self._keep(key, answer)
            done(key, answer)

        workers = [Worker(COMPILER, self._environment, self._opening) for _ in range(self._jobs)]
        share(workers, todo, lambda worker, key: self._one(worker, *wanted[key]), keep)
        return found

    def _keep(self, key: str, answer: Compiled) -> None:
        """Keep a result for the next run; the machine code is in the same folder. Failures are not kept."""
        if "error" not in answer:
            with suppress(OSError), self._kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, answer]) + "\n")

    def _one(self, worker: Worker, kernel: str, config: dict[str, int], calls: list[dict[str, Any]]) -> Compiled:
        request = {"do": "candidate", "target": self._target, "kernel": kernel, "config": config, "calls": calls}
        try:
            return worker.ask(request, COMPILE_SECONDS * len(calls))
        except WorkerFailure as failure:
            return {"error": str(failure)}


def _lines(path: Path) -> Iterator[tuple[str, Compiled]]:
    """The results of an earlier run, without lines that were cut short."""
    text = ""
    with suppress(OSError, ValueError):
        text = read_text(path)
    for line in text.splitlines():
        with suppress(ValueError):
            key, answer = json.loads(line)
            yield key, answer


def calls_of(bucket: Bucket, check_tokens: int) -> list[dict[str, Any]]:
    """The calls that a candidate must serve: the bucket's, and those of its check.

    For packed calls, lengths and the number of sequences do not change what is compiled, as long as there are several.
    Two halves represent them.
    """
    if bucket.decode:
        ours = {"tokens": bucket.tokens, "batch": bucket.batch, "new_tokens": 1}
        checked = ({"tokens": check_tokens, "batch": min(bucket.batch, 2), "new_tokens": new} for new in (1, 2))
        return [ours, *checked]
    if bucket.packed:
        return [{"tokens": tokens // 2, "batch": 2, "packed": True} for tokens in (bucket.tokens, check_tokens)]
    shape = {"tokens": bucket.tokens, "batch": bucket.batch, "packed": False}
    return [shape, {"tokens": check_tokens, "batch": min(bucket.batch, 2), "packed": False}]


def job_key(kernel: str, config: Mapping[str, int], calls: Sequence[Mapping[str, Any]]) -> str:
    """A key that is equal for equal work."""
    return json.dumps([kernel, dict(config), list(calls)], sort_keys=True)


def select(
    spaces: Iterable[KernelSpace],
    compiler: Compiler,
    gpu: Gpu,
    bucket: Bucket,
    check_tokens: int,
    done: Callable[[str, Compiled], None] = lambda key, answer: None,
) -> list[Selection]:
    """Compile the candidates of all kernels, and keep those that are worth measuring."""
    spaces = list(spaces)
    calls = calls_of(bucket, check_tokens)
    wanted = {
        job_key(each.kernel.name, config, calls): (each.kernel.name, config, calls)
        for each in spaces
        for config in each.candidates
    }
    found = compiler.compile(wanted, done)
    return [_kept(each, [found[job_key(each.kernel.name, c, calls)] for c in each.candidates], gpu) for each in spaces]


def _kept(space: KernelSpace, answers: Sequence[Compiled], gpu: Gpu) -> Selection:
    survivors: list[Survivor] = []
    dropped: dict[str, str] = {}
    seen: set[str] = set()
    merged = compiled = 0
    most_spilled = max(MOST_SPILL_BYTES, _spilled(answers[0]))
    for config, seconds, answer in zip(space.candidates, space.seconds, answers, strict=True):
        is_default = not survivors
        reason = answer.get("error", "")
        used = [Resources(**each) for each in answer.get("binaries", ())]
        if not reason:
            compiled += 1
            reason = next(filter(None, (excess(each, gpu) for each in used)), "")
            if not reason and _spilled(answer) > most_spilled:
                reason = f"spills {_spilled(answer)} bytes a thread, more than {most_spilled}"
        if reason and not is_default:
            dropped[" ".join(f"{name}={value}" for name, value in config.items())] = reason
            continue
        if answer.get("digest", "") in seen:
            merged += 1
            continue
        seen.add(answer.get("digest", "default"))
        survivors.append(_survivor(config, seconds, used, answer))
    kernel = space.kernel
    took = sum(answer.get("seconds", 0.0) for answer in answers)
    return Selection(
        kernel.name, kernel.direction, space.total, space.legal, compiled, tuple(survivors), dropped, merged, took
    )


def _spilled(answer: Compiled) -> int:
    return max((each["spill_bytes"] or 0 for each in answer.get("binaries", ())), default=0)


def _survivor(config: dict[str, int], seconds: float, used: Sequence[Resources], answer: Compiled) -> Survivor:
    def most(name: str) -> int | None:
        return max((value for each in used if (value := getattr(each, name)) is not None), default=None)

    shared = most("shared_memory") or 0
    return Survivor(config, seconds, most("registers"), most("spill_bytes"), shared, answer.get("digest", ""))


# Estimates of the remaining time

START_SECONDS = 15.0
"""Time for a process to import torch, open the GPU and compile the kernels that have one configuration."""
CHECK_SECONDS, DRAW_SECONDS, TURN_SECONDS = 0.5, 1.5, 0.02
"""Seconds of a check; to draw the inputs of one kind for a bucket; of a race per candidate, besides its samples."""
WARM_UP, FEWEST, MOST = 2, 3, 20
"""Rounds of a race, as in `nsa_gen.bench.measure`."""
LED_BELOW_SECONDS = 0.05
"""Before a timed run shorter than this there is an untimed one, as in `nsa_gen.bench.measure`."""
SCHEDULES = 8
"""Approximate number of combinations of schedules that are pursued."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of compiling on one core and on all `jobs`, and of the GPU."""

    compile_seconds: float
    jobs: int
    gpu_seconds: float

    @property
    def wall_seconds(self) -> float:
        """The time of compiling in parallel, then measuring."""
        return self.compile_seconds / self.jobs + self.gpu_seconds


def estimate(selections: Mapping[Bucket, Sequence[Selection]], effort: Effort, jobs: int) -> Estimate:
    """The expected time of tuning the buckets with an effort, given what stage 0 left of each."""
    compiling = sum(each.compile_seconds for found in selections.values() for each in found)
    # Buckets of the same kind of call share their checks.
    most = max((len(each.survivors) for found in selections.values() for each in found), default=1)
    checks = 1 + SCHEDULES * most + effort.finalists
    measuring = sum(_bucket_seconds(bucket, found, effort) for bucket, found in selections.items())
    gpu_seconds = START_SECONDS + checks * CHECK_SECONDS + measuring
    return Estimate(round(compiling, 1), max(1, jobs), round(gpu_seconds, 1))


def _race_seconds(count: int, one: float, seconds: float) -> float:
    """The time of a race of `count` candidates that take about `one` second each and have `seconds` for rounds."""
    turn = one * (2 if one < LED_BELOW_SECONDS else 1)
    rounds = min(MOST, max(FEWEST, int(seconds / max(count * turn, 1e-6))))
    return count * (one * WARM_UP + turn * rounds + TURN_SECONDS)


def _bucket_seconds(bucket: Bucket, selections: Sequence[Selection], effort: Effort) -> float:
    kinds = len(bucket.kinds) if effort.every_kind else 1
    step = sum(each.survivors[0].seconds for each in selections)
    found = DRAW_SECONDS * len(bucket.kinds)
    for each in selections:
        count = len(each.survivors)
        one = step if bucket.decode else each.survivors[0].seconds
        if count > 4:
            found += _race_seconds(count, one, effort.seconds / 2) + step
        found += kinds * (_race_seconds(min(count, max(3, 1 + count // KEPT_SHARE)), one, effort.seconds) + step)
    whole = (1 + kinds) * _race_seconds(SCHEDULES, step, effort.seconds) + kinds * _race_seconds(
        5, step, effort.seconds
    )
    final = len(bucket.kinds) * _race_seconds(1 + effort.finalists, step, effort.final_seconds)
    return found + whole * effort.sweeps + final
