"""A pool of processes that may crash, hang or be cut short without taking each other along.

Each job is a command of its own session. It says how it went in a JSON file that it is told of by the variable
RESULT_VARIABLE; what it prints is its sign of life, and goes to a log. A job that prints nothing for too long, and one
that outlives the budget, is killed with everything it started; of a silent one it is said what it was at.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nsa_gen.workers import Trace

RESULT_VARIABLE = "NSA_GEN_JOB_RESULT"
DEADLINE_VARIABLE = "NSA_GEN_JOB_DEADLINE"
"""The time (of time.time()) at which the budget is spent, for jobs that can stop by themselves before."""
GRACE_SECONDS = 10.0
"""What a running job gets beyond the budget, to finish what is nearly done."""
LOG_TAIL = 3000

Status = Literal["ok", "failed", "crashed", "timed out", "not run"]


@dataclass(frozen=True)
class Job:
    """One command. `expected_seconds` only orders the jobs: the longest start first."""

    name: str
    command: tuple[str, ...]
    expected_seconds: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `result` is what it wrote, `detail` why it is not ok, with the end of its log."""

    name: str
    status: Status
    seconds: float = 0.0
    detail: str = ""
    result: Mapping[str, Any] | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    trace: Trace
    log: Path
    result: Path
    started: float
    heard: float
    said: int = 0


def run_jobs(
    jobs: Sequence[Job],
    *,
    folder: Path,
    workers: int,
    silence: float,
    deadline: float,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    poll: float = 0.1,
) -> list[Outcome]:
    """Run jobs, at most `workers` at a time, and return their outcomes in the order of `jobs`.

    A job that prints nothing for `silence` seconds is killed. From `deadline` (of time.monotonic()) on no job starts,
    and GRACE_SECONDS later those still running are killed. Logs and results lie in `folder`. `on_outcome` is called as
    each job ends; where the pool itself is interrupted, also with what the jobs it ends had found. Job names must
    differ.
    """
    if len({job.name for job in jobs}) != len(jobs):
        raise ValueError("jobs: expected names that differ, got two of the same")
    folder.mkdir(parents=True, exist_ok=True)
    waiting = sorted(jobs, key=lambda job: -job.expected_seconds)
    running: list[_Running] = []
    outcomes: dict[str, Outcome] = {}

    def finish(outcome: Outcome) -> None:
        outcomes[outcome.name] = outcome
        on_outcome(outcome)

    try:
        while waiting or running:
            now = time.monotonic()
            for one in list(running):
                outcome = _look_at(one, now, silence, deadline)
                if outcome is not None:
                    running.remove(one)
                    finish(outcome)
            if time.monotonic() >= deadline:
                for job in waiting:
                    finish(Outcome(job.name, "not run", detail="the budget was spent before this job could start"))
                waiting.clear()
            while waiting and len(running) < workers:
                running.append(_start(waiting.pop(0), folder, time.time() + deadline - time.monotonic()))
            if running:
                time.sleep(poll)
    finally:
        for one in running:
            _kill(one)
        for one in running:
            seconds = time.monotonic() - one.started
            reason = _with_log("killed: the suite was interrupted", one.log)
            finish(Outcome(one.job.name, "timed out", seconds, reason, _result(one.result)[0]))
        for job in waiting:
            finish(Outcome(job.name, "not run", detail="the suite was interrupted before this job could start"))
    return [outcomes[job.name] for job in jobs]


def _start(job: Job, folder: Path, deadline: float) -> _Running:
    stem = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in job.name)
    log, result = folder / f"{stem}.log", folder / f"{stem}.result.json"
    result.unlink(missing_ok=True)
    told = {RESULT_VARIABLE: str(result), DEADLINE_VARIABLE: str(deadline), "PYTHONUNBUFFERED": "1"}
    trace = Trace()
    with log.open("wb") as file:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **job.environment, **told, **trace.environment},
            pass_fds=trace.descriptors,
            start_new_session=True,
        )
    now = time.monotonic()
    return _Running(job, process, trace, log, result, now, now)


def _look_at(one: _Running, now: float, silence: float, deadline: float) -> Outcome | None:
    """The outcome of a job that has ended, or is ended here; None while it may go on."""
    seconds = now - one.started
    status = one.process.poll()
    if status is not None:
        _kill(one)  # whatever it started and left behind
        return _ended(one, status, seconds)
    said = one.log.stat().st_size
    if said != one.said:
        one.said, one.heard = said, now
    reason = ""
    if now - one.heard > silence:
        reason = f"killed: it printed nothing for {silence:g} s{one.trace.remark(one.process.pid)}"
    elif now > deadline + GRACE_SECONDS:
        reason = "killed: the budget was spent"
    if not reason:
        return None
    _kill(one)
    return Outcome(one.job.name, "timed out", seconds, _with_log(reason, one.log), _result(one.result)[0])


def _ended(one: _Running, status: int, seconds: float) -> Outcome:
    result, problem = _result(one.result)
    if status < 0:
        problem = f"ended by {signal.Signals(-status).name}"
    elif status > 0:
        problem = f"exit status {status}"
    if problem or result is None:
        return Outcome(one.job.name, "crashed", seconds, _with_log(problem, one.log), result)
    if result.get("ok") is not True:
        return Outcome(one.job.name, "failed", seconds, str(result.get("error", "")), result)
    return Outcome(one.job.name, "ok", seconds, "", result)


def _result(path: Path) -> tuple[dict[str, Any] | None, str]:
    """What a job wrote, and what is wrong with that."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, "it ended without a result"
    except json.JSONDecodeError as error:
        return None, f"its result is no JSON: {error}"
    return (result, "") if isinstance(result, dict) else (None, "its result is no JSON object")


def _with_log(reason: str, log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        tail = file.read().decode(errors="replace").strip()
    return f"{reason}\n{tail}" if tail else reason


def _kill(one: _Running) -> None:
    """End a job's process and what it started: its session is its process group."""
    with contextlib.suppress(ProcessLookupError):  # all of the group had ended
        os.killpg(one.process.pid, signal.SIGKILL)
    one.process.wait()
    one.trace.close()
