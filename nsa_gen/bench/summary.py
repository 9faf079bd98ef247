"""What the rows of a benchmark say together: speed-ups over the fastest dense attention, and where they cross 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from nsa_gen.bench.records import KernelRow, Row

BOTH = "both"
"""Forward and backward together."""
DIRECTIONS = ("forward", "backward", BOTH)
TITLES = {"forward": "forward", "backward": "backward", BOTH: "forward and backward"}


@dataclass(frozen=True)
class Key:
    """One sequence on which contenders were timed."""

    workload: str
    inputs: str
    tokens: int


@dataclass(frozen=True)
class Entry:
    """One contender on one sequence, with one row per pass."""

    contender: str
    dense: bool
    rows: Mapping[str, Row]

    def ms(self, direction: str) -> float | None:
        """Milliseconds of a pass, or of "both" passes; None without a time."""
        if direction != BOTH:
            row = self.rows.get(direction)
            return None if row is None else row.median_ms
        found = [self.ms("forward"), self.ms("backward")]
        return None if None in found else sum(ms for ms in found if ms is not None)

    @property
    def spread(self) -> float | None:
        """The widest distance between quartiles, as a share of the median."""
        found = [
            (row.high_ms - row.low_ms) / row.median_ms
            for row in self.rows.values()
            if row.median_ms and row.low_ms is not None and row.high_ms is not None
        ]
        return max(found, default=None)

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory in addition to the inputs, over all passes."""
        return max((row.peak_bytes for row in self.rows.values() if row.peak_bytes is not None), default=None)

    @property
    def problem(self) -> str:
        """Why a pass has no time; empty if every pass has one."""
        return "; ".join(dict.fromkeys(row.refusal or row.error for row in self.rows.values() if row.median_ms is None))

    @property
    def row(self) -> Row:
        """One of the rows; sequence, heads and dtype are the same in all of them."""
        return next(iter(self.rows.values()))

    @property
    def note(self) -> str:
        """What a reader must know of the contender."""
        return next((row.note for row in self.rows.values() if row.note), "")


def entries(rows: Iterable[Row]) -> dict[Key, list[Entry]]:
    """The rows by sequence and contender, in the order of the rows."""
    gathered: dict[Key, dict[str, dict[str, Row]]] = {}
    for row in rows:
        key = Key(row.workload, row.inputs, row.tokens)
        gathered.setdefault(key, {}).setdefault(row.contender, {})[row.direction] = row
    return {
        key: [Entry(name, next(iter(found.values())).dense, found) for name, found in contenders.items()]
        for key, contenders in gathered.items()
    }


def best_dense(found: Sequence[Entry], direction: str) -> Entry | None:
    """The fastest dense contender of one sequence in a pass or in both; None if none has a time."""
    timed = [(ms, each) for each in found if each.dense and (ms := each.ms(direction)) is not None]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def speed_up(found: Sequence[Entry], contender: str, direction: str) -> float | None:
    """The fastest dense contender's time divided by a contender's. Above 1, the contender is faster."""
    best = best_dense(found, direction)
    mine = next((each.ms(direction) for each in found if each.contender == contender), None)
    if best is None or not mine:
        return None
    ms = best.ms(direction)
    assert ms is not None
    return ms / mine


@dataclass(frozen=True)
class Crossing:
    """Where a contender becomes faster than the fastest dense attention, also in words.

    `tokens` is None if this is below the shortest measured length or above the longest.
    """

    tokens: float | None
    text: str


def crossing(speed_ups: Mapping[int, float]) -> Crossing | None:
    """The length from which on the speed-up stays above 1, from speed-ups at several lengths; None without any.

    Between two lengths, the interpolation is linear in both logarithms.
    """
    if not speed_ups:
        return None
    points = sorted(speed_ups.items())
    if points[-1][1] < 1:
        return Crossing(None, f"above {points[-1][0]:,} tokens")
    for (short, low), (long, high) in reversed(list(pairwise(points))):
        if low < 1:
            tokens = short * (long / short) ** (math.log(1 / low) / math.log(high / low))
            return Crossing(tokens, f"{tokens:,.0f} tokens")
    return Crossing(None, f"below {points[0][0]:,} tokens")


def profiles(kernels: Iterable[KernelRow]) -> list[list[KernelRow]]:
    """The kernels of each profiled sequence."""
    groups: dict[Key, list[KernelRow]] = {}
    for kernel in kernels:
        groups.setdefault(Key(kernel.workload, kernel.inputs, kernel.tokens), []).append(kernel)
    return list(groups.values())


def branch_times(kernels: Iterable[KernelRow]) -> list[KernelRow]:
    """The sums of the kernels of one profiled task: one row per branch and pass, named after the branch."""
    groups: dict[tuple[str, str], list[KernelRow]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.branch, kernel.direction), []).append(kernel)
    return [
        replace(
            found[0],
            kernel=branch,
            ms=sum(kernel.ms for kernel in found),
            launches=sum(kernel.launches for kernel in found),
            flops=sum(kernel.flops for kernel in found),
            bytes=sum(kernel.bytes for kernel in found),
            floor_ms=None if all(k.floor_ms is None for k in found) else sum(k.floor_ms or 0.0 for k in found),
            limited_by="",
        )
        for (branch, _), found in groups.items()
    ]
