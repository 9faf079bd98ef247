"""Tests marked gpu: what becomes of one that fails, crashes, hangs or is cut short, and the report that they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.machine import alive

TESTS = """
import os, signal, time
import pytest
from tests.gpu.common import save, say
pytestmark = pytest.mark.gpu(seconds=60)
PIDS = "PIDS_FILE"

def note():
    with open(PIDS, "a") as file:
        file.write(f"{os.getpid()}\\n")

@pytest.mark.parametrize("shape", [(1, 2), 3])
def test_good(shape):
    note(); save({"shape": shape, "nan": float("nan")})
    assert shape in ((1, 2), 3) and os.environ["TRITON_INTERPRET"] == "1"
def test_wrong():
    note(); raise AssertionError("3 comparisons failed")
def test_crash():
    note(); save({"until": "here"}); os.kill(os.getpid(), signal.SIGSEGV)
@pytest.mark.gpu(seconds=12, alone=True)
def test_hang():
    note(); time.sleep(600)
@pytest.mark.gpu(seconds=6, alone=True)
def test_talks_for_too_long():
    while True:
        say("still here"); time.sleep(0.2)
def test_skips():
    pytest.skip("not here")
def test_last():
    note()
"""


@pytest.fixture
def module(project_root: Path, tmp_path: Path):
    path = project_root / "tests" / "gpu" / f"test_drawn_{os.getpid()}.py"
    path.write_text(TESTS.replace("PIDS_FILE", str(tmp_path / "pids")))
    yield path
    path.unlink()


def command(module: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "pytest", str(module), "-q", "-p", "no:cacheprovider", *more]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_test_ends_by_itself_and_the_report_says_how(module: Path, project_root: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    environment = {**os.environ, "NSA_GEN_TEST_DEVICE": "cpu"}
    done = subprocess.run(
        command(module, "--gpu-report", str(report)), cwd=project_root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout
    first, *rest = lines(report)
    assert {"torch", "triton", "commit"} <= set(first["machine"]) and first["device"] == "cpu"
    found = {each["test"].partition("::")[2]: each for each in rest if "outcome" in each}
    assert {name: each["outcome"] for name, each in found.items()} == {
        "test_good[shape0]": "passed",
        "test_good[3]": "passed",
        "test_wrong": "failed",
        "test_crash": "failed",
        "test_hang": "failed",
        "test_talks_for_too_long": "failed",
        "test_skips": "skipped",
        "test_last": "passed",
    }
    assert "AssertionError: 3 comparisons failed" in found["test_wrong"]["detail"]
    assert "ended by SIGSEGV" in found["test_crash"]["detail"]
    assert "no sign of life" in found["test_hang"]["detail"] and "in test_hang (" in found["test_hang"]["detail"]
    saved = [each["found"] for each in rest if "found" in each]
    assert saved == [{"shape": [1, 2], "nan": None}, {"shape": 3, "nan": None}, {"until": "here"}]
    pids = (tmp_path / "pids").read_text().split()
    # One process until a test fails in it; then each of wrong, crash, hang has ended its own.
    assert pids[0] == pids[1] == pids[2] and len(set(pids)) == 4


def test_a_run_that_is_cut_short_leaves_what_was_found_and_no_process(
    module: Path, project_root: Path, tmp_path: Path
) -> None:
    report, environment = tmp_path / "report.jsonl", {**os.environ, "NSA_GEN_TEST_DEVICE": "cpu"}
    module.write_text(module.read_text().replace("seconds=12,", "seconds=500,"))
    options = ("-k", "good or hang", "--gpu-report", str(report))
    process = subprocess.Popen(command(module, *options), cwd=project_root, env=environment, stdout=subprocess.DEVNULL)
    pids = tmp_path / "pids"
    while process.poll() is None and (not pids.exists() or len(pids.read_text().split()) < 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = lines(report)
    assert [each["outcome"] for each in found if "outcome" in each] == ["passed", "passed"]
    while any(alive(int(pid)) for pid in pids.read_text().split()):  # for ever, if it does not end with its parent
        time.sleep(0.05)
