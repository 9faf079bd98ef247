"""Workers that die, hang or lose their GPU, and what is reported of one that hangs, wherever it hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nsa_gen.hangs import Trace, told
from nsa_gen.workers import LOST_STATUS, Worker, WorkerClosed, WorkerDied, WorkerFailure, _Process, share

LAUNCHING = Path(__file__).with_name("launching_worker.py")
BEGIN = """
import ctypes, signal, sys, time
from nsa_gen.hangs import watched
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
    process = _Process([sys.executable, *command], {**os.environ, **environment}, {})
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
    code = "import os; from nsa_gen.hangs import VARIABLE, watched; watched(); assert VARIABLE not in os.environ"
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


SERVING = """
import os, signal, sys, time
from nsa_gen.workers import Lost, serve
def build(opening):
    def handle(request, say):
        print("for nobody")
        if "say" in request:
            for _ in range(3):
                time.sleep(0.3)
                say({"at": request["say"]})
        if request["do"] == "lose":
            raise Lost("illegal access")
        if request["do"] == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if request["do"] == "exit":
            sys.stderr.write("last words\\n"); os._exit(5)
        if request["do"] == "hang":
            time.sleep(600)
        return [opening["name"], 6 // request["do"], os.getpid()]
    return handle
serve(build)
"""


@pytest.fixture
def worker():
    one = Worker([sys.executable, "-c", SERVING], dict(os.environ), {"name": "mine"})
    yield one
    one.close()


def test_a_worker_answers_again_and_again_in_one_process_and_survives_exceptions(worker) -> None:
    first = worker.ask({"do": 2}, 60)
    with pytest.raises(WorkerFailure, match=r"^ZeroDivisionError: ") as failure:
        worker.ask({"do": 0}, 60)
    assert not isinstance(failure.value, WorkerDied) and "handle" in failure.value.detail
    assert worker.ask({"do": 3}, 60) == ["mine", 2, first[2]] and first[:2] == ["mine", 3]


@pytest.mark.parametrize(
    ("do", "reason", "status"),
    [
        ("die", "crashed: the process was ended by SIGSEGV", -11),
        ("exit", "crashed: the process exited with 5 (last words)", 5),
        ("lose", "left the GPU unusable: illegal access", LOST_STATUS),
    ],
)
def test_a_worker_that_dies_says_how_and_the_next_request_starts_a_fresh_one(worker, do, reason, status) -> None:
    before = worker.ask({"do": 2}, 60)[2]
    with pytest.raises(WorkerDied) as died:
        worker.ask({"do": do}, 60)
    assert (str(died.value), died.value.status, died.value.hung) == (reason, status, False)
    assert worker.ask({"do": 2}, 60)[2] != before


def test_a_worker_that_is_silent_for_too_long_is_killed_where_it_hangs(worker) -> None:
    worker.ask({"do": 1}, 60)
    with pytest.raises(WorkerDied, match=r"^hung: no sign of life for 0.5 s \(in handle \(<string>:\d+\)") as died:
        worker.ask({"do": "hang"}, 0.5)
    assert died.value.hung and worker.pid is None


def test_what_a_worker_says_is_a_sign_of_life_and_may_change_how_long_it_is_waited_for(worker) -> None:
    said = []
    worker.ask({"do": 1}, 60)
    assert worker.ask({"do": 1, "say": 7}, 0.6, said.append)[:2] == ["mine", 6]
    assert said == [{"at": 7}] * 3
    with pytest.raises(WorkerDied, match=r"for 0\.1 s"):
        worker.ask({"do": 1, "say": 7}, 60, lambda said: 0.1)


def test_a_closed_worker_is_not_started_again(worker) -> None:
    worker.ask({"do": 1}, 60)
    worker.close()
    with pytest.raises(WorkerClosed):
        worker.ask({"do": 1}, 60)


def test_a_worker_that_another_thread_closes_while_it_is_asked_has_not_failed(worker) -> None:
    worker.ask({"do": 1}, 60)
    threading.Timer(0.5, worker.close).start()
    with pytest.raises(WorkerClosed):
        worker.ask({"do": "hang"}, 60)
    assert worker.pid is None


def test_workers_share_items_and_results_keep_their_order() -> None:
    workers = [Worker([sys.executable, "-c", SERVING], dict(os.environ), {"name": "mine"}) for _ in range(2)]
    ended: list[int] = []
    found = share(
        workers, [1, 2, 3, 6], lambda one, item: one.ask({"do": item}, 60)[1], lambda *done: ended.append(done)
    )
    assert found == [6, 3, 2, 1] and sorted(ended) == [(1, 6), (2, 3), (3, 2), (6, 1)]
    assert all(each.pid is None for each in workers)


def test_the_first_exception_stops_what_is_shared_and_leaves_no_process() -> None:
    one = Worker([sys.executable, "-c", SERVING], dict(os.environ), {"name": "mine"})
    begun: list[int] = []

    def do(worker: Worker, item: int) -> None:
        begun.append(item)
        worker.ask({"do": item}, 60)

    with pytest.raises(WorkerFailure, match="ZeroDivisionError"):
        share([one], [1, 0, 2], do)
    assert begun == [1, 0] and one.pid is None


def test_an_interrupted_share_waits_for_its_threads_and_takes_no_result(request) -> None:
    """What an interrupted run killed itself has not crashed: nothing may write so into a journal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a caller in the background has it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    main = threading.main_thread().ident
    one = Worker([sys.executable, "-c", SERVING], dict(os.environ), {"name": "mine"})
    failures: list[WorkerFailure] = []
    ended = threading.Event()

    def do(worker: Worker, item: str) -> None:
        threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT]).start()
        try:
            worker.ask({"do": item}, 60)
        except WorkerFailure as failure:
            failures.append(failure)
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        share([one], ["hang"], do)
    assert ended.is_set() and not failures and one.pid is None
