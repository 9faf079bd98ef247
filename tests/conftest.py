"""What every test needs settled before it imports triton: interpreter or GPU, and how thorough hypothesis is."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import nightly
from tests.machine import GPU

PROJECT_ROOT = Path(__file__).resolve().parent.parent

if not GPU:
    # Triton reads this once, when it is imported: kernels of this process then run under its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# Processes that tests start find this checkout's nsa_gen, whatever folder they start in.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))

# Several pytest workers share the cores; one thread each is quicker than all of them fighting.
# Tests look at what is logged and at which tables are found, whatever the developer's shell says.
for name in ("NSA_GEN_QUIET", "NSA_GEN_TUNED"):
    os.environ.pop(name, None)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/gpu, which are known only if they are declared here."""
    parser.addoption("--gpu-report", metavar="FILE", help="append what tests marked gpu find to FILE, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    """Set hypothesis up: it never looks at the clock, and draws the same examples on every run in CI."""
    from hypothesis import HealthCheck, settings

    patient: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("nsa_gen", print_blob=True, **patient)
    settings.register_profile("ci", print_blob=True, derandomize=True, **patient)
    settings.load_profile("ci" if os.environ.get("CI") else "nsa_gen")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Save the interpreter most of its time; let its results depend neither on the order of tests nor on numpy."""
    controls_workers = session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput")
    if GPU or controls_workers:
        return
    from nsa_gen.verification.calls import quick_interpreter, steady_products

    quick_interpreter()
    steady_products()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave nightly tests out of a run of everything; skip those marked `gpu` on a machine without one."""
    nightly.mark(items)
    if runs_everything(config):
        left_out = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    if GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    interpreted = os.environ.get("NSA_GEN_TEST_DEVICE") == "cpu"
    for item in items:
        if item.get_closest_marker("gpu") and not (interpreted and item.path.parent.name == "gpu"):
            item.add_marker(skip)


def runs_everything(config: pytest.Config) -> bool:
    """Whether nothing narrower than all tests was asked for."""
    folders = {Path(PROJECT_ROOT, argument).resolve() for argument in config.args}
    return folders == {PROJECT_ROOT / "tests"} and not (config.option.keyword or config.option.markexpr)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare Python's search for garbage what lives as long as the session, and search less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def compiler_environment() -> dict[str, str]:
    """The environment of a subprocess in which triton compiles rather than interprets."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture
def compiling(compiler_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code with arguments in the checkout, where triton compiles and sees no GPU; it must succeed."""

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**compiler_environment, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(
            command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture
def project_root() -> Path:
    """The checkout the tests run in."""
    return PROJECT_ROOT
