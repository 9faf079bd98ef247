"""Who is quicker, and by more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nsa_gen.tuning.backend import Reading

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
