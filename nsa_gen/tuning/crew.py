"""The GPUs of a host, sharing the questions of a search: one worker each, every answer in the journal at once."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

from nsa_gen.tuning.backend import Backend, BackendLost, Candidate, Race, Reading
from nsa_gen.tuning.journal import Journal
from nsa_gen.tuning.shapes import Bucket

T = TypeVar("T")
R = TypeVar("R")


class Crew:
    """Answers questions with whichever GPU is free; a race is run on one GPU, so that its times compare.

    Args:
        backends: one a GPU. One that is lost is left out from then on; the last one's loss ends the run.
        journal: answers of an earlier run, and where new ones go.
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
        """What is wrong with a candidate, or ""; asked once for each kind of call, whatever its length.

        `several` are configurations of several kernels checked at once: what is wrong is nobody's in particular.
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
        """Times of candidates, in their order; each is a line of the journal, and so is each round until then."""
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
                self._journal.put(key, "time", reading.to_json(), **where)
        for candidate, reading in zip(race.candidates, readings, strict=True):
            if reading.error:
                self._put_away(race.bucket, candidate, reading.error)
        with self._lock:
            self.measured += len(readings)
        return readings

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """A function of each item, as many at a time as there are GPUs; results in the order of the items."""
        if self.size == 1:
            return [function(item) for item in items]
        if self._pool is None:
            # Kept until the end: a worker ends with the thread that has started it.
            self._pool = ThreadPoolExecutor(self.size)
        return list(self._pool.map(function, items))

    def close(self) -> None:
        """End every worker, whatever it is at."""
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
                self._free.put(backend)  # others that wait for it learn the same
                raise
            except BaseException:
                self._free.put(backend)
                raise
            self._free.put(backend)
            return answer

    def _put_away(self, bucket: Bucket, candidate: Candidate, reason: str) -> None:
        with self._lock:
            self.quarantined[f"{bucket.name}: {candidate.label}"] = reason
