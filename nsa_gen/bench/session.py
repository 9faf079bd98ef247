"""Run a benchmark's tasks in worker processes. If a contender ends its process, only its own results are lost."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_gen.bench.records import (
    OURS,
    CheckRow,
    Record,
    Results,
    Row,
    TaskRow,
    append_record,
    begin_journal,
    from_line,
)
from nsa_gen.bench.worker import task_fields
from nsa_gen.bench.workloads import Task
from nsa_gen.machine import machine
from nsa_gen.rendering.identity import MEASUREMENT
from nsa_gen.workers import Worker, WorkerDied, WorkerFailure, share, worker_environment

GRACE_SECONDS = 20.0
"""Additional seconds for a task that is running at the deadline."""
SILENCE_SECONDS = 300.0
"""A worker that reports nothing new for this long hangs. Tuning another package's kernels takes a minute or two."""
PEERS_ENVIRONMENT = {"FLA_CACHE_RESULTS": "0"}
"""Otherwise fla would keep what it tuned while other checks ran. The timing process tunes again, alone on the GPU."""
SPENT = "the budget was spent"


@dataclass
class Session:
    """Runs tasks in worker processes, any of which may die.

    Attributes:
        folder: where the workers generate packages.
        journal: file to which every record is appended at once, in case the session is interrupted.
        budget: seconds after which no task is started; the remaining tasks are recorded as not run.
        seed: seed of the inputs.
        workers: processes that check in parallel; one process does the timing.
        command: the command that starts a worker.
        progress: called with a line of progress now and then.
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
        self._records: list[Record] = []
        # Contenders that are not tried again on a spec from a length on: (digest, tokens, name, reason).
        self._bans: list[tuple[str, int, str, str]] = []

    def run(self, tasks: Sequence[Task]) -> list[Record]:
        """Do all tasks, checks first, and return their records. Our operator is not timed if its check failed."""
        self._deadline = time.monotonic() + self.budget
        checks = [task for task in tasks if task.check]
        self._run(checks, self.workers)
        self._bans += [(digest, 0, OURS, reason) for digest, reason in _wrong(checks, self._records).items()]
        self._run([task for task in tasks if not task.check], 1)
        return self._records

    def _run(self, tasks: Sequence[Task], workers: int) -> None:
        """Do tasks, each on whichever worker is free."""
        started = [Worker(self.command, self._environment(), {"seed": self.seed}) for _ in tasks[:workers]]
        labels = [f"[{number}/{len(tasks)}]" for number in range(1, len(tasks) + 1)]
        share(started, list(zip(labels, tasks, strict=True)), self._do_once)

    def _do_once(self, worker: Worker, item: tuple[str, Task]) -> None:
        """Do a task in the time left, and record how it ended."""
        number, task = item
        status, reason, started = "not run", SPENT, time.monotonic()
        if started < self._deadline:
            self.progress(f"{number} {task.label}")
            status, reason = self._do(worker, task)
        seconds = time.monotonic() - started if started < self._deadline else 0.0
        self._keep(TaskRow(task.workload, task.inputs, task.tokens, status, reason, seconds))
        if status != "ok":
            self.progress(f"{task.label}: {status}: {reason}")

    def _do(self, worker: Worker, task: Task) -> tuple[str, str]:
        """Do a task, and again without each contender that ends the process. Returns its status and the reason."""
        digest = task.spec.digest()
        found: list[Record] = []
        while True:
            at = ""

            def hear(said: dict[str, Any]) -> float:
                nonlocal at
                at = said.get("at", at)
                if "record" in said:
                    found.append(from_line(said["record"]))
                    self._keep(found[-1])
                return self._patience()

            known = [record.contender for record in found if isinstance(record, CheckRow)]
            banned = {name: why for spec, tokens, name, why in self._bans if spec == digest and task.tokens >= tokens}
            try:
                worker.ask({"task": task_fields(task), "banned": banned, "known": known}, self._patience(), hear)
                return "ok", ""
            except WorkerDied as died:
                if died.hung and time.monotonic() >= self._deadline + GRACE_SECONDS:
                    return "not run", SPENT
                if any(isinstance(record, Row) for record in found):
                    return "failed", f"after its times were taken: {died}"
                if not at or at in banned:
                    return "failed", str(died)
                self._bans.append((digest, task.tokens, at, str(died)))
                self.progress(f"{task.label}: {at} {died}")
            except WorkerFailure as failure:
                return "failed", str(failure)

    def _patience(self) -> float:
        """How long a worker may be silent from now on."""
        return min(self.silence, max(0.1, self._deadline + GRACE_SECONDS - time.monotonic()))

    def _keep(self, record: Record) -> None:
        with self._writing:
            self._records.append(record)
            if self.journal is not None:
                append_record(self.journal, record)

    def _environment(self) -> dict[str, str]:
        """The workers' environment: kernels are compiled, and packages are generated into the session's folder."""
        return {
            **PEERS_ENVIRONMENT,
            **worker_environment(),
            "NSA_GEN_CACHE_DIR": str(self.folder / "packages"),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            **self.environment,
        }


def _wrong(checks: Sequence[Task], records: Iterable[Record]) -> dict[str, str]:
    """The specs, by digest, whose operator was not found correct, with the reason."""
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
    """Run tasks and collect their records, with the machine and the settings."""
    found_on = machine()
    given = {"seed": session.seed, "budget_seconds": session.budget, "measurement": MEASUREMENT, **settings}
    if session.journal is not None:
        begin_journal(session.journal, found_on, given)
    started = time.monotonic()
    records = session.run(tasks)
    return Results.of(records, found_on, {**given, "seconds": round(time.monotonic() - started, 1)})
