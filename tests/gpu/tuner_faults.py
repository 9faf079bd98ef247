"""The tuner on a GPU with candidates that go wrong in earnest, and with runs that are killed.

The package that the measuring process imports is doctored: for one configuration of one kernel, its launch also writes
through a wild pointer, starts a kernel that never ends, spoils the output, asks for more memory than there is, or ends
the process or its owner. Every other candidate must come to its result as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa_gen.hardware import gpu_for_target
from nsa_gen.lowering import lower
from nsa_gen.spec import Spec, parse_spec
from nsa_gen.tuning import EFFORTS, Bucket, Settings, Store, Tools, TuneReport, tune
from nsa_gen.tuning.backend import WORKER, Backend, gpu_backend
from nsa_gen.tuning.space import kernel_space
from tests.gpu.common import say

SPEC = """\
version: 1
name: tuner_faults
heads: {query: 8, kv: 2}
head_dim: 64
dtype: bfloat16
window: {size: 512}
combine: {gate: none}
passes: [forward, backward]
"""
KERNEL, MODULE = "window_forward", "kernels/banded.py"
TOKENS = 2048
HANG_SECONDS = 25.0
"""What a candidate may be silent for: more than a first launch takes when the GPU is shared with other jobs."""
EXPECTED = {
    "illegal access": ("left the GPU unusable", "crashed"),
    "hang": ("hung",),
    "wrong": ("wrong",),
    "out of memory": ("OutOfMemoryError",),
    "crash": ("crashed",),
}
"""By fault, how the reason begins with which its candidate is quarantined."""

FAULTS = '''"""A launch that goes wrong for one configuration."""

import json
import os
import signal
from pathlib import Path

import torch
import triton
import triton.language as tl

SCRIPT = json.loads(os.environ.get("NSA_GEN_FAULT", "{}"))


@triton.jit
def wild_kernel(x_ptr):
    tl.store(x_ptr + tl.cast(1 << 44, tl.int64), 0.0)


@triton.jit
def endless_kernel(x_ptr):
    x = tl.load(x_ptr, volatile=True)
    while x == x:
        x = tl.load(x_ptr, volatile=True)


def misbehave(config, q, o):
    if not SCRIPT or config != SCRIPT["config"]:
        return
    fault, flag = SCRIPT["fault"], Path(SCRIPT["flag"])
    if fault == "illegal access":
        wild_kernel[(1,)](o)
    elif fault == "hang":
        endless_kernel[(1,)](torch.zeros(1, device=q.device))
    elif fault == "wrong":
        o.mul_(1.5)
    elif fault == "out of memory":
        torch.empty(1 << 44, dtype=torch.uint8, device=q.device)
    elif fault == "crash":
        os._exit(11)
    elif not flag.exists() and fault in ("worker killed", "run killed"):
        flag.touch()
        os.kill(os.getpid() if fault == "worker killed" else os.getppid(), signal.SIGKILL)
'''


def fault_config(spec: Spec, target: str = "sm_90") -> dict[str, int]:
    """The configuration that goes wrong: one that every effort tries, and that is not the default."""
    program = lower(spec)
    gpu, bucket = gpu_for_target(target), Bucket.of(TOKENS)
    space = kernel_space(program, program.kernel(KERNEL), gpu, bucket, EFFORTS["quick"].candidates)
    return space.candidates[-1]


def doctored(package: Path, folder: Path) -> Path:
    """A copy of a package whose launch of KERNEL calls `misbehave` once the kernel has been launched."""
    copy = folder / package.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(package, copy)
    (copy / "faults.py").write_text(FAULTS, encoding="utf-8")
    path = copy / MODULE
    text = path.read_text(encoding="utf-8")
    start = text.index("def forward(")
    end = text.index("    return o, lse\n", start)
    text = text[:end] + f'    misbehave(configs.get("{KERNEL}", q.device), q, o)\n' + text[end:]
    path.write_text(
        text.replace("from ..runtime.launch import", "from ..faults import misbehave\nfrom ..runtime.launch import", 1)
    )
    return copy


def tuned(fault: str, cache: Path, *, resume: bool = False, command: tuple[str, ...] = WORKER) -> TuneReport:
    """Tune SPEC in a cache of its own while one configuration goes wrong."""
    spec = parse_spec(SPEC)
    script = {"fault": fault, "config": fault_config(spec), "flag": str(cache.parent / f"{cache.name}.flag")}

    def make(package: Path, of: Spec, settings: Settings, number: int, tell: Callable[[str], None]) -> Backend:
        copy = doctored(package, package.parent.parent / "doctored")
        os.environ["NSA_GEN_FAULT"] = json.dumps(script)
        backend = gpu_backend(copy, of, settings, number, tell, candidate_seconds=HANG_SECONDS, command=command)
        del os.environ["NSA_GEN_FAULT"]
        return backend

    os.environ["NSA_GEN_CACHE_DIR"] = str(cache)
    tools = Tools(say=say, show=lambda done, total, what: say(f"{done}/{total} {what}"), backend=make)
    tools.store = Store(cache)
    return tune(spec, tools=tools, shapes=(TOKENS,), effort="quick", resume=resume, jobs=4)


def judge(fault: str, report: TuneReport) -> list[str]:
    """What is wrong with how a run took its fault; empty if nothing."""
    spec = parse_spec(SPEC)
    (result,) = report.results
    problems = []
    expected = EXPECTED.get(fault, ())
    wins = report.target.startswith("sm_") and result.configs.get(KERNEL) == fault_config(spec, report.target)
    if wins and expected:  # else the candidate itself is sound
        problems.append("the candidate that goes wrong has won")
    if result.gain < 1.0:
        problems.append(f"slower than the default: {result.gain:.3f}x")
    mine = ", ".join(f"{name}={value}" for name, value in fault_config(spec, report.target).items())
    for name, reason in report.quarantined.items():
        if mine not in name:
            problems.append(f"another was blamed: {name}: {reason}")
        elif not reason.startswith(expected):
            problems.append(f"expected {' or '.join(expected)}, got {reason}")
    if expected and not report.quarantined:
        problems.append("nobody was quarantined")
    if result.problem and fault not in ("read-only cache", "full disk"):
        problems.append(result.problem)
    return problems


def tuner_fault_job(result: dict[str, Any], *, fault: str, **rest: Any) -> None:
    """A fault, and what the tuner makes of it."""
    cache = Path(tempfile.mkdtemp(prefix="nsa_gen_tuner_")) / "cache"
    result["fault"] = fault
    problems: list[str] = []
    if fault == "run killed":
        killed = _run(fault, cache)
        if killed.wait() != -signal.SIGKILL:
            problems.append(f"the run was not killed: exit status {killed.returncode}")
        report = tuned("none", cache, resume=True)
        if not report.resumed:
            problems.append("nothing was resumed")
    elif fault == "two tuners":
        other = _run("none", cache)
        report = tuned("none", cache)
        if status := other.wait():
            problems.append(f"the other tuner ended with {status}")
    elif fault == "read-only cache":
        cache.write_text("a file where the folder should be")
        report = tuned(fault, cache)
        if report.results[0].saved is not None or "not saved" not in report.results[0].problem:
            problems.append("it was saved where nothing can be")
    elif fault == "full disk":
        from nsa_gen.tuning import store

        plain, store.write_whole = store.write_whole, _no_space
        try:
            report = tuned(fault, cache)
        finally:
            store.write_whole = plain
        if "No space left" not in report.results[0].problem:
            problems.append("a full disk went unnoticed")
        again = tuned("none", cache, resume=True)
        if not again.resumed or again.results[0].saved is None:
            problems.append("what was found was not saved afterwards")
    else:
        report = tuned(fault, cache)
        if fault == "worker killed" and not (cache.parent / "cache.flag").exists():
            problems.append("the worker was not killed")
    problems += judge(fault, report)
    result.update(ok=not problems, error="; ".join(problems), report=report.to_json())


def _no_space(path: Path, text: str) -> None:
    raise OSError(28, "No space left on device", str(path))


def _run(fault: str, cache: Path) -> subprocess.Popen[bytes]:
    """A tuning in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", __name__, fault, str(cache)])


def main() -> int:
    """One tuning, as a process that may be killed."""
    problems = judge(sys.argv[1], tuned(sys.argv[1], Path(sys.argv[2])))
    print("\n".join(problems))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
