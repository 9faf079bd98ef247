"""The measuring process as its owner sees it: ask, listen for signs of life, and learn how it died."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LOST_STATUS = 3
"""Exit status of a worker that a candidate has left without a usable GPU; its last line says why."""


class Lost(RuntimeError):
    """The GPU is of no more use to this process.

    Not in the worker's module: run as a script, that is another module than the one that engines would import.
    """


class WorkerDied(RuntimeError):
    """The process ended, or was ended because it hung, before it answered.

    `candidate` is the number of the one that it was at, None if it had not come to any. `from_outside` says that a
    signal ended it that nothing of ours sent.
    """

    def __init__(self, reason: str, candidate: int | None, *, from_outside: bool = False) -> None:
        super().__init__(reason)
        self.candidate, self.from_outside = candidate, from_outside


class WorkerProcess:
    """A process that answers a request a line: JSON lines in, JSON lines out.

    Before its answer it may write any number of `{"now": candidate}` and `{"round": times}`, each a sign of life.
    """

    def __init__(self, command: Sequence[str], opening: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._command, self._opening, self._environment = list(command), dict(opening), dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self._unread = b""

    @property
    def pid(self) -> int | None:
        """The process's number while there is one."""
        return None if self._process is None else self._process.pid

    def ask(
        self,
        request: Mapping[str, Any],
        start_seconds: float,
        candidate_seconds: float,
        heard: Callable[[dict[str, Any]], None] = lambda said: None,
    ) -> dict[str, Any]:
        """Send a request and return its answer.

        Args:
            request: what to send.
            start_seconds: silence allowed until the first candidate is begun.
            candidate_seconds: silence allowed after each.
            heard: is called with each round's times.

        Raises:
            WorkerDied: it ended, or was silent for too long and has been ended.
        """
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        candidate: int | None = None
        lost = ""
        try:
            process.stdin.write(json.dumps(dict(request)).encode() + b"\n")
            process.stdin.flush()
            while True:
                line = self._read_line(start_seconds if candidate is None else candidate_seconds)
                said = json.loads(line)
                if "now" in said:
                    candidate = said["now"]
                elif "round" in said:
                    heard(said)
                elif "lost" in said:
                    lost = said["lost"]
                else:
                    return said
        except TimeoutError:
            seconds = start_seconds if candidate is None else candidate_seconds
            self.close()
            raise WorkerDied(f"hung: no sign of life for {seconds:g} s", candidate) from None
        except (EOFError, BrokenPipeError, json.JSONDecodeError):
            status = self._status(process)
            tail = "" if lost else self._log_tail()
            self.close()
            raise WorkerDied(
                _story(status, lost, tail),
                candidate,
                from_outside=-status in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT),
            ) from None

    def close(self) -> None:
        """End the process and everything it started; a later `ask` starts a fresh one."""
        process, self._process, self._unread = self._process, None, b""
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # all of its session had ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # it holds a request that nobody will read
                    pipe.close()

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile(prefix="nsa_gen_tuner_")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._environment,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading its answer will tell
            self._process.stdin.write(json.dumps(self._opening).encode() + b"\n")
            self._process.stdin.flush()

    def _status(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return 0

    def _read_line(self, seconds: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        answers = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(answers, 65536)
            if not chunk:
                raise EOFError
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _log_tail(self, limit: int = 300) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - limit))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def _story(status: int, lost: str, tail: str) -> str:
    if lost:
        return f"left the GPU unusable: {lost}"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"crashed: the measuring process was ended by {name}"
    return f"crashed: the measuring process exited with {status}" + (f" ({tail})" if tail else "")
