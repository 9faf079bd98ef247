"""Examples as a report: run them, shrink the first that fails, say how to repeat it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from nsa_gen.verification.examples import ExampleResult, drawn_example, reproduction, require_example
from nsa_gen.verification.report import ExampleRecord, Reproduction, VerifyReport, environment
from nsa_gen.verification.running import Runner
from nsa_gen.verification.shrinking import SECONDS, Shrunk, shrink

if TYPE_CHECKING:
    from nsa_gen.spec import Spec


def report_examples(
    original: Spec,
    spec: Spec,
    runner: Runner,
    *,
    count: int | None,
    text: str | None,
    seed: int,
    device: torch.device,
    dtype: str | None,
    source: str | None,
    vary_spec: bool,
    notes: tuple[str, ...],
    progress: Callable[[str], None] | None,
) -> VerifyReport:
    """`verify` with examples: `count` drawn ones from `seed` on, or the one that `text` describes, as it is.

    `spec` is what is run in the place of `original`, with `dtype` if that was asked for.
    """
    started = time.perf_counter()
    where = device.type
    results: list[ExampleResult] = []
    if text is not None:
        example = require_example(spec, text, seed, where)
        if progress is not None:
            progress(f"{spec.name}: seed {seed}: {example.text}")
        results.append(runner.example(spec, example))
    else:
        assert count is not None
        for number in range(seed, seed + count):
            example = drawn_example(spec, number, where)
            if progress is not None:
                progress(f"{spec.name}: example {number - seed + 1} of {count}, seed {number}: {example.text}")
            results.append(runner.example(spec, example))
    failed = [result for result in results if not result.ok]
    smallest = None
    if failed and text is None:
        found = shrink(
            spec,
            None,
            failed[0],
            where,
            run=runner.example,
            vary_spec=vary_spec,
            seconds=SECONDS,
            progress=progress,
        )
        smallest = _as_reproduction(original, spec, found, where, dtype, source)
        notes = (*notes, _told(failed, len(results), found, smallest))
    return VerifyReport(
        name=spec.name,
        digest=original.digest(),
        dtype=spec.dtype,
        heads=(spec.heads.query, spec.heads.kv),
        passes=tuple(spec.passes),
        seed=seed,
        cases=tuple(result.example.text for result in results),
        rows=tuple(row for result in results for row in result.rows),
        notes=notes,
        seconds=time.perf_counter() - started,
        environment=environment(device),
        examples=tuple(ExampleRecord(each.example.seed, each.example.text, each.ok) for each in results),
        reproduction=smallest,
    )


def _as_reproduction(
    original: Spec, spec: Spec, found: Shrunk, device: str, dtype: str | None, source: str | None
) -> Reproduction:
    example = found.result.example
    if found.spec is spec:
        command = reproduction(original, example, device, dtype, source)
    else:
        command = reproduction(found.spec, example, device, None, None)
    return Reproduction(command, example.text, example.seed, found.spec.resolved_yaml(), found.tries)


def _told(failed: list[ExampleResult], count: int, found: Shrunk, smallest: Reproduction) -> str:
    wrong = ", ".join(sorted(found.result.failing))
    first = failed[0].example
    return (
        f"{len(failed)} of {count} examples failed, the first {first.text} of seed {first.seed}; the smallest found in "
        f"{found.tries} tries is {smallest.example} (wrong: {wrong}); to repeat it: {smallest.command}"
    )
