"""A process that is told and answers a line at a time: JSON lines in, JSON lines out."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nsa_gen._trace import Trace


class LineProcess:
    """A process from its start to its end, in a session of its own; what it writes to stderr is kept until then."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile(prefix="nsa_gen_worker_")  # noqa: SIM115 (closed with the process)
        self._trace = Trace()
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**environment, **self._trace.environment},
                pass_fds=self._trace.descriptors,
                start_new_session=True,
            )
        except BaseException:
            self._log.close()
            self._trace.close()
            raise
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._unread = b""

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send it a line. BrokenPipeError if it has ended."""
        self._input.write(json.dumps(dict(message)).encode() + b"\n")
        self._input.flush()

    def read_line(self, seconds: float) -> bytes:
        """The next line that it says. TimeoutError after so many seconds without a whole one, EOFError if it ended."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(self._output.fileno(), 65536)
            if not chunk:
                raise EOFError
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def errors(self, limit: int = 4000) -> str:
        """The last `limit` bytes that it has written to stderr."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - limit))
        return self._log.read().decode(errors="replace")

    def whereabouts(self) -> str:
        """What it is at, in brackets after a blank, to be said of one that hangs; "" where it leaves nothing."""
        return self._trace.remark(self._process.pid)

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit status, negative for a signal; None if it has not ended after so many seconds."""
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """End it and everything that it has started, an assembler that a compiler runs included."""
        with contextlib.suppress(ProcessLookupError):  # all of its session had ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._input, self._output, self._log):
            with contextlib.suppress(BrokenPipeError):  # it holds a line that nobody will read
                pipe.close()
        self._trace.close()


def ending(status: int) -> str:
    """How a process ended, by its exit status: "exited with 1" or "was ended by SIGKILL"."""
    if status >= 0:
        return f"exited with {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
