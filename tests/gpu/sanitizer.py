"""compute-sanitizer's two tools over every kernel: what is run, and what its output means."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from nsa_gen.workers import worker_environment

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

MEANS = """\
version: 2
name: means
heads: {query: 4, kv: 2}
head_dim: 16
dtype: float16
selection: {block: 16, count: 3, initial: 0, local: 1, scores: mean}
window: {size: 24, sink: learned}
passes: [forward, backward, decode]
"""
"""Blocks chosen by their mean keys, and a window with a sink."""

JOINED = """\
version: 2
name: joined
heads: {query: 4, kv: 2}
head_dim: 16
dtype: float16
compression: {block: 8, stride: 4, output: false}
selection: {block: 16, count: 3, initial: 1, local: 1, pool: max}
window: {size: 24}
combine: {gate: none, joint: [selection, window], sink: learned}
cache: {dtype: e4m3}
passes: [forward, backward, decode]
"""
"""Compressed keys that only choose blocks, one softmax over selection and window, and a cache of codes."""

INDEXED = """\
version: 2
name: indexed
heads: {query: 4, kv: 2}
head_dim: 16
dtype: float16
selection: {block: 16, count: 3, initial: 0, local: 1, scores: {indexer: {dim: 32}}}
window: {size: 24}
passes: [forward, backward, decode]
"""
"""Blocks chosen by an indexer, and a window."""

SPECS = {
    "plain": PLAIN, "learned": LEARNED, "brought": BROUGHT, "means": MEANS, "joined": JOINED, "indexed": INDEXED,
}  # fmt: skip
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


def judge(tool: str, log: str) -> dict[str, Any]:
    """What a tool found, by its output: counts, races, and the problem, which is "" if all is well.

    All is well if the last summary that the tool printed counts nothing (hazards of any severity count), no race is
    reported and the tool had no trouble itself.
    """
    race = tool == "racecheck"
    summaries = _HAZARDS.findall(log) if race else _ERRORS.findall(log)
    counted = None if not summaries else int(summaries[-1][0] if race else summaries[-1])
    found = hazards(log) if race else []
    trouble = _ITSELF.search(log)
    result: dict[str, Any] = {"sanitizer_errors": counted, "problem": ""}
    if race:
        result["hazards"] = [vars(hazard) for hazard in found]
        if summaries:
            result["hazard_errors"], result["hazard_warnings"] = int(summaries[-1][1]), int(summaries[-1][2])
    if counted == 0 and not found and trouble is None:
        return result
    if trouble is not None:
        reason = f"compute-sanitizer had trouble itself: {trouble[0]}"
    elif counted or found:
        reason = f"compute-sanitizer counted {counted or len(found)} {'hazards' if race else 'errors'}"
    else:
        reason = "compute-sanitizer gave no error summary"
    if found:
        reason += f"; {found[0].count} times {found[0].first} and {found[0].second}"
    first = "\n".join(line for line in log.splitlines() if line.startswith("========="))[:4000]
    return {**result, "problem": f"{reason}\n{first}"}


def watched_touch(result: dict[str, Any], *, tool: str, spec: str, seconds: float) -> None:
    """Run every kernel of a spec under a tool, in a process of its own."""
    path = program()
    assert path is not None, "compute-sanitizer is not installed"
    # Every allocation its own, so that a read past one tensor does not land in the next.
    environment = worker_environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1", PYTORCH_CUDA_ALLOC_CONF="")
    request = {"spec": SPECS[spec], "dtype": None, "heads": None, "batch": 2, "shapes": SHAPES[tool], "steps": True}
    inside = [sys.executable, "-m", "tests.gpu.correctness", json.dumps({**request, "device": "cuda", "seed": 0})]
    done = subprocess.run(
        [*command(path, tool), *inside], env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    result.update(judge(tool, done.stdout + done.stderr), status=done.returncode)
    result["error"] = result["problem"] or (
        f"exit status {done.returncode}: {done.stderr[-2000:]}" if done.returncode else ""
    )
    result["ok"] = not result["error"]
