"""Worker processes as the caller sees them: ask, wait so long and no longer, and survive whatever becomes of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nsa_gen
from nsa_gen._process import LineProcess, ending


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
        self._opening = dict(opening)
        self._environment = dict(environment)
        self._process: LineProcess | None = None

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send one request and return the answer.

        Raises:
            WorkerFailure: the worker answered with an error, died, or was silent for `timeout` seconds (it is then
                ended, with whatever it had started).
        """
        started = self._process is None
        process = self._process = self._process or LineProcess(
            [sys.executable, "-m", "nsa_gen.targets.worker"], self._environment
        )
        try:
            if started:
                process.tell(self._opening)
            process.tell(request)
            line = process.read_line(timeout)
        except TimeoutError:
            reason = f"no answer within {timeout:g} s; the compiler was stopped{process.whereabouts()}"
            detail = process.errors()
            self.close()
            raise WorkerFailure(reason, detail) from None
        except (EOFError, BrokenPipeError):
            status = process.wait() or 0
            detail = process.errors()
            self.close()
            raise WorkerFailure(f"the compiler's process {ending(status)}", detail) from None
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailure(answer["error"], answer.get("detail", ""))
        return answer

    def close(self) -> None:
        """End the process and everything it started; a later `ask` starts a fresh one."""
        process, self._process = self._process, None
        if process is not None:
            process.close()
