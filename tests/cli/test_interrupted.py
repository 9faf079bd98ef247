"""Ctrl-C in the middle of writing: what was there stays, nothing is half-written, and one line says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nsa_gen.bench.records import read_results, write_json
from tests.bench.fakes import sample_results

# A command that says so and waits when it has written `COUNT` of its scratch files, then goes on as if nothing was.
SLOW_WRITER = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a caller in the background has it ignored
plain, written = os.{function}, []
def slow(*arguments):
    plain(*arguments)
    written.append(arguments)
    if len(written) == {count}:
        print("writing", flush=True)
        time.sleep({seconds})
os.{function} = slow
from nsa_gen.cli import main
sys.exit(main(sys.argv[1:]))
"""


def interrupt(folder: Path, function: str, count: int, *arguments: str) -> tuple[int, str]:
    """Run a command in a folder, send SIGINT at its `count`-th call of a function of os; its exit code and errors."""
    program = SLOW_WRITER.format(function=function, count=count, seconds=60 if function == "fsync" else 1)
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
    )  # fmt: skip
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "writing\n":
        assert line, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    return process.returncode, errors


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def commands(tmp_path):
    """The commands that write, each with arguments that make it write into `out`."""
    write_json(tmp_path / "results.json", sample_results())
    return {
        "generate": ("generate", "tiny", "-o", "out"),
        "new": ("new", "mine", "-o", "out/mine.yaml"),
        "report": ("report", "results.json", "-o", "out/page.html"),
    }


@pytest.mark.parametrize(("name", "count"), [("generate", 9), ("new", 2), ("report", 1)])
def test_a_first_writing_that_is_interrupted_leaves_no_file_and_no_folder(tmp_path, commands, name, count):
    assert interrupt(tmp_path, "fsync", count, *commands[name]) == (130, "nsa-gen: interrupted\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["generate", "new"])
def test_what_was_there_before_stays_as_it_was(tmp_path, commands, nsa_gen, name):
    force = ("--force",) if name == "new" else ()
    assert nsa_gen(*commands[name]).returncode == 0
    out = tmp_path / "out"
    for path in out.rglob("*.*"):
        path.write_bytes(path.read_bytes().replace(b"0", b"1"))  # so that there is something to write
    before = contents(out)
    assert interrupt(tmp_path, "fsync", 1, *commands[name], *force) == (130, "nsa-gen: interrupted\n")
    assert contents(out) == before


def test_an_interruption_while_files_are_put_in_place_waits_until_all_of_them_are(tmp_path, commands, nsa_gen):
    code, _ = interrupt(tmp_path, "replace", 3, *commands["generate"])
    assert code == 130
    assert nsa_gen("generate", "tiny", "-o", "out", "--check").returncode == 0


BENCH = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.cuda.is_available = lambda: True
from nsa_gen.bench import session
plain = session.Session.__init__
def start(self, *arguments, **more):
    plain(self, *arguments, command=(sys.executable, {worker!r}), **more)
session.Session.__init__ = start
from nsa_gen.bench.peers import CONTENDERS
CONTENDERS["hangs"] = CONTENDERS["cudnn"]
from nsa_gen.cli import main
sys.exit(main(["bench", "tiny", "--against", "hangs", "--tokens", "64,128", "-o", "out/results.json"]))
"""


def test_an_interrupted_benchmark_ends_its_workers_and_keeps_its_journal(tmp_path):
    worker = Path(__file__).parents[1] / "bench" / "fake_worker.py"
    environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch")}
    (tmp_path / "scratch").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", BENCH.format(worker=str(worker))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    journal = tmp_path / "out" / "results.jsonl"
    while not journal.exists() or len(journal.read_text().splitlines()) < 2:  # the check is done, a contender hangs
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and errors.splitlines()[-1] == "nsa-gen: interrupted"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.jsonl"]
    found = read_results(journal)
    assert {task.status for task in found.tasks} <= {"ok"}  # what the interruption killed has not failed
    assert [check.contender for check in found.checks] == ["nsa_gen"] and found.settings["seed"] == 0
    assert list((tmp_path / "scratch").iterdir()) == []
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_a_folder_that_cannot_be_written_is_told_in_a_line(nsa_gen, tmp_path):
    for arguments in (("generate", "tiny", "-o", "/proc/out"), ("new", "mine", "-o", "/proc/mine.yaml")):
        answer = nsa_gen(*arguments)
        assert answer.returncode == 1 and "cannot be written" in answer.stderr and "Traceback" not in answer.stderr
