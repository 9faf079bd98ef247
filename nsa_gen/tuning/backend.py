"""What the search asks of a GPU: is a candidate correct, and how fast is it compared with others?

A `Backend` asks a process that may die at any time. A candidate that kills the process (an illegal access, a hang) or
fails in it (out of memory, wrong numbers) is quarantined with its reason. The process is replaced, and the other
candidates continue.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from nsa_gen.targets.compile import compiler_environment
from nsa_gen.tuning.race import Candidate, Hear, Journal, Race, Reading, Round
from nsa_gen.tuning.space import Bucket
from nsa_gen.tuning.store import Device
from nsa_gen.workers import Handle, Say, Worker, WorkerDied, WorkerFailure

if TYPE_CHECKING:
    from nsa_gen.spec import Spec
    from nsa_gen.tuning.run import Settings

WORKER = (sys.executable, "-m", "nsa_gen.tuning.engine")
VISIBLE = "CUDA_VISIBLE_DEVICES"
CANDIDATE_SECONDS = 60.0
"""A candidate that gives no sign of life for this long hangs. Its kernels were compiled before."""
START_LIMIT_SECONDS = 180.0
"""Limit for a process to import torch and draw inputs."""
FIRST_PATIENCE = 3
"""The first answer may take this many times as long: kernels with one configuration are compiled, launchers built."""
MOST_STARTS = 3
"""Maximum of consecutive deaths that no candidate can be blamed for; after it, the run ends."""


class BackendLost(RuntimeError):
    """Nothing can be measured any more: the worker dies before it reaches a candidate."""


class Backend:
    """A GPU and its worker process, which is started when first needed and after each death."""

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
        """The GPU. Raises BackendLost if there is none."""
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
        """What is wrong with a candidate's outputs and gradients at a ragged length, or ""."""
        (answer,) = self._survive("check", (candidate,), bucket, {"bucket": asdict(bucket)})
        return answer.get("error", "")

    def race(self, race: Race, earlier: Sequence[Round] = (), hear: Hear = lambda times: None) -> list[Reading]:
        """Times of the candidates, in their order.

        `earlier` rounds, from before an interruption, count. `hear` is called with each further round as it ends.
        """
        rest = {name: value for name, value in race.to_json().items() if name != "candidates"}
        answers = self._survive("race", race.candidates, race.bucket, rest, earlier, hear)
        return [Reading.from_json({"times": {}, **answer}) for answer in answers]

    def close(self) -> None:
        """End the process."""
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
        """Ask about candidates until each has an answer or {"error": ...}."""
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
                    # Killed from outside: the candidate may not be the cause.
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


def gpu_backend(
    package: Path,
    spec: Spec,
    settings: Settings,
    number: int,
    say: Callable[[str], None],
    *,
    candidate_seconds: float = CANDIDATE_SECONDS,
    command: Sequence[str] = WORKER,
) -> Backend:
    """The backend of one GPU of this machine. It uses the machine code that stage 0 left next to the package."""
    environment = compiler_environment((package.parent.parent / "triton").resolve())
    visible = [each for each in os.environ.get(VISIBLE, "").split(",") if each.strip()]
    if number:  # the first process sees all GPUs, so that it can count them, and uses the first
        environment[VISIBLE] = visible[number] if visible else str(number)
    environment["NSA_GEN_TUNED"] = "off"
    opening = {"package": str(package.resolve()), "spec": spec.resolved_yaml(), "seed": settings.seed}
    return Backend(command, opening, environment, candidate_seconds=candidate_seconds, tell=say)


T = TypeVar("T")
R = TypeVar("R")


class Crew:
    """Answers questions with whichever GPU is free. A race runs on one GPU, so that its times are comparable.

    Args:
        backends: one per GPU. A lost one is no longer used; losing the last one ends the run.
        journal: answers of an earlier run, and the place for new ones.
    """

    def __init__(self, backends: Sequence[Backend], journal: Journal) -> None:
        self._free: SimpleQueue[Backend] = SimpleQueue()
        for backend in backends:
            self._free.put(backend)
        self._backends = list(backends)
        self._pool: ThreadPoolExecutor | None = None
        self._journal = journal
        self._lock = threading.Lock()
        self.quarantined: dict[str, str] = {}
        self.measured = 0

    @property
    def size(self) -> int:
        """How many GPUs are left."""
        return len(self._backends)

    def check(self, candidate: Candidate, bucket: Bucket, *, several: bool = False) -> str:
        """What is wrong with a candidate, or "". Asked once for each kind of call, whatever its length.

        `several` means that configurations of several kernels are checked together: a fault then belongs to none.
        """
        calls = "decode" if bucket.decode else "packed" if bucket.packed else "batched"
        kind = f"check {calls} {min(bucket.batch, 2)} {candidate.key}"
        known = self._journal.get(kind)
        if known is None:
            known = self._with_one(lambda backend: backend.check(candidate, bucket))
            self._journal.put(kind, "check", known)
        if known and not several:
            self._put_away(bucket, candidate, known)
        return known

    def race(self, race: Race) -> list[Reading]:
        """Times of candidates, in their order. Each is a line of the journal, and so is each round until then."""
        keys = [f"race {race.key} {number}" for number in range(len(race.candidates))]
        known = [self._journal.get(key) for key in keys]
        if all(answer is not None for answer in known):
            readings = [Reading.from_json(answer) for answer in known]
        else:
            rounds = f"rounds {race.key}"
            earlier = self._journal.rounds(rounds)
            keep = functools.partial(self._journal.add_round, rounds)
            readings = self._with_one(lambda backend: backend.race(race, earlier, keep))
            for key, candidate, reading in zip(keys, race.candidates, readings, strict=True):
                where = {"bucket": race.bucket.name, "inputs": race.inputs, "configs": candidate.configs}
                self._journal.put(key, "time", asdict(reading), **where)
        for candidate, reading in zip(race.candidates, readings, strict=True):
            if reading.error:
                self._put_away(race.bucket, candidate, reading.error)
        with self._lock:
            self.measured += len(readings)
        return readings

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Apply a function to each item, as many at a time as there are GPUs; results are in the order of the items."""
        if self.size == 1:
            return [function(item) for item in items]
        if self._pool is None:
            # Kept until the end, because a worker ends with the thread that started it.
            self._pool = ThreadPoolExecutor(self.size)
        return list(self._pool.map(function, items))

    def close(self) -> None:
        """End every worker, whatever it is doing."""
        for backend in self._backends:
            backend.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _with_one(self, ask: Callable[[Backend], R]) -> R:
        while True:
            backend = self._free.get()
            try:
                answer = ask(backend)
            except BackendLost:
                backend.close()
                with self._lock:
                    if self.size > 1:
                        self._backends.remove(backend)
                        continue
                self._free.put(backend)  # others that wait for it find out in the same way
                raise
            except BaseException:
                self._free.put(backend)
                raise
            self._free.put(backend)
            return answer

    def _put_away(self, bucket: Bucket, candidate: Candidate, reason: str) -> None:
        with self._lock:
            self.quarantined[f"{bucket.name}: {candidate.label}"] = reason


# In the process that measures


def handler(engine: Any) -> Handle:
    """Answer a worker's requests with an engine: `nsa_gen.tuning.engine`'s, or a test's."""

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
