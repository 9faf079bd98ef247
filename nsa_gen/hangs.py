"""What a hanging process is doing: its threads' stacks and the kernel that it launched last, for its parent to read.

faulthandler writes the stacks in a signal handler, so the hanging thread need not cooperate. The last kernel's name is
in memory that both processes map, so nothing is sent or asked for until the process hangs.
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
"""Names the file that a process shares with its parent, by descriptor and inode."""
_SIGNAL = signal.SIGURG
"""Not SIGUSR1 or SIGUSR2: LLVM replaces their handlers when it compiles. Without a handler, this signal is ignored."""
_NAME, _HEADER = 112, 128
"""The file begins with the last kernel's name, padded, and the process id. The stacks follow."""
_ANSWER_SECONDS, _SETTLED_SECONDS = 5.0, 0.3
"""How long to wait for stacks, and the pause after which they are complete."""
_FRAMES, _THREADS, _LIMIT = 6, 3, 600
"""Maximum of reported innermost frames per thread, of threads, and of characters."""

_shared: mmap.mmap | None = None


class Trace:
    """The parent's side of the file in which a process records what it is doing."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="nsa_gen_trace_")  # noqa: SIM115 (closed by `close`)
        self._file.truncate(_HEADER)
        self.descriptors = (self._file.fileno(),)
        number = self._file.fileno()
        self.environment = {VARIABLE: f"{number}:{os.fstat(number).st_ino}"}

    def story(self, group: int) -> str:
        """What the process of a process group is doing, in a line of some 600 characters; "" if it reports nothing."""
        header = os.pread(self._file.fileno(), _HEADER, 0)
        kernel = header[:_NAME].rstrip(b"\0").decode(errors="replace")
        said = [f"launched {kernel} last"] if kernel else []
        pid = int(header[_NAME:].rstrip(b"\0") or 0)
        if pid:
            said.append(told(self._stacks(pid, group)) or "its stacks could not be had")
        return _cut("; ".join(said))

    def remark(self, group: int) -> str:
        """The story in brackets after a space, as the end of a sentence; "" without a story."""
        story = self.story(group)
        return f" ({story})" if story else ""

    def _stacks(self, pid: int, group: int) -> str:
        """The stacks of all threads as faulthandler writes them, as far as they arrive in time."""
        start = size = self._size()
        try:
            if os.getpgid(pid) != group:  # another process has the number by now
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
    """The output of faulthandler as one line: the innermost frames of threads, the main one first."""
    threads = [
        re.findall(r'^  File "(.*)", line (\d+) in (.*)$', thread, re.MULTILINE)
        for thread in re.split(r"^(?:Current thread|Thread) ", stacks, flags=re.MULTILINE)
    ]
    # Threads are listed from the newest to the oldest. The one that only waits for signals is left out.
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
    """Record for the parent what this process is doing, when it asks. Does nothing if the parent is not prepared."""
    global _shared
    # Children of this process do not have the file. Nor has this process, if one between it and its parent closed it.
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
    # A signal that the main thread blocks is delivered to a thread that does not block it.
    threading.Thread(target=_stand_by, daemon=True, name="nsa_gen_trace").start()
    _shared[_NAME:] = str(os.getpid()).encode().ljust(_HEADER - _NAME, b"\0")


def _stand_by() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {_SIGNAL})
    threading.Event().wait()


def note_launches() -> None:
    """From now on, have every launch of a Triton kernel record the kernel's name, whichever way it is launched.

    Triton's dispatcher, and packages, which launch without it, both call the function that `CompiledKernel.run`
    returns. Triton's own hooks are not suitable: with hooks, packages launch by the dispatcher, which takes about 30 us
    longer. This takes 0.3 us.
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
