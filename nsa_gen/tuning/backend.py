"""What the search asks of a GPU: is a candidate right, and how quick is it beside others?

`ProcessBackend` asks a process that may die at any time. A candidate that takes it along (an illegal access, a hang) or
fails in it (out of memory, wrong numbers) is quarantined with its reason; the process is replaced and the others go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nsa_gen.tuning.identity import Device
from nsa_gen.tuning.shapes import Bucket
from nsa_gen.tuning.store import Configs
from nsa_gen.workers import Handle, Say, Worker, WorkerDied, WorkerFailure

CANDIDATE_SECONDS = 60.0
"""A candidate that gives no sign of life for so long hangs; its kernels have been compiled before."""
START_LIMIT_SECONDS = 180.0
"""What a process may take to import torch, and to draw inputs."""
FIRST_PATIENCE = 3
"""Times as long may the very first answer take: kernels with one configuration are compiled, launchers built."""
MOST_STARTS = 3
"""Deaths in a row that no candidate can be blamed for, after which there is no going on."""


class BackendLost(RuntimeError):
    """Nothing can be measured any more: the worker dies before it gets to a candidate."""


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


class Backend(Protocol):
    """Measures on one GPU."""

    def device(self) -> Device:
        """The GPU. Raises BackendLost if there is none."""
        ...

    def check(self, candidate: Candidate, bucket: Bucket) -> str:
        """What is wrong with a candidate's outputs and gradients at a ragged length, or ""."""
        ...

    def race(self, race: Race, earlier: Sequence[Round] = (), hear: Hear = lambda times: None) -> list[Reading]:
        """Times of the candidates, in their order.

        `earlier` rounds, of the same race interrupted, count; each further one is told to `hear` as it ends.
        """
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class ProcessBackend:
    """A GPU behind a worker process, which is started when first needed and after each death."""

    def __init__(
        self,
        command: Sequence[str],
        opening: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        candidate_seconds: float = CANDIDATE_SECONDS,
        start_seconds: float = START_LIMIT_SECONDS,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._worker = Worker(command, environment, opening)
        self._candidate_seconds, self._start_seconds = candidate_seconds, start_seconds
        self._tell = tell
        self._quarantine: dict[tuple[str, str], str] = {}
        self._second_chance: set[tuple[str, str]] = set()
        self._settled = False

    def device(self) -> Device:
        for left in reversed(range(MOST_STARTS)):
            try:
                return Device(**self._worker.ask({"do": "device"}, self._start_seconds))
            except WorkerDied as died:
                if not left:
                    raise BackendLost(f"the measuring process does not start: {died}") from died
            except WorkerFailure as failure:
                raise BackendLost(str(failure)) from failure
        raise AssertionError("unreachable")

    def check(self, candidate: Candidate, bucket: Bucket) -> str:
        (answer,) = self._survive("check", (candidate,), bucket, {"bucket": bucket.to_json()})
        return answer.get("error", "")

    def race(self, race: Race, earlier: Sequence[Round] = (), hear: Hear = lambda times: None) -> list[Reading]:
        rest = {name: value for name, value in race.to_json().items() if name != "candidates"}
        answers = self._survive("race", race.candidates, race.bucket, rest, earlier, hear)
        return [Reading.from_json({"times": {}, **answer}) for answer in answers]

    def close(self) -> None:
        self._worker.close()

    def _survive(
        self,
        do: str,
        candidates: Sequence[Candidate],
        bucket: Bucket,
        request: Mapping[str, Any],
        earlier: Sequence[Round] = (),
        hear: Hear = lambda times: None,
    ) -> list[dict[str, Any]]:
        """Ask about candidates until all are answered for, each with its answer or {"error": ...}."""
        places = [(bucket.name, each.key) for each in candidates]
        answers: list[dict[str, Any]] = [
            {"error": self._quarantine[place]} if place in self._quarantine else {} for place in places
        ]
        left = [number for number, place in enumerate(places) if place not in self._quarantine]
        rounds = list(earlier)
        blameless = 0

        while left:
            patience = self._candidate_seconds * (1 if self._settled else FIRST_PATIENCE)
            culprit: int | None = None

            def heard(said: dict[str, Any], left: list[int] = left, patience: float = patience) -> float:
                nonlocal culprit
                if "round" not in said:
                    culprit = left[said["now"]]
                    return patience
                times: Round = [None] * len(candidates)
                for number, one in zip(left, said["round"], strict=True):
                    times[number] = one
                rounds.append(times)
                hear(times)
                return patience

            asked = {"do": do, **request, "candidates": [candidates[number].configs for number in left]}
            if do == "race":
                asked["earlier"] = [[times[number] for number in left] for times in rounds]
            try:
                found = self._worker.ask(asked, self._start_seconds, heard)
            except WorkerDied as died:
                if culprit is None:
                    blameless += 1
                    if blameless >= MOST_STARTS:
                        raise BackendLost(f"the measuring process ends before it measures: {died}") from died
                elif died.from_outside and places[culprit] not in self._second_chance:
                    # Somebody killed it: it may not be the candidate's doing.
                    self._second_chance.add(places[culprit])
                    self._tell(f"{died}; tried again: {candidates[culprit].label}")
                else:
                    answers[culprit] = {"error": str(died)}
                    left.remove(culprit)
                    self._put_away(places[culprit], str(died), candidates[culprit])
                continue
            except WorkerFailure as failure:
                raise BackendLost(str(failure)) from failure
            self._settled = True
            for number, one in zip(left, found, strict=True):
                answers[number] = one
                if one.get("error"):
                    self._put_away(places[number], one["error"], candidates[number])
            break
        return answers

    def _put_away(self, place: tuple[str, str], reason: str, candidate: Candidate) -> None:
        self._quarantine[place] = reason
        self._tell(f"{reason}: {candidate.label}")


# In the process that measures


class Engine(Protocol):
    """What answers requests. `announce` is called with a candidate's number each time work on it begins."""

    def device(self) -> dict[str, Any]: ...

    def check(self, candidates: list[Any], announce: Callable[[int], None], **request: Any) -> list[dict[str, Any]]: ...

    def race(self, candidates: list[Any], announce: Callable[[int], None], **request: Any) -> list[dict[str, Any]]: ...


def handler(engine: Engine) -> Handle:
    """Answers a worker's requests with an engine."""

    def handle(request: dict[str, Any], say: Say) -> Any:
        def announce(number: int) -> None:
            say({"now": number})

        do = request.pop("do")
        if do == "device":
            return engine.device()
        if do == "check":
            return engine.check(announce=announce, **request)
        return engine.race(announce=announce, hear=lambda times: say({"round": times}), **request)

    return handle
