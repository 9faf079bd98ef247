"""A benchmark from its tasks to its results; a contender that ends its process costs itself alone."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_gen.bench.records import OURS, CheckRow, Record, Results, Row, TaskRow, from_line, to_line
from nsa_gen.bench.worker import task_fields
from nsa_gen.bench.workloads import Task
from nsa_gen.machine import machine
from nsa_gen.workers import Worker, WorkerDied, WorkerFailure, share, worker_environment

GRACE_SECONDS = 20.0
"""What a task that runs at the deadline gets beyond it."""
SILENCE_SECONDS = 300.0
"""A worker that starts nothing new for so long hangs: tuning a peer's kernels takes a minute or two."""
PEERS_ENVIRONMENT = {"FLA_CACHE_RESULTS": "0"}
"""fla would keep what it tuned while other checks ran beside it; the timing process tunes anew, alone on the GPU."""
SPENT = "the budget was spent"


@dataclass
class Session:
    """Runs tasks in worker processes, each of which it may lose.

    Attributes:
        folder: where the workers' packages go.
        journal: file that every record is appended to as soon as it is there, for a session that is cut short.
        budget: seconds after which no task is started; tasks left over are recorded as not run.
        seed: of the inputs.
        workers: processes that check side by side; timing is done by one.
        command: what starts a worker.
        progress: called with a line now and then.
    """

    folder: Path
    budget: float = 1e9
    seed: int = 0
    journal: Path | None = None
    workers: int = 4
    silence: float = SILENCE_SECONDS
    command: Sequence[str] = (sys.executable, "-m", "nsa_gen.bench.worker")
    environment: Mapping[str, str] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        self._writing, self._deadline = threading.Lock(), 0.0

    def run(self, tasks: Sequence[Task]) -> list[Record]:
        """Do all tasks, checks first, and return their records. Our operator is not timed where its check failed."""
        self._deadline = time.monotonic() + self.budget
        checks = [task for task in tasks if task.check]
        count = max(1, min(self.workers, len(checks)))
        lanes = [_Lane(checks[number::count]) for number in range(count) if checks]
        self._run_lanes(lanes)
        timed = _Lane([task for task in tasks if not task.check])
        timed.bans = [ban for lane in lanes for ban in lane.bans]
        wrong = _wrong(checks, [record for lane in lanes for record in lane.records])
        timed.bans += [(digest, 0, {OURS: reason}) for digest, reason in wrong.items()]
        if timed.tasks:
            self._run_lanes([timed])
        return [record for lane in (*lanes, timed) for record in lane.records]

    def _run_lanes(self, lanes: Sequence[_Lane]) -> None:
        """Run lanes side by side, each by a worker, until all of their tasks are done."""
        workers = [Worker(self.command, self._environment(), {"seed": self.seed}) for _ in lanes]
        share(workers, lanes, self._run_lane)

    def _run_lane(self, worker: Worker, lane: _Lane) -> None:
        for number, task in enumerate(lane.tasks):
            if time.monotonic() >= self._deadline:
                self._end(lane, task, "not run", SPENT)
                continue
            self.progress(f"[{number + 1}/{len(lane.tasks)}] {task.label}")
            started = time.monotonic()
            status, reason = self._do(worker, lane, task)
            self._end(lane, task, status, reason, time.monotonic() - started)

    def _do(self, worker: Worker, lane: _Lane, task: Task) -> tuple[str, str]:
        """Do a task, again without each contender that ends the process: its status, and the reason."""
        first = len(lane.records)
        while True:
            at = ""

            def hear(said: dict[str, Any]) -> float:
                nonlocal at
                at = said.get("at", at)
                if "record" in said:
                    self._keep(lane, from_line(said["record"]))
                return self._patience()

            known = [r.contender for r in lane.records[first:] if isinstance(r, CheckRow)]
            banned = lane.banned(task)
            try:
                worker.ask({"task": task_fields(task), "banned": banned, "known": known}, self._patience(), hear)
                return "ok", ""
            except WorkerDied as died:
                if died.hung and time.monotonic() >= self._deadline + GRACE_SECONDS:
                    return "not run", SPENT
                if any(isinstance(record, Row) for record in lane.records[first:]):
                    return "failed", f"after its times were taken: {died}"
                if not at or at in banned:
                    return "failed", str(died)
                lane.bans.append((task.spec.digest(), task.tokens, {at: str(died)}))
                self.progress(f"{task.label}: {at} {died}")
            except WorkerFailure as failure:
                return "failed", str(failure)

    def _patience(self) -> float:
        """How long a worker may be silent from now on."""
        return min(self.silence, max(0.1, self._deadline + GRACE_SECONDS - time.monotonic()))

    def _end(self, lane: _Lane, task: Task, status: str, reason: str, seconds: float = 0.0) -> None:
        self._keep(lane, TaskRow(task.workload, task.inputs, task.tokens, status, reason, seconds))
        if status != "ok":
            self.progress(f"{task.label}: {status}: {reason}")

    def _keep(self, lane: _Lane, record: Record) -> None:
        lane.records.append(record)
        if self.journal is not None:
            with self._writing, self.journal.open("a", encoding="utf-8") as file:
                file.write(to_line(record) + "\n")

    def _environment(self) -> dict[str, str]:
        """Never the interpreter; packages generated into the session's folder."""
        return {
            **PEERS_ENVIRONMENT,
            **worker_environment(),
            "NSA_GEN_CACHE_DIR": str(self.folder / "packages"),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            **self.environment,
        }


@dataclass
class _Lane:
    """Tasks that one worker does in turn, and what they found.

    `bans` are contenders that are tried no more on a spec at a length or above it: (digest, tokens, reason by name).
    """

    tasks: Sequence[Task]
    records: list[Record] = field(default_factory=list)
    bans: list[tuple[str, int, Mapping[str, str]]] = field(default_factory=list)

    def banned(self, task: Task) -> dict[str, str]:
        """The contenders that a task must not try, with the reasons."""
        found: dict[str, str] = {}
        for digest, tokens, reasons in self.bans:
            if digest == task.spec.digest() and task.tokens >= tokens:
                found |= reasons
        return found


def _wrong(checks: Sequence[Task], records: Iterable[Record]) -> dict[str, str]:
    """By digest the specs whose operator was not found right, and why."""
    specs = {task.workload: task.spec.digest() for task in checks}
    wrong = dict.fromkeys(specs.values(), "not timed: its check did not come to an end")
    for record in records:
        if isinstance(record, CheckRow) and record.contender == OURS:
            if reason := "; ".join(record.faults) or record.error:
                wrong[specs[record.workload]] = f"wrong, so not timed: {reason}"
            else:
                wrong.pop(specs[record.workload], None)
    return wrong


def run_session(session: Session, tasks: Sequence[Task], settings: Mapping[str, Any]) -> Results:
    """Run tasks and gather what they found, with the machine and the settings."""
    found_on = machine()
    given = {"seed": session.seed, "budget_seconds": session.budget, **settings}
    if session.journal is not None:
        session.journal.parent.mkdir(parents=True, exist_ok=True)
        session.journal.write_text(json.dumps({"machine": found_on, "settings": given}) + "\n", encoding="utf-8")
    started = time.monotonic()
    records = session.run(tasks)
    return Results.of(records, found_on, {**given, "seconds": round(time.monotonic() - started, 1)})
