"""What every test needs settled before it imports triton: interpreter or GPU, and how thorough hypothesis is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.machine import GPU

PROJECT_ROOT = Path(__file__).resolve().parent.parent

if not GPU:
    # Triton reads this once, when it is imported: kernels of this process then run under its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# Processes that tests start find this checkout's nsa_gen, whatever folder they start in.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))

# Several pytest workers share the cores; one thread each is quicker than all of them fighting.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Set hypothesis up: no deadline (the interpreter is slow), and the same examples on every run in CI."""
    from hypothesis import settings

    settings.register_profile("nsa_gen", deadline=None, print_blob=True)
    settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "nsa_gen")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without one."""
    if GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def compiler_environment() -> dict[str, str]:
    """The environment of a subprocess in which triton compiles rather than interprets."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture
def project_root() -> Path:
    """The checkout the tests run in."""
    return PROJECT_ROOT
