"""Worker processes as the caller sees them: ask, wait so long and no longer, and survive whatever becomes of them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nsa_gen


class WorkerFailure(RuntimeError):
    """A request that got no good answer; the message is one line, `detail` the whole story."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


def worker_environment(cache_dir: Path, triton_path: Path | None) -> dict[str, str]:
    """The environment of a worker: never the interpreter, kernels cached in `cache_dir`, this nsa_gen importable."""
    environment = {name: value for name, value in os.environ.items() if not _steers_triton(name)}
    roots = [str(triton_path)] if triton_path else []
    roots.append(str(Path(nsa_gen.__file__).resolve().parents[1]))
    roots += [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    environment["PYTHONPATH"] = os.pathsep.join(roots)
    environment["TRITON_CACHE_DIR"] = str(cache_dir)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return environment


def _steers_triton(name: str) -> bool:
    """Whether a variable changes what is compiled: the report is about the package, not about the caller's shell."""
    kept = {"TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_CUOBJDUMP_PATH", "TRITON_LIBDEVICE_PATH"}
    return name.startswith("TRITON_") and name not in kept


class Worker:
    """One `nsa_gen.targets.worker` process, started when first asked and again after it died or was ended."""

    def __init__(self, opening: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._opening = json.dumps(dict(opening))
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self._unread = b""

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send one request and return the answer.

        Raises:
            WorkerFailure: the worker answered with an error, died, or was silent for `timeout` seconds (it is then
                ended, with whatever it had started).
        """
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(request)).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(timeout)
        except TimeoutError:
            detail = self._log_tail()
            self.close()
            raise WorkerFailure(f"no answer within {timeout:g} s; the compiler was stopped", detail) from None
        except (EOFError, BrokenPipeError):
            status = self._process.wait()
            detail = self._log_tail()
            self.close()
            raise WorkerFailure(f"the compiler's process {_ending(status)}", detail) from None
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailure(answer["error"], answer.get("detail", ""))
        return answer

    def close(self) -> None:
        """End the process and everything it started; a later `ask` starts a fresh one."""
        process, self._process, self._unread = self._process, None, b""
        if process is None:
            return
        if process.poll() is None:
            # A session of its own, so that an assembler the compiler started ends with it.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile(prefix="nsa_gen_worker_")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nsa_gen.targets.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._environment,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(self._opening.encode() + b"\n")

    def _read_line(self, timeout: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        answers = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
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

    def _log_tail(self, limit: int = 4000) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - limit))
        return self._log.read().decode(errors="replace")


def _ending(status: int) -> str:
    if status >= 0:
        return f"exited with {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
