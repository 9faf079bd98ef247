"""tools/setup.sh: which Python it takes, what it installs in which order, and that an interruption is recovered from.

A fake Python records what it is asked to do, so nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("python3", "python3.11", "python3.12", "python3.13", "python3.14")

FAKE_PYTHON = """#!/bin/sh
# A Python that notes its calls, makes "environments" that hold a copy of itself, and installs nothing.
case "$*" in
  *version_info*) [ -z "$FAKE_TOO_OLD" ]; exit ;;
  --version) echo "Python 3.9.1"; exit ;;
  "-m venv"*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
  "-m pip"*) echo "$*" >>"$FAKE_LOG"; [ -z "$FAKE_PIP_FAILS" ] ; exit ;;
esac
"""


@dataclass(frozen=True)
class Checkout:
    """A checkout with nothing in it but what the script reads, and fake programs that come first on the path."""

    folder: Path
    programs: Path
    log: Path

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script; keyword arguments are environment variables."""
        return subprocess.run(
            ["sh", "tools/setup.sh", ".venv"],
            cwd=self.folder,
            env={"PATH": f"{self.programs}:{os.environ['PATH']}", "FAKE_LOG": str(self.log), **environment},
            capture_output=True,
            text=True,
        )

    def installed(self) -> list[str]:
        """What pip was asked for since the last time, without its switches in front."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.partition(" install --quiet ")[2] for line in lines if " install " in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A fake checkout on a fake machine without a GPU."""
    folder, programs = tmp_path / "checkout", tmp_path / "programs"
    (folder / "tools").mkdir(parents=True)
    programs.mkdir()
    shutil.copy(ROOT / "tools" / "setup.sh", folder / "tools")
    shutil.copy(ROOT / "constraints-cpu.txt", folder)
    for name in PYTHONS:
        (programs / name).write_text(FAKE_PYTHON)
    (programs / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    return Checkout(folder, programs, tmp_path / "log")


def test_torch_is_installed_first_and_alone_then_the_project_with_the_constraints(checkout):
    done = checkout.setup()
    assert done.returncode == 0, done.stderr
    torch, project = checkout.installed()
    assert torch == "torch==2.13.0"
    assert project == "--constraint constraints-cpu.txt --editable .[bench,test]"
    assert (checkout.venv / ".installed").exists()
    assert not (checkout.venv / ".installing").exists()


def test_torch_may_come_from_an_index_of_its_own(checkout):
    assert checkout.setup(TORCH_PIP_ARGS="--index-url https://example.org/cpu").returncode == 0
    torch, project = checkout.installed()
    assert torch == "--index-url https://example.org/cpu torch==2.13.0"
    assert "example.org" not in project


def test_with_a_gpu_there_are_no_constraints_for_machines_without(checkout):
    (checkout.programs / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H100'\n")
    assert checkout.setup().returncode == 0
    assert checkout.installed() == ["--editable .[bench,test]"]


def test_an_installation_that_broke_off_is_not_taken_for_a_whole_one_and_is_made_anew(checkout):
    assert checkout.setup(FAKE_PIP_FAILS="1").returncode != 0
    assert not (checkout.venv / ".installed").exists()
    (checkout.venv / "half_written").write_text("")
    done = checkout.setup()
    assert done.returncode == 0
    assert "starting again" in done.stderr
    assert not (checkout.venv / "half_written").exists()
    assert (checkout.venv / ".installed").exists()


def test_an_environment_of_the_user_s_own_is_completed_and_not_removed(checkout):
    assert checkout.setup().returncode == 0
    (checkout.venv / ".installed").unlink()
    (checkout.venv / "mine").write_text("")
    assert checkout.setup().returncode == 0
    assert (checkout.venv / "mine").exists()


def test_without_a_python_that_is_new_enough_it_says_what_is_needed_and_does_nothing(checkout):
    done = checkout.setup(FAKE_TOO_OLD="1")
    assert done.returncode == 1
    assert "3.11" in done.stderr
    assert "found Python 3.9.1" in done.stderr
    assert not checkout.venv.exists()


def test_a_named_python_that_does_not_exist_is_refused_by_name(checkout):
    done = checkout.setup(PYTHON="/no/such/python")
    assert done.returncode == 1
    assert "PYTHON=/no/such/python" in done.stderr


def test_make_installs_before_anything_else_and_runs_every_check():
    # These tests may run under a make of their own, whose flags would be handed on.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    plan = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "test", "VENV=no_such_environment"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert plan[0].startswith("tools/setup.sh")
    for step in ("ruff check", "ruff format --check", "nsa_gen.spec.schema --check", "--check", "pytest"):
        assert [line for line in plan if step in line], step
