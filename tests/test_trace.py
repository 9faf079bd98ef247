"""What is said of a process that hangs, wherever it hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nsa_gen._process import LineProcess
from nsa_gen._trace import Trace, told

LAUNCHING = Path(__file__).with_name("launching_worker.py")
BEGIN = """
import ctypes, signal, sys, time
from nsa_gen._trace import watched
watched()
def hang_somewhere():
    say()
    {hang}
def say():
    print("begun", flush=True)
hang_somewhere()
"""
BLOCK = "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"
HANGS = {
    "in C": "time.sleep(600)",
    "in C with all signals blocked": f"{BLOCK}; time.sleep(600)",
    "in C and keeps the interpreter's lock": f"{BLOCK}; ctypes.PyDLL(None).sleep(600)",
    "in Python": "while True: pass",
}


def last_said(expected: str, *command: str, **environment: str) -> str:
    """What is said of a process, asked again until that begins as expected: it may not have come to where it hangs."""
    process = LineProcess([sys.executable, *command], {**os.environ, **environment})
    try:
        assert process.read_line(120) == b"begun", process.errors()
        for _ in range(20):
            said = process.whereabouts()
            if said.startswith(expected):
                break
            time.sleep(0.1)
        assert process.wait(0) is None, "being asked does not end it"
        return said
    finally:
        process.close()


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_a_process_that_hangs_is_said_to_be_where_it_hangs(hang: str) -> None:
    expected = " (in hang_somewhere (<string>:7) < <module> (<string>:10))"
    assert last_said(expected, "-c", BEGIN.format(hang=hang)) == expected


def test_of_a_process_that_ignores_signals_it_is_said_that_nothing_is_known() -> None:
    ignore = "[signal.signal(each, signal.SIG_IGN) for each in signal.valid_signals() - {9, 19, 32, 33}]"
    expected = " (its stacks could not be had)"
    assert last_said(expected, "-c", BEGIN.format(hang=f"{ignore}; time.sleep(600)")) == expected


def test_a_process_that_does_not_take_part_is_left_alone() -> None:
    assert last_said("", "-c", "import time; print('begun', flush=True); time.sleep(600)") == ""


def test_a_process_whose_file_was_closed_on_its_way_runs_all_the_same() -> None:
    trace = Trace()
    code = "import os; from nsa_gen._trace import VARIABLE, watched; watched(); assert VARIABLE not in os.environ"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **trace.environment}, check=False)
    assert done.returncode == 0 and trace.story(os.getpgrp()) == ""


def test_threads_follow_the_main_one_and_what_is_said_is_a_line_of_bounded_length() -> None:
    frame = '  File "/somewhere/long/site-packages/torch/cuda/__init__.py", line 1083 in synchronize'
    thread = "\n".join(["Thread 0x7f (most recent call first):", *[frame] * 100])
    main = 'Current thread 0x70 (most recent call first):\n  File "/a/bench/measure.py", line 77 in race'
    assert told("") == ""
    assert told(main) == "in race (bench/measure.py:77)"
    both = told(f"{thread}\n\n{main}")
    assert both.startswith("in race (bench/measure.py:77); another thread in synchronize (cuda/__init__.py:1083) < ")
    assert both.endswith("synchronize (cuda/__init__.py:1083) < ...")
    many = told("\n\n".join([thread] * 90 + [main]))
    assert "\n" not in many and len(many) < 1000 and many.endswith("; 88 more threads")


@pytest.mark.parametrize(("more", "last"), [(0, "second"), (3, "first")])
def test_the_last_kernel_is_named_whether_triton_launches_it_or_the_package_past_triton(
    tmp_path: Path, more: int, last: str
) -> None:
    expected = f" (launched {last}_kernel last; in main (tests/launching_worker.py:"
    # With a cache of its own it compiles, which brings signal handlers of LLVM's: they must not replace ours.
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    assert last_said(expected, str(LAUNCHING), str(more), **environment).startswith(expected)
