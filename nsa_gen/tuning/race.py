"""Candidates, races between them, and who is quicker by more than noise."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nsa_gen.tuning.space import Bucket
from nsa_gen.tuning.store import Configs


@dataclass(frozen=True)
class Candidate:
    """Configurations in place of the cost model's, by kernel or schedule; empty for the default itself."""

    configs: Configs = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal exactly for equal configurations."""
        return json.dumps(self.configs, sort_keys=True)

    @property
    def label(self) -> str:
        """The configurations in a line."""
        each = (f"{name} {', '.join(f'{k}={v}' for k, v in values.items())}" for name, values in self.configs.items())
        return "; ".join(each) or "default"

    def with_configs(self, more: Mapping[str, Mapping[str, int]]) -> Candidate:
        """The same with further values, which win over those there are."""
        merged = {name: dict(values) for name, values in self.configs.items()}
        for name, values in more.items():
            merged[name] = {**merged.get(name, {}), **values}
        return Candidate(merged)


@dataclass(frozen=True)
class Times:
    """Milliseconds of a pass: median and quartiles of interleaved repeats."""

    median: float
    low: float
    high: float
    repeats: int

    @property
    def noise(self) -> float:
        """Half-width of the interval that the true median is likely in, ms; never below what any clock jitters by."""
        return max(1.57 * (self.high - self.low) / max(self.repeats, 1) ** 0.5, LEAST_NOISE * self.median)


LEAST_NOISE = 0.003
"""Differences below this share of a time are noise, however steady the repeats are."""


@dataclass(frozen=True)
class Reading:
    """What became of a candidate in a race: times by pass, or why there are none."""

    times: dict[str, Times] = field(default_factory=dict)
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"times": {name: vars(each) for name, each in self.times.items()}, "error": self.error}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Reading:
        """What `to_json` wrote."""
        return cls({name: Times(**each) for name, each in document["times"].items()}, document.get("error", ""))


@dataclass(frozen=True)
class Race:
    """Candidates to be timed in turn on the same inputs: a bucket, a kind of input, passes, seconds for the rounds.

    With a `kernel`, what is timed is the call that launches it alone, on what the first candidate hands it within the
    pass named, in place of whole passes.
    """

    candidates: tuple[Candidate, ...]
    bucket: Bucket
    inputs: str
    passes: tuple[str, ...]
    seconds: float
    kernel: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "candidates": [each.configs for each in self.candidates],
            "bucket": self.bucket.to_json(),
            "inputs": self.inputs,
            "passes": list(self.passes),
            "seconds": self.seconds,
            "kernel": self.kernel,
        }

    @property
    def key(self) -> str:
        """Sixteen hex digits, equal exactly for equal races."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


Round = list[dict[str, float] | None]
"""Milliseconds by pass of each candidate of a race in one round; None of one that is out."""
Hear = Callable[[Round], None]


FORWARD, BACKWARD, DECODE = "forward", "backward", "decode"


@dataclass(frozen=True)
class Score:
    """Time over the base's in the same races, geometric mean over kinds of input; 1 is the base. Less is better.

    `noise` is the half-width of the interval that the true ratio is likely in.
    """

    ratio: float
    noise: float


WORST = Score(math.inf, 0.0)


def total(reading: Reading, passes: Sequence[str]) -> tuple[float, float] | None:
    """Milliseconds of some passes together, and their noise; None if one is missing."""
    if reading.error or any(name not in reading.times for name in passes):
        return None
    times = [reading.times[name] for name in passes]
    return sum(each.median for each in times), math.hypot(*(each.noise for each in times))


def scores(readings: Sequence[Sequence[Reading]], passes: Sequence[str], base: int = 0) -> list[Score]:
    """Scores of candidates whose readings, one list a kind of input, stand in the same order in each.

    A candidate that failed in any of them, and everyone if the base did, has the worst.
    """
    count = len(readings[0])
    found: list[Score] = []
    for number in range(count):
        logs, variance = 0.0, 0.0
        for race in readings:
            mine, reference = total(race[number], passes), total(race[base], passes)
            if mine is None or reference is None:
                break
            logs += math.log(mine[0] / reference[0]) / len(readings)
            if number != base:
                parts = (mine[1] / mine[0], reference[1] / reference[0])
                variance += (math.hypot(*parts) / len(readings)) ** 2
        else:
            ratio = math.exp(logs)
            found.append(Score(ratio, ratio * math.sqrt(variance)))
            continue
        found.append(WORST)
    return found


def pick(found: Sequence[Score], costs: Sequence[tuple[float, ...]], base: int = 0) -> int:
    """The winner: the least score; inside its noise the base, then whoever takes least of the GPU.

    `costs` orders candidates by what they take. The base wins if everyone failed.
    """
    best = min(range(len(found)), key=lambda number: (found[number].ratio, number))
    if not math.isfinite(found[best].ratio):
        return base
    margin = found[best].ratio + found[best].noise
    tied = [number for number, score in enumerate(found) if score.ratio <= margin]
    if base in tied:
        return base
    return min(tied, key=lambda number: (costs[number], found[number].ratio, number))


def spread(found: Sequence[Score], most: int, base: int = 0) -> list[int]:
    """Who goes on to the next round: the base and the best of the others, as many as `most`, in their order."""
    others = sorted(
        (number for number in range(len(found)) if number != base and math.isfinite(found[number].ratio)),
        key=lambda number: found[number].ratio,
    )
    return sorted([base, *others[: max(0, most - 1)]])
