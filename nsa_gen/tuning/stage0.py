"""Stage 0, which needs no GPU: candidates are compiled ahead of time, and most of them fall here.

Processes compile side by side for the target. What does not compile, does not fit the device or spills past a bound is
dropped; configurations whose machine code is the same are one. The machine code stays in Triton's cache, where the
measuring process finds it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nsa_gen._files import read_text
from nsa_gen.hardware import Gpu
from nsa_gen.lowering import Plan
from nsa_gen.targets.compile import COMPILER, compiler_environment
from nsa_gen.targets.resources import Resources, excess
from nsa_gen.tuning.space import Bucket, KernelSpace, kernel_space
from nsa_gen.workers import Worker, WorkerFailure, share

MOST_SPILL_BYTES = 256
"""Local memory of a thread beyond which a candidate is dropped, unless the default spills more: 64 registers."""
COMPILE_SECONDS = 120.0

Compiled = dict[str, Any]
"""An answer of the compiling process: {"binaries": [...], "digest": ...} or {"error": ...}."""


@dataclass(frozen=True)
class Survivor:
    """A candidate worth measuring.

    `seconds` is the modelled time; registers, spill and shared memory are the largest over its binaries (None where
    they could not be read), and `digest` stands for its machine code.
    """

    config: dict[str, int]
    seconds: float
    registers: int | None
    spill_bytes: int | None
    shared_memory: int
    digest: str

    @property
    def cost(self) -> tuple[float, ...]:
        """Orders candidates by what they take of a multiprocessor."""
        return (self.shared_memory, (self.registers or 0) * self.config.get("num_warps", 1))


@dataclass(frozen=True)
class Selection:
    """What stage 0 left of a kernel's space for a bucket; the default comes first, and is never dropped.

    `dropped` maps configurations, as text, to the reason. `compile_seconds` is what all of them took on one core.
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

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def spaces_of(program: Plan, gpu: Gpu, bucket: Bucket, most: int, passes: Sequence[str]) -> list[KernelSpace]:
    """The spaces of the operator's kernels for the passes to be tuned, without those that have one configuration."""
    if bucket.decode:
        # What decode itself launches; adding tokens to a cache is not timed.
        kernels = [kernel for kernel in program.kernels if kernel.module.startswith("decode")]
    else:
        kernels = [kernel for kernel in program.kernels if kernel.whole and kernel.direction in passes]
    found = (kernel_space(program, kernel, gpu, bucket, most) for kernel in kernels)
    return [each for each in found if len(each.candidates) > 1]


class Compiler:
    """Compiles candidates of one package for one target in several processes.

    Args:
        package: its folder.
        target: an architecture.
        passes: what is traced.
        triton_cache: folder of machine code, shared with whoever launches it.
        jobs: processes; as many as CPU cores if None.
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
        """Compile (kernel, configuration, calls) by key; `done` is called with each new answer, one at a time."""
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
        """Remember what was compiled for the next run, whose machine code is in the same folder; failures are not."""
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
    """What an earlier run has compiled; lines that were cut short are left out."""
    text = ""
    with suppress(OSError, ValueError):
        text = read_text(path)
    for line in text.splitlines():
        with suppress(ValueError):
            key, answer = json.loads(line)
            yield key, answer


def calls_of(bucket: Bucket, check_tokens: int) -> list[dict[str, Any]]:
    """The calls that a candidate will meet: the bucket's, and those it is checked with.

    Packed, the lengths and the number of sequences do not matter to what is compiled as long as there are several: two
    halves stand for them.
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
    """Equal for equal work."""
    return json.dumps([kernel, dict(config), list(calls)], sort_keys=True)


def select(
    spaces: Iterable[KernelSpace],
    compiler: Compiler,
    gpu: Gpu,
    bucket: Bucket,
    check_tokens: int,
    done: Callable[[str, Compiled], None] = lambda key, answer: None,
) -> list[Selection]:
    """Compile the candidates of all kernels and keep what is worth measuring."""
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
            dropped[_text(config)] = reason
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
    def most(values: Iterable[int | None]) -> int | None:
        return max((value for value in values if value is not None), default=None)

    return Survivor(
        config=config,
        seconds=seconds,
        registers=most(each.registers for each in used),
        spill_bytes=most(each.spill_bytes for each in used),
        shared_memory=most(each.shared_memory for each in used) or 0,
        digest=answer.get("digest", ""),
    )


def _text(config: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())
