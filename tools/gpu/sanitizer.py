"""compute-sanitizer's two tools over every kernel: what is run, and what its output means."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tools.gpu.pool import Outcome

PLACES = ("/usr/local/cuda/bin",)
ERROR_STATUS = 86

PLAIN = """\
version: 1
name: plain
heads: {query: 4, kv: 2}
head_dim: {qk: 16, v: 16}
dtype: float32
compression: {block: 8, stride: 4, phi: {key: weighted, value: mean}, position: {key: learned}}
selection: {block: 16, count: 4, initial: 1, local: 1}
window: {size: 24}
passes: [forward, backward, decode]
"""
"""Float32, groups of 2, pooled blocks with learned weights."""

LEARNED = """\
version: 1
name: learned
heads: {query: 16, kv: 1}
head_dim: {qk: 48, v: 32}
dtype: bfloat16
compression: {block: 8, stride: 4, phi: {key: mlp, value: linear, hidden: 16}, position: {key: learned, value: learned}}
selection: {block: 32, count: 3, initial: 1, local: 1}
window: {size: 24}
passes: [forward, backward, decode]
"""
"""Bfloat16, a group of 16, matrix products over the blocks, a head dim in two pieces."""

BROUGHT = """\
version: 1
name: brought
heads: {query: 2, kv: 1}
head_dim: 16
dtype: float16
compression: {block: 8, stride: 4, phi: external}
window: {size: 24}
passes: [forward, backward, decode]
"""
"""Compressed blocks that the caller brings, which a cache only keeps."""

SPECS = {"plain": PLAIN, "learned": LEARNED, "brought": BROUGHT}
"""Specs that have every kernel between them, by name (a test holds them to it)."""
SHAPES: dict[str, tuple[int | tuple[int, ...], ...]] = {
    "memcheck": (97, (33, 0, 1, 97)),
    "racecheck": (37, (17, 0, 1, 20)),
}
"""Lengths of the calls of each tool: racecheck follows every access to shared memory, and is slow."""


@dataclass(frozen=True)
class Hazard:
    """Two accesses that racecheck found unordered: its severity, both accesses, and how often."""

    severity: str
    first: str
    second: str
    count: int


def program() -> str | None:
    """The path of compute-sanitizer, or None."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


def command(path: str, tool: str) -> tuple[str, ...]:
    """What precedes the command of a job that a tool is to watch."""
    more = ("--racecheck-report", "analysis", "--print-limit", "200") if tool == "racecheck" else ()
    return (path, "--tool", tool, *more, "--error-exitcode", str(ERROR_STATUS))


_ERRORS = re.compile(r"^========= ERROR SUMMARY: (\d+) errors?\b", re.MULTILINE)
_HAZARDS = re.compile(
    r"^========= RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", re.MULTILINE
)
_ITSELF = re.compile(
    r"^========= .*(Internal Sanitizer Error|Device not supported|not supported on|Unable to).*$", re.M
)
_RACE = re.compile(
    r"^========= (?P<severity>Error|Warning|Info)s?: (?:\([^)]*\) )?Race reported between (?P<first>.+)\n"
    r"=========\s+and (?P<second>.+?)(?: \[(?P<count>\d+) hazards?\])?\s*$",
    re.MULTILINE,
)


def hazards(log: str) -> list[Hazard]:
    """The races that racecheck's analysis reports, those of the same two accesses added up, the most frequent first."""
    found: Counter[tuple[str, str, str]] = Counter()
    for match in _RACE.finditer(log):
        found[match["severity"], match["first"].strip(), match["second"].strip()] += int(match["count"] or 1)
    return [Hazard(*places, count) for places, count in found.most_common()]


def judge(outcome: Outcome, log: str) -> Outcome:
    """An outcome of a watched job, judged by what the tool says in `log` too.

    It is ok if the job is, the tool ends with a summary, the last one it printed counts nothing (hazards of any
    severity count), no race is reported and the tool had no trouble itself.
    """
    race = outcome.name.startswith("racecheck")
    summaries = _HAZARDS.findall(log) if race else _ERRORS.findall(log)
    counted = None if not summaries else int(summaries[-1][0] if race else summaries[-1])
    found = hazards(log) if race else []
    trouble = _ITSELF.search(log)
    result: dict[str, Any] = {**(outcome.result or {}), "sanitizer_errors": counted}
    if race:
        result["hazards"] = [vars(hazard) for hazard in found]
        if summaries:
            result["hazard_errors"], result["hazard_warnings"] = int(summaries[-1][1]), int(summaries[-1][2])
    if counted == 0 and not found and trouble is None:
        return Outcome(outcome.name, outcome.status, outcome.seconds, outcome.detail, result)
    if outcome.status in ("timed out", "not run") and not counted and not found:
        return Outcome(outcome.name, outcome.status, outcome.seconds, outcome.detail, result)
    what = "hazards" if race else "errors"
    if trouble is not None:
        reason = f"compute-sanitizer had trouble itself: {trouble[0]}"
    elif counted or found:
        reason = f"compute-sanitizer counted {counted if counted else len(found)} {what}"
    else:
        reason = "compute-sanitizer gave no error summary"
    if found:
        reason += f"; {found[0].count} times {found[0].first} and {found[0].second}"
    first = "\n".join(line for line in log.splitlines() if line.startswith("========="))[:4000]
    return Outcome(outcome.name, "failed", outcome.seconds, f"{reason}\n{first or outcome.detail}", result)
