"""Processes that may die, hang or be killed: compilers, measurements, verifications and GPU tests run in them.

A worker is a subprocess that answers requests, as JSON lines on stdin and stdout, and may report progress before an
answer. If it is silent for too long, it is asked for its Python stacks and the kernel that it launched last, and then
killed. The caller gets an answer or a `WorkerFailure`. The next request starts a fresh process. The two sides:

    worker = Worker([sys.executable, "-m", "some.module"], worker_environment(), opening)
    worker.ask({"do": ...}, seconds)                        # in the parent
    serve(lambda opening: handle)                           # in some.module: handle(request, say) -> answer
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nsa_gen.hangs import Trace, watched

T = TypeVar("T")
R = TypeVar("R")
Answer = dict[str, Any]

# The parent's side


class WorkerFailure(RuntimeError):
    """A request failed. The message is one line; `detail` is the traceback or the end of stderr."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


class WorkerDied(WorkerFailure):
    """The process ended before it answered, or was killed because it hung: "crashed: ...", "hung: ...".

    Attributes:
        status: its exit status, negative for a signal; None if it hung.
    """

    def __init__(self, reason: str, detail: str = "", status: int | None = None) -> None:
        super().__init__(reason, detail)
        self.status = status

    @property
    def hung(self) -> bool:
        """Whether it was killed after its silence."""
        return self.status is None

    @property
    def from_outside(self) -> bool:
        """Whether a signal from outside ended it."""
        return self.status in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)


class WorkerClosed(RuntimeError):
    """A request to a worker that was closed before or during it: the work was cancelled, nothing has failed."""


