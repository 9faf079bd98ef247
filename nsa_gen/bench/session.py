"""A benchmark from its tasks to its results: workers started, watched, buried and replaced."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nsa_gen
from nsa_gen._trace import Trace
from nsa_gen.bench.contenders import OURS
from nsa_gen.bench.records import CheckRow, Record, Results, Row, TaskRow, read_lines, to_line
from nsa_gen.bench.worker import DEVICE_LOST, Plan
from nsa_gen.bench.workloads import Task
from nsa_gen.machine import machine

GRACE_SECONDS = 20.0
"""What a task that runs at the deadline gets beyond it."""
SILENCE_SECONDS = 300.0
"""A worker that starts nothing new for so long hangs: tuning a peer's kernels takes a minute or two."""
POLL_SECONDS = 0.1
PEERS_ENVIRONMENT = {"FLA_CACHE_RESULTS": "0"}
"""fla would keep what it tuned while other checks ran beside it; the timing process tunes anew, alone on the GPU."""


@dataclass
class Session:
    """Runs tasks in worker processes, each of which it may lose.

    Attributes:
        folder: where plans, logs and the workers' packages go; the records of an earlier session are replaced.
        journal: file that every record is appended to as soon as it is there, for a session that is cut short.
        budget: seconds after which no task is started; tasks left over are recorded as not run.
        seed: of the inputs.
        workers: processes that check side by side; timing is done by one.
        command: what starts a worker; the path of its plan is appended.
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

    def run(self, tasks: Sequence[Task]) -> list[Record]:
        """Do all tasks, checks first, and return their records. Our operator is not timed where its check failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("*.records.jsonl"):
            old.unlink()
        deadline = time.time() + self.budget
        checks = [task for task in tasks if task.check]
        count = max(1, min(self.workers, len(checks)))
        lanes = [_Lane(f"check{number}", checks[number::count]) for number in range(count) if checks]
        self._run_lanes(lanes, deadline)
        timed = _Lane("time", [task for task in tasks if not task.check])
        wrong = self._wrong(checks)
        for lane in lanes:
            for number, banned in lane.banned.items():
                timed.ban(banned, lane.tasks[number])
        for number, task in enumerate(timed.tasks):
            if (reason := wrong.get(task.spec.digest())) is not None:
                timed.banned.setdefault(number, {})[OURS] = reason
        if timed.tasks:
            self._run_lanes([timed], deadline)
        paths = [self._path(lane.name, "records.jsonl") for lane in (*lanes, timed)]
        return [record for path in paths for record in read_lines(path)]

    def _wrong(self, checks: Sequence[Task]) -> dict[str, str]:
        """By digest the specs whose operator was not found right, and why."""
        specs = {task.workload: task.spec.digest() for task in checks}
        wrong = dict.fromkeys(specs.values(), "not timed: its check did not come to an end")
        for path in sorted(self.folder.glob("check*.records.jsonl")):
            for record in read_lines(path):
                if not isinstance(record, CheckRow) or record.contender != OURS:
                    continue
                if reason := "; ".join(record.faults) or record.error:
                    wrong[specs[record.workload]] = f"wrong, so not timed: {reason}"
                else:
                    wrong.pop(specs[record.workload], None)
        return wrong

    def _path(self, lane: str, name: str) -> Path:
        return self.folder / f"{lane}.{name}"

    def _run_lanes(self, lanes: Iterable[_Lane], deadline: float) -> None:
        """Run lanes side by side, each by one worker at a time, until all of their tasks are done."""
        active = list(lanes)
        try:
            while active:
                for lane in active:
                    self._step(lane, deadline)
                active = [lane for lane in active if lane.process is not None or lane.left]
                if active:
                    time.sleep(POLL_SECONDS)
        finally:
            for lane in active:
                lane.kill()

    def _step(self, lane: _Lane, deadline: float) -> None:
        """Start a lane's worker, look at the one that runs, or bury the one that ended."""
        self._copy_records(lane)
        if lane.process is None:
            self._start(lane, deadline)
            return
        self._tell(lane)
        status = lane.process.poll()
        now = time.time()
        reason = ""
        if status is None:
            said = _read_current(self._path(lane.name, "current.json"))
            if now > deadline + GRACE_SECONDS:
                reason = "the budget was spent"
            elif now - max(said.get("time", 0.0), lane.started) > self.silence:
                reason = f"it was silent for {self.silence:g} s{lane.whereabouts()}"
            if not reason:
                return
            lane.kill()
        elif status == 0:
            lane.kill()
            lane.left.clear()
            self._copy_records(lane)
            return
        else:
            lane.kill()
        self._bury(lane, status, reason, out_of_time=now > deadline + GRACE_SECONDS)

    def _start(self, lane: _Lane, deadline: float) -> None:
        records, current = self._path(lane.name, "records.jsonl"), self._path(lane.name, "current.json")
        current.unlink(missing_ok=True)
        tasks = {number: lane.tasks[number] for number in lane.left}
        plan = Plan(tasks, lane.banned, records, current, self.seed, deadline)
        path = self._path(lane.name, "plan.json")
        path.write_text(plan.to_json(), encoding="utf-8")
        lane.done_before = sum(isinstance(record, TaskRow) for record in read_lines(records))
        lane.started = time.time()
        trace = lane.trace = Trace()
        with self._path(lane.name, "log").open("ab") as log:
            lane.process = subprocess.Popen(
                [*self.command, str(path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._environment(), **trace.environment},
                pass_fds=trace.descriptors,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        """Never the interpreter; this nsa_gen importable; packages generated into the session's folder."""
        roots = [str(Path(nsa_gen.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return {
            **PEERS_ENVIRONMENT,
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, roots)),
            "NSA_GEN_CACHE_DIR": str(self.folder / "packages"),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            **self.environment,
        }

    def _bury(self, lane: _Lane, status: int | None, reason: str, *, out_of_time: bool) -> None:
        """Go on after a worker that ended early: what it was at is banned, or the task given up."""
        records = self._path(lane.name, "records.jsonl")
        _cut_ragged_end(records)
        said = _read_current(self._path(lane.name, "current.json"))
        finished = sum(isinstance(record, TaskRow) for record in read_lines(records)) - lane.done_before
        del lane.left[:finished]
        if not lane.left:
            return
        number = lane.left[0]
        task = lane.tasks[number]
        why = said.get("reason") or reason or _ending(status)
        culprit = said.get("contender", "") if said.get("task") == number else ""
        if out_of_time:
            for left in lane.left:
                self._give_up(lane, left, "not run", "the budget was spent")
            lane.left.clear()
        elif any(isinstance(record, Row) and _of(record, task) for record in read_lines(records)):
            self._give_up(lane, number, "failed", f"after its times were taken: {why}")
            lane.left.pop(0)
        elif culprit and culprit not in lane.banned.get(number, {}):
            lost = "left the GPU unusable: " if status == DEVICE_LOST else "ended its process: "
            lane.ban({culprit: lost + why}, task)
            self.progress(f"{task.label}: {culprit} {lost}{why}")
        else:
            self._give_up(lane, number, "failed", why)
            lane.left.pop(0)
        self._copy_records(lane)

    def _give_up(self, lane: _Lane, number: int, status: str, reason: str) -> None:
        task = lane.tasks[number]
        with self._path(lane.name, "records.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_line(TaskRow(task.workload, task.inputs, task.tokens, status, reason)) + "\n")
        self.progress(f"{task.label}: {status}: {reason}")

    def _copy_records(self, lane: _Lane) -> None:
        """Append the whole lines that a lane's file has got since last time to the journal."""
        path = self._path(lane.name, "records.jsonl")
        if self.journal is None or not path.exists():
            return
        with path.open("rb") as file:
            file.seek(lane.copied)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        if whole:
            with self.journal.open("ab") as journal:
                journal.write(whole)
            lane.copied += len(whole)

    def _tell(self, lane: _Lane) -> None:
        """Say what a lane is at, when that changes."""
        number = _read_current(self._path(lane.name, "current.json")).get("task")
        if number is not None and number != lane.told:
            lane.told = number
            self.progress(f"[{number + 1}/{len(lane.tasks)}] {lane.tasks[number].label}")


@dataclass
class _Lane:
    """Tasks that one worker after the other does. `left` are the numbers of those not done."""

    name: str
    tasks: Sequence[Task]
    left: list[int] = field(default_factory=list)
    banned: dict[int, dict[str, str]] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    trace: Trace | None = None
    started: float = 0.0
    done_before: int = 0
    told: int | None = None
    copied: int = 0

    def __post_init__(self) -> None:
        self.left = list(range(len(self.tasks)))

    def ban(self, reasons: Mapping[str, str], task: Task) -> None:
        """Try contenders no more where a task has shown that they end the process: at its length and above it."""
        digest = task.spec.digest()
        for number in self.left:
            one = self.tasks[number]
            if one.spec.digest() == digest and one.tokens >= task.tokens:
                self.banned.setdefault(number, {}).update(reasons)

    def whereabouts(self) -> str:
        """What the worker is at, to be said of one that hangs."""
        return self.trace.remark(self.process.pid) if self.trace and self.process else ""

    def kill(self) -> None:
        """End the worker and what it started: its session is its process group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # all of the group had ended
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.trace is not None:
            self.trace.close()
        self.process = self.trace = None


def _read_current(path: Path) -> dict[str, Any]:
    """What a worker says it is at; empty while it says nothing, or is just writing it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _of(row: Row, task: Task) -> bool:
    return (row.workload, row.inputs, row.tokens) == (task.workload, task.inputs, task.tokens)


def _cut_ragged_end(path: Path) -> None:
    """Drop a last line that its writer did not live to finish."""
    if path.exists():
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):
            path.write_bytes(text[: text.rfind(b"\n") + 1])


def _ending(status: int | None) -> str:
    if status is None or status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


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
