"""The measuring process as its owner sees it: ask, listen for signs of life, and learn how it died."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nsa_gen._process import LineProcess, ending

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
        self._process: LineProcess | None = None

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
        process = self._process or self._start()
        candidate: int | None = None
        lost = ""
        try:
            process.tell(request)
            while True:
                line = process.read_line(start_seconds if candidate is None else candidate_seconds)
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
            reason = f"hung: no sign of life for {seconds:g} s{process.whereabouts()}"
            self.close()
            raise WorkerDied(reason, candidate) from None
        except (EOFError, BrokenPipeError, json.JSONDecodeError):
            status = process.wait(10) or 0
            tail = "" if lost else _last_line(process.errors(300))
            self.close()
            raise WorkerDied(
                _story(status, lost, tail),
                candidate,
                from_outside=-status in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT),
            ) from None

    def close(self) -> None:
        """End the process and everything it started; a later `ask` starts a fresh one."""
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def _start(self) -> LineProcess:
        process = self._process = LineProcess(self._command, self._environment)
        with contextlib.suppress(BrokenPipeError):  # reading its answer will tell
            process.tell(self._opening)
        return process


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _story(status: int, lost: str, tail: str) -> str:
    if lost:
        return f"left the GPU unusable: {lost}"
    more = f" ({tail})" if tail and status >= 0 else ""
    return f"crashed: the measuring process {ending(status)}{more}"
