"""How long a tuning will take, and what it comes to: a result for each bucket, and what was quarantined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_gen.tuning.identity import Device
from nsa_gen.tuning.search import KEPT_SHARE, Effort
from nsa_gen.tuning.space import Bucket
from nsa_gen.tuning.stage0 import Selection
from nsa_gen.tuning.store import Configs

START_SECONDS = 15.0
"""A process imports torch, opens the GPU and compiles kernels that have one configuration."""
CHECK_SECONDS = 0.5
"""Operator, gradients and comparisons at the length of checks."""
TURN_SECONDS = 0.02
"""What a candidate costs in a race besides its times: preparing, waiting, a graph."""
DRAW_SECONDS = 1.5
"""Inputs of a bucket, a kind."""
WARM_UP, FEWEST, MOST = 2, 3, 20
"""Rounds of a race, as `nsa_gen.bench.measure` has them."""
SCHEDULES = 8
"""Combinations of schedules that are looked into, about."""


@dataclass(frozen=True)
class Estimate:
    """Seconds: of compiling on one core and on all that compile, and of the GPU; `jobs` processes compile."""

    compile_seconds: float
    jobs: int
    gpu_seconds: float

    @property
    def wall_seconds(self) -> float:
        """Of compiling side by side, then measuring."""
        return self.compile_seconds / self.jobs + self.gpu_seconds

    def to_json(self) -> dict[str, float]:
        """Plain data."""
        return {
            "compile_seconds": round(self.compile_seconds, 1),
            "jobs": self.jobs,
            "gpu_seconds": round(self.gpu_seconds, 1),
        }


def estimate(selections: Mapping[Bucket, Sequence[Selection]], effort: Effort, jobs: int) -> Estimate:
    """What tuning the buckets will take with an effort, from what stage 0 left of each."""
    compiling = sum(each.compile_seconds for found in selections.values() for each in found)
    checks = [_checks(found, effort) for found in selections.values()]
    measuring = sum(_bucket_seconds(bucket, found, effort) for bucket, found in selections.items())
    # Buckets of the same kind of call share their checks.
    return Estimate(compiling, max(1, jobs), START_SECONDS + max(checks, default=0) * CHECK_SECONDS + measuring)


def race_seconds(count: int, one: float, seconds: float) -> float:
    """A race of `count` candidates of about `one` second each, whose rounds have `seconds`."""
    rounds = min(MOST, max(FEWEST, int(seconds / max(count * one, 1e-6))))
    return count * (one * (WARM_UP + rounds) + TURN_SECONDS)


def _checks(selections: Sequence[Selection], effort: Effort) -> int:
    most = max((len(each.survivors) for each in selections), default=1)
    return 1 + SCHEDULES + (most - 1) * SCHEDULES + effort.finalists


def _bucket_seconds(bucket: Bucket, selections: Sequence[Selection], effort: Effort) -> float:
    kinds = len(bucket.kinds) if effort.every_kind else 1
    step = sum(each.survivors[0].seconds for each in selections)
    found = DRAW_SECONDS * len(bucket.kinds)
    for each in selections:
        count = len(each.survivors)
        one = step if bucket.decode else each.survivors[0].seconds
        kept = max(3, 1 + count // KEPT_SHARE)
        if count > 4:
            found += race_seconds(count, one, effort.seconds / 2) + step
        found += kinds * (race_seconds(min(count, kept), one, effort.seconds) + step)
    whole = [(SCHEDULES, 1 + kinds), (5, kinds)]
    found += sum(times * race_seconds(count, step, effort.seconds) for count, times in whole) * effort.sweeps
    return found + len(bucket.kinds) * race_seconds(1 + effort.finalists, step, effort.final_seconds)


@dataclass(frozen=True)
class BucketResult:
    """A tuned bucket.

    Attributes:
        bucket: which.
        configs: what differs from the cost model's choice; empty where that won.
        gain: the default's time over the winner's, whole passes, geometric mean over kinds of input.
        noise: half-width of the interval that the gain is likely in.
        times: milliseconds by kind of input and pass: {"independent": {"forward": {"default": 1.0, "tuned": 0.9}}}.
        saved: the file it was saved in; None if it could not be, and `problem` says why.
        problem: what went wrong with the bucket as a whole; empty if nothing.
        cut_short: the budget ran out before every kernel was tried.
    """

    bucket: Bucket
    configs: Configs
    gain: float = 1.0
    noise: float = 0.0
    times: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    saved: Path | None = None
    problem: str = ""
    cut_short: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **vars(self),
            "bucket": self.bucket.to_json(),
            "saved": None if self.saved is None else str(self.saved),
        }


@dataclass(frozen=True)
class TuneReport:
    """Everything a tuning found.

    `selections` is what stage 0 left, by bucket; `quarantined` maps candidates to the reason they failed. `device` is
    None where nothing was measured (`--dry-run`), and `expected` then says how long measuring would take.
    """

    name: str
    target: str
    device: Device | None
    selections: dict[Bucket, tuple[Selection, ...]]
    results: tuple[BucketResult, ...] = ()
    quarantined: dict[str, str] = field(default_factory=dict)
    measured: int = 0
    resumed: int = 0
    journal: Path | None = None
    seconds: float = 0.0
    expected: Estimate | None = None

    @property
    def wrong(self) -> dict[str, str]:
        """Candidates that computed something else: each is a fault of a kernel or of the compiler."""
        return {name: reason for name, reason in self.quarantined.items() if reason.startswith("wrong")}

    @property
    def ok(self) -> bool:
        """Every bucket has a result that was saved, and no candidate was wrong."""
        return not self.wrong and all(not each.problem for each in self.results)

    def to_json(self) -> dict[str, Any]:
        """The report as `json.dumps` takes it."""
        return {
            "ok": self.ok,
            "name": self.name,
            "target": self.target,
            "gpu": None if self.device is None else vars(self.device),
            "results": [each.to_json() for each in self.results],
            "quarantined": self.quarantined,
            "measured": self.measured,
            "resumed": self.resumed,
            "journal": None if self.journal is None else str(self.journal),
            "seconds": round(self.seconds, 1),
            "expected": None if self.expected is None else self.expected.to_json(),
            "stage0": {
                bucket.name: [each.to_json() for each in selections] for bucket, selections in self.selections.items()
            },
        }
