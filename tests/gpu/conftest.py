"""Tests marked `gpu` here run in a process that may hang, crash or lose its GPU, each with a limit of seconds.

`@pytest.mark.gpu(seconds=..., alone=True)`: how long a test may take (600 s, interpreted 2 h; 240 s of them without a
sign of life), and whether it has a process of its own. Others share one until a test fails in it. Parameters are what
`repr` can write.
With `--gpu-report FILE` what tests find is appended to a file as JSON lines, as soon as it is known.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nsa_gen.workers import Worker, WorkerFailure, worker_environment
from tests.gpu.device import DEVICE

PROJECT = Path(__file__).resolve().parents[2]
SECONDS, SILENCE_SECONDS = 7200.0 if DEVICE == "cpu" else 600.0, 240.0

# A GPU machine with torch, triton, pytest and hypothesis alone still runs the tests of generated packages.
if importlib.util.find_spec("pydantic") is None:
    collect_ignore = sorted({path.name for path in Path(__file__).parent.glob("test_*.py")} - {"test_hopper.py"})


class Runner:
    """Runs tests in a worker, and keeps what they say."""

    def __init__(self, command: tuple[str, ...] = (sys.executable, "-m", "tests.gpu.worker")) -> None:
        environment = worker_environment(PROJECT, interpreted=DEVICE == "cpu", OMP_NUM_THREADS="2")
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        self.worker = Worker(command, environment)
        atexit.register(self.worker.close)

    def run(self, item: pytest.Function, mark: pytest.Mark) -> None:
        """Run a test; its failure, or that of its process, is this one's."""
        until = time.monotonic() + mark.kwargs.get("seconds", SECONDS)
        alone = mark.kwargs.get("alone", False)

        def patience() -> float:
            return max(0.1, min(SILENCE_SECONDS, until - time.monotonic()))

        def hear(said: dict[str, Any]) -> float:
            if "found" in said:
                note(item.config, {"test": item.nodeid, **said})
            return patience()

        # importlib's mode of importing gives modules other names than those they are found by.
        module = ".".join(item.path.relative_to(PROJECT).with_suffix("").parts)
        names = item._fixtureinfo.argnames
        arguments = repr({name: item.funcargs[name] for name in names})
        if alone:
            self.worker.end()
        request = {"module": module, "name": item.originalname, "arguments": arguments}
        answer, failed = {}, ""
        try:
            answer = self.worker.ask(request, patience(), hear)
        except WorkerFailure as failure:
            failed = f"{failure}\n{failure.detail}"
        if alone or failed:  # which may have left the GPU unusable
            self.worker.end()
        if failed:
            pytest.fail(failed, pytrace=False)
        if "skipped" in answer:
            pytest.skip(answer["skipped"])


def note(config: pytest.Config, line: dict[str, Any]) -> None:
    """Append a line to the report."""
    path = config.getoption("gpu_report", None)
    if path is not None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


_runner: list[Runner] = []


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Call a test in the worker; what is not marked is called here."""
    mark = pyfuncitem.get_closest_marker("gpu")
    if mark is None:
        return None
    if not _runner:
        from nsa_gen.machine import machine

        note(pyfuncitem.config, {"machine": machine(), "device": DEVICE})
        _runner.append(Runner())
    _runner[0].run(pyfuncitem, mark)
    return True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Write how each test ended."""
    report = (yield).get_result()
    if item.get_closest_marker("gpu") is not None and (report.when == "call" or report.skipped):
        detail = "" if report.passed else report.longreprtext
        line = {"test": item.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "detail": detail}
        note(item.config, line)
