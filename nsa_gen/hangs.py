"""What a process that hangs is at: the stacks of its threads, and the kernel it launched last, for its parent to read.

The stacks are written by faulthandler in a signal handler, which needs no cooperation of the thread that hangs. The
last kernel's name is in memory that both processes map, so nothing is sent or asked for until the process hangs.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

VARIABLE = "NSA_GEN_TRACE"
"""Names the file that a process shares with its parent, by its descriptor and inode."""
_SIGNAL = signal.SIGURG
"""Not SIGUSR1 or SIGUSR2, whose handlers LLVM replaces when it compiles. A process without a handler outlives it."""
_NAME, _HEADER = 112, 128
"""The file begins with the last kernel's name, padded, and the process's number; the stacks follow."""
_ANSWER_SECONDS, _SETTLED_SECONDS = 5.0, 0.3
"""How long stacks are waited for, and after which pause they are complete."""
_FRAMES, _THREADS, _LIMIT = 6, 3, 600
"""Most innermost frames of a thread, threads, and letters that are reported."""

_shared: mmap.mmap | None = None


class Trace:
    """The parent's side of the file in which a process leaves what it is at."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="nsa_gen_trace_")  # noqa: SIM115 (closed by `close`)
        self._file.truncate(_HEADER)
        self.descriptors = (self._file.fileno(),)
        number = self._file.fileno()
        self.environment = {VARIABLE: f"{number}:{os.fstat(number).st_ino}"}

    def story(self, group: int) -> str:
        """What the process, of a process group, is at: a line of at most some 600 letters; "" where it says nothing."""
        header = os.pread(self._file.fileno(), _HEADER, 0)
        kernel = header[:_NAME].rstrip(b"\0").decode(errors="replace")
        said = [f"launched {kernel} last"] if kernel else []
        pid = int(header[_NAME:].rstrip(b"\0") or 0)
        if pid:
            said.append(told(self._stacks(pid, group)) or "its stacks could not be had")
        return _cut("; ".join(said))

    def remark(self, group: int) -> str:
        """The story in brackets after a blank, as the end of a sentence; "" where there is none."""
        story = self.story(group)
        return f" ({story})" if story else ""

    def _stacks(self, pid: int, group: int) -> str:
        """The stacks of all threads as faulthandler writes them; as far as they come in time."""
        start = size = self._size()
        try:
            if os.getpgid(pid) != group:  # the number is another process's by now
                return ""
            os.kill(pid, _SIGNAL)
        except ProcessLookupError:
            return ""
        deadline = time.monotonic() + _ANSWER_SECONDS
        changed = time.monotonic()
        while (now := time.monotonic()) < deadline and (size == start or now - changed < _SETTLED_SECONDS):
            time.sleep(0.01)
            if size != (size := self._size()):
                changed = time.monotonic()
        return os.pread(self._file.fileno(), size - start, start).decode(errors="replace")

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Forget the file, which nothing else has."""
        self._file.close()


def told(stacks: str) -> str:
    """What faulthandler has written, as a line: the innermost frames of threads, the main one first."""
    threads = [
        re.findall(r'^  File "(.*)", line (\d+) in (.*)$', thread, re.MULTILINE)
        for thread in re.split(r"^(?:Current thread|Thread) ", stacks, flags=re.MULTILINE)
    ]
    # Threads are listed from the newest to the oldest. The one that only serves to be told of signals is left out.
    seen = [frames for frames in reversed(threads) if frames and not any(_stand_by.__name__ == f[2] for f in frames)]
    lines = []
    for frames in seen[:_THREADS]:
        places = [f"{name} ({'/'.join(PurePath(path).parts[-2:])}:{line})" for path, line, name in frames[:_FRAMES]]
        lines.append(" < ".join(places) + (" < ..." if len(frames) > _FRAMES else ""))
    more = f"; {len(seen) - _THREADS} more threads" if len(seen) > _THREADS else ""
    return ("in " + "; another thread in ".join(lines) + more) if lines else ""


def _cut(text: str) -> str:
    return text if len(text) <= _LIMIT else f"{text[:_LIMIT]} ..."


def watched() -> None:
    """Leave for the parent what this process is at when it asks. Nothing where the parent has not made ready for it."""
    global _shared
    # Children of this process do not have the file; nor has this one if what is between it and its parent closed it.
    file, _, inode = os.environ.pop(VARIABLE, "-1:").partition(":")
    file = int(file)
    try:
        if str(os.fstat(file).st_ino) != inode:
            return
        _shared = mmap.mmap(file, _HEADER)
    except OSError:
        return
    os.lseek(file, 0, os.SEEK_END)
    faulthandler.register(_SIGNAL, file=file, all_threads=True)
    # A signal that the main thread blocks goes to a thread that does not.
    threading.Thread(target=_stand_by, daemon=True, name="nsa_gen_trace").start()
    _shared[_NAME:] = str(os.getpid()).encode().ljust(_HEADER - _NAME, b"\0")


def _stand_by() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {_SIGNAL})
    threading.Event().wait()


def note_launches() -> None:
    """Have every launch of a Triton kernel note the kernel's name from now on, by whichever way it is launched.

    Triton's dispatcher, and packages, which launch past it, both call what `CompiledKernel.run` gives. Triton's own
    hooks are not for this: while there are any, packages launch by the dispatcher, which takes some 30 us longer. This
    takes 0.3 us.
    """
    shared = _shared
    if shared is None:
        return
    from triton.compiler import CompiledKernel

    make_launcher = CompiledKernel._init_handles

    def make_noting_launcher(self: Any) -> None:
        make_launcher(self)
        if getattr(self._run, "noting", None) is None:
            self._run = _noting(shared, self._run, self.name)

    CompiledKernel._init_handles = make_noting_launcher


def _noting(shared: mmap.mmap, run: Callable[..., Any], name: str) -> Callable[..., Any]:
    padded = name.encode()[:_NAME].ljust(_NAME, b"\0")

    def launch(*arguments: Any) -> Any:
        shared[:_NAME] = padded
        return run(*arguments)

    launch.noting = run  # type: ignore[attr-defined]
    return launch
