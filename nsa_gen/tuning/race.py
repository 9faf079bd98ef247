"""Candidates, races between them, the winner by more than noise, and the journal of results.

The journal is JSON lines on disk, from which an interrupted run resumes. Its first line says what is tuned on what.
Each further line answers one question of the search. A search that runs again asks the same questions in the same
order, and takes answers from the journal as far as they go. Rounds of a race are lines too, so an interrupted race
continues with the rounds that are left.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from nsa_gen._files import read_bytes
from nsa_gen.tuning.space import Bucket
from nsa_gen.tuning.store import Configs

JOURNAL_SCHEMA = 1
FORWARD, BACKWARD, DECODE = "forward", "backward", "decode"
LEAST_NOISE = 0.003
"""Smaller differences, as a share of a time, are noise, however steady the repeats are."""


@dataclass(frozen=True)
class Candidate:
    """Configurations that replace the cost model's, by kernel or schedule; empty for the default itself."""

    configs: Configs = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A text that is equal exactly for equal configurations."""
        return json.dumps(self.configs, sort_keys=True)

    @property
    def label(self) -> str:
        """The configurations in one line."""
        each = (f"{name} {', '.join(f'{k}={v}' for k, v in values.items())}" for name, values in self.configs.items())
        return "; ".join(each) or "default"

    def with_configs(self, more: Mapping[str, Mapping[str, int]]) -> Candidate:
        """This candidate with further values, which replace existing ones."""
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
        """Half-width of the interval that likely contains the true median, ms; at least the jitter of any clock."""
        return max(1.57 * (self.high - self.low) / max(self.repeats, 1) ** 0.5, LEAST_NOISE * self.median)


@dataclass(frozen=True)
class Reading:
    """The result of a candidate in a race: times by pass, or why there are none."""

    times: dict[str, Times] = field(default_factory=dict)
    error: str = ""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Reading:
        """The inverse of `asdict`."""
        return cls({name: Times(**each) for name, each in document["times"].items()}, document.get("error", ""))


@dataclass(frozen=True)
class Race:
    """Candidates to time in turn on the same inputs: a bucket, a kind of input, passes, seconds for the rounds.

    With a `kernel`, only the call that launches it is timed instead of whole passes. Its arguments are those of the
    first candidate in the named pass.
    """

    candidates: tuple[Candidate, ...]
    bucket: Bucket
    inputs: str
    passes: tuple[str, ...]
    seconds: float
    kernel: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "candidates": [each.configs for each in self.candidates], "passes": list(self.passes)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Race:
        """The inverse of `to_json`."""
        candidates = tuple(map(Candidate, document["candidates"]))
        lists = {"candidates": candidates, "bucket": Bucket(**document["bucket"]), "passes": tuple(document["passes"])}
        return cls(**{**document, **lists})

    @property
    def key(self) -> str:
        """Sixteen hex digits that are equal exactly for equal races."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


Round = list[dict[str, float] | None]
"""Milliseconds by pass of each candidate of a race in one round; None for a candidate that is out."""
Hear = Callable[[Round], None]


@dataclass(frozen=True)
class Score:
    """A time divided by the base's in the same races, as a geometric mean over kinds of input. Less is better.

    1 is the base. `noise` is the half-width of the interval that likely contains the true ratio.
    """

    ratio: float
    noise: float


WORST = Score(math.inf, 0.0)


def total(reading: Reading, passes: Sequence[str]) -> tuple[float, float] | None:
    """Milliseconds of some passes together, and their noise. None if one is missing."""
    if reading.error or any(name not in reading.times for name in passes):
        return None
    times = [reading.times[name] for name in passes]
    return sum(each.median for each in times), math.hypot(*(each.noise for each in times))


def scores(readings: Sequence[Sequence[Reading]], passes: Sequence[str], base: int = 0) -> list[Score]:
    """Scores of candidates from readings: one list per kind of input, with the candidates in the same order.

    A candidate that failed in any of them gets the worst score; so do all if the base failed.
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
    """The winner: the best score. Within its noise, the base wins, then the candidate with the least cost.

    `costs` orders candidates by what they take of the GPU. The base wins if everyone failed.
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
    """The base and the best of the others, at most `most` in all, in their order: they go on to the next round."""
    others = sorted(
        (number for number in range(len(found)) if number != base and math.isfinite(found[number].ratio)),
        key=lambda number: found[number].ratio,
    )
    return sorted([base, *others[: max(0, most - 1)]])


class JournalWarning(UserWarning):
    """The journal cannot be written, or an earlier one belongs to another run."""


class Journal:
    """A file of answers by key.

    Args:
        path: the file. With `resume`, an existing file is continued; otherwise it is kept as `<name>.old`.
        heading: what is tuned on what. An earlier journal is only resumed if its heading is equal.
        resume: use the answers of an earlier run.
    """

    def __init__(self, path: Path, heading: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.resumed = 0
        self._lock = threading.Lock()
        self._file: IO[str] | None = None
        self._answers: dict[str, Any] = {}
        self._rounds: dict[str, list[Any]] = {}
        self._heading = json.loads(json.dumps(dict(heading)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._take(resume)
            self._file = path.open("a", encoding="utf-8")
            if not path.stat().st_size:
                self._write({"journal": JOURNAL_SCHEMA, "heading": self._heading})
        except OSError as error:
            self._give_up(error)

    def get(self, key: str) -> Any:
        """The answer to a question, or None."""
        return self._answers.get(key)

    def put(self, key: str, kind: str, answer: Any, **more: Any) -> None:
        """Keep an answer, on disk before this returns. A full disk loses the journal, but does not end the run."""
        with self._lock:
            self._answers[key] = answer
            self._write({"key": key, "kind": kind, **more, "answer": answer})

    def rounds(self, key: str) -> list[Any]:
        """Rounds of a race that an earlier run finished."""
        return list(self._rounds.get(key, ()))

    def add_round(self, key: str, times: Any) -> None:
        """Keep the times of a round, on disk before this returns."""
        with self._lock:
            self._rounds.setdefault(key, []).append(times)
            self._write({"round": key, "times": times})

    def close(self) -> None:
        """End writing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, resume: bool) -> None:
        """Read an earlier journal, or move it away."""
        if not self.path.exists():
            return
        # For anything but a regular file this is an OSError: reading a pipe would wait.
        lines = _whole_lines(self.path)
        heading = lines[0] if lines else {}
        same = heading.get("journal") == JOURNAL_SCHEMA and heading.get("heading") == self._heading
        if resume and same:
            self._answers = {line["key"]: line["answer"] for line in lines[1:] if "key" in line and "answer" in line}
            for line in lines[1:]:
                if "round" in line and "times" in line:
                    self._rounds.setdefault(line["round"], []).append(line["times"])
            self.resumed = len(self._answers)
            _cut_ragged_end(self.path)
            return
        if resume and lines:
            other = heading.get("heading") or {}
            names = [name for name, value in self._heading.items() if other.get(name) != value]
            warnings.warn(
                f"{self.path} is not resumed: another {', '.join(names) or 'schema'}; kept as {self.path.name}.old",
                JournalWarning,
                stacklevel=4,
            )
        os.replace(self.path, self.path.with_name(f"{self.path.name}.old"))

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        warnings.warn(f"{self.path} cannot be written, so this run cannot be resumed: {error}", JournalWarning, 3)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that were written completely and that are JSON objects."""
    found = []
    for line in read_bytes(path).split(b"\n")[:-1]:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _cut_ragged_end(path: Path) -> None:
    """Drop the last line of a file if its writer did not finish it."""
    text = read_bytes(path)
    if text and not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)