def worker_environment(*paths: Path, interpreted: bool = False, **more: str) -> dict[str, str]:
    """This process's environment with `paths` and this nsa_gen importable, and Triton's interpreter on or off."""
    environment = {**os.environ, **more}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    roots = [*map(str, paths), str(Path(__file__).resolve().parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    return environment


class Worker:
    """A subprocess that runs `serve`. It starts at the first request, and again after it died. Its stderr is kept.

    Args:
        command: the command that starts it.
        environment: all of its environment variables.
        opening: the first message that it gets.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], opening: Mapping[str, Any] | None = None
    ) -> None:
        self._command, self._environment, self._opening = list(command), dict(environment), dict(opening or {})
        self._process: _Process | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process's id, while there is a process."""
        return None if self._process is None else self._process.pid

    def ask(
        self,
        request: Mapping[str, Any],
        seconds: float,
        hear: Callable[[dict[str, Any]], float | None] = lambda said: None,
    ) -> Any:
        """Send a request and return its answer.

        Args:
            request: JSON data.
            seconds: silence after which the process is killed.
            hear: called with progress that the process reports; may return a new limit for its silence.

        Raises:
            WorkerDied: the process died, or was killed after too long a silence, with everything it had started.
            WorkerFailure: the request raised an exception in the process.
            WorkerClosed: the worker was closed.
        """
        with self._lock:
            if self._closed:
                raise WorkerClosed
            process = self._process = self._process or _Process(self._command, self._environment, self._opening)
        lost = ""
        try:
            process.tell(request)
            while True:
                said = json.loads(process.read_line(seconds))
                if "answer" in said:
                    return said["answer"]
                if "error" in said:
                    raise WorkerFailure(said["error"], said.get("detail", ""))
                lost = said.get("lost", "")
                if "says" in said:
                    seconds = hear(said["says"]) or seconds
        except TimeoutError:
            reason = f"hung: no sign of life for {seconds:.4g} s{process.whereabouts()}"
            raise WorkerDied(reason, self._buried(process)) from None
        except (EOFError, BrokenPipeError, ValueError):  # the line is not JSON, or `close` closed the pipe
            if self._closed:
                raise WorkerClosed from None
            status = process.wait(10) or 0
            detail = self._buried(process)
            last = (detail.strip().splitlines() or [""])[-1].strip()
            more = f" ({last[-300:]})" if last and status >= 0 else ""
            reason = f"left the GPU unusable: {lost}" if lost else f"crashed: the process {ending(status)}{more}"
            raise WorkerDied(reason, detail, status) from None

    def end(self) -> None:
        """Kill the process and everything it started. A later `ask` starts a fresh one."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.close()

    def close(self) -> None:
        """Like `end`, but permanently: an `ask` in another thread does not start a fresh process."""
        self._closed = True
        self.end()

    def _buried(self, process: _Process) -> str:
        """End a process that is no longer usable. Returns the end of its stderr."""
        detail = process.errors()
        self.end()
        return detail


def share(
    workers: Sequence[Worker],
    items: Sequence[T],
    do: Callable[[Worker, T], R],
    done: Callable[[T, R], None] = lambda item, result: None,
) -> list[R]:
    """The results of `do(worker, item)` in the order of the items. Each item goes to whichever worker is free.

    `done` is called as each ends, one call at a time. The workers are closed when this returns or raises. After the
    first exception, of `do` or in this thread, no further item is started, and those in progress raise `WorkerClosed`.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(items)):
        waiting.put(number)
    results: dict[int, R] = {}
    lock, stop, troubles = threading.Lock(), threading.Event(), list[BaseException]()

    def run(worker: Worker, ended: threading.Event) -> None:
        try:
            while not stop.is_set():
                number = waiting.get_nowait()
                result = do(worker, items[number])
                with lock:
                    results[number] = result
                    done(items[number], result)
        except queue.Empty:
            pass
        except BaseException as error:
            troubles.append(error)
            stop.set()
        finally:
            worker.close()  # by the thread that started it: at that thread's end the kernel would kill it
            ended.set()

    # An event marks a thread's end: before Python 3.13, `join` takes a thread for ended once a signal interrupted it.
    ends = [threading.Event() for _ in workers[: len(items)]]
    threads = [
        threading.Thread(target=run, args=pair, daemon=True) for pair in zip(workers[: len(items)], ends, strict=True)
    ]
    try:
        for thread in threads:
            thread.start()
        for ended in ends:
            ended.wait()
    finally:
        stop.set()
        for worker in workers:
            worker.close()
        for thread, ended in zip(threads, ends, strict=True):
            if thread.ident is not None:
                ended.wait()
    if troubles:
        raise troubles[0]
    return [results[number] for number in range(len(items))]


class _Process:
    """A subprocess from its start to its end, in its own session."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], opening: Mapping[str, Any]) -> None:
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
        self.pid = self._process.pid
        self._unread = b""
        with contextlib.suppress(BrokenPipeError):  # reading the answer will show it
            self.tell(opening)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a line. Raises BrokenPipeError if the process has ended."""
        self._input.write(json.dumps(dict(message)).encode() + b"\n")
        self._input.flush()

    def read_line(self, seconds: float) -> bytes:
        """The next line. Raises TimeoutError if none is complete after `seconds`, EOFError if the process ended."""
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
        """The last `limit` bytes of stderr; "" once it is closed."""
        if self._log.closed:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - limit))
        return self._log.read().decode(errors="replace")

    def whereabouts(self) -> str:
        """Where the process hangs, in brackets after a space; "" if it left no trace."""
        return self._trace.remark(self.pid)

    def wait(self, seconds: float) -> int | None:
        """The exit status, negative for a signal; None if the process still runs after `seconds`."""
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Kill the process and everything it started, such as an assembler."""
        with contextlib.suppress(ProcessLookupError):  # its whole session has already ended
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._input, self._output, self._log):
            with contextlib.suppress(BrokenPipeError):  # it holds a line that is never read
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


# The worker's side

LOST_STATUS = 3
"""Exit status of a process whose GPU became unusable."""
DETAIL_LIMIT = 6000

Say = Callable[[dict[str, Any]], None]
"""Reports progress to the parent, which is also a sign of life."""
Handle = Callable[[dict[str, Any], Say], Any]


class Lost(RuntimeError):
    """Raised by a request after which its process can no longer use the GPU. The process then ends."""


def serve(build: Callable[[dict[str, Any]], Handle]) -> NoReturn:
    """Build the handler of requests from the first line of standard input, then answer requests until it closes."""
    end_with_parent()
    watched()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # compilers and kernels print to standard output

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    handle = build(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        try:
            send({"answer": handle(json.loads(line), lambda says: send({"says": says}))})
        except Lost as lost:
            send({"lost": str(lost)})
            os._exit(LOST_STATUS)  # an orderly exit would wait for the GPU
        except Exception as error:
            send(describe(error))
    os._exit(0)


def describe(error: BaseException) -> dict[str, str]:
    """An exception as an answer: the innermost message on one line, and its shortened traceback."""
    innermost = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip().strip("^")]
    where = next((line.strip(" :") for line in str(error).splitlines() if line.startswith("at ")), "")
    # A compiler's first line only says that it failed. The line with this word says why.
    said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
    text = f"{type(innermost).__name__}: {said}" + (f" ({where})" if where and where not in said else "")
    detail = "".join(traceback.format_exception(error))
    return {"error": text[:400], "detail": detail[-DETAIL_LIMIT:]}


def end_with_parent() -> None:
    """Let the kernel end this process when its parent ends, for any reason. On Linux only; elsewhere a no-op."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
