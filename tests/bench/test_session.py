"""Sessions: workers that die, hang, lose the device or run out of time cost no more than what they were at."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nsa_gen.bench.measure import Measurement, Timing
from nsa_gen.bench.records import OURS, CheckRow, Row, TaskRow, read_results
from nsa_gen.bench.session import Session, machine, run_session
from nsa_gen.bench.worker import rows_of, task_fields, task_of
from nsa_gen.bench.workloads import Task, nsa_spec, spec_tasks
from nsa_gen.rendering.identity import MEASUREMENT

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
SPEC = nsa_spec("small", 8, 2, 64, 64)


def task(workload="A", tokens=128, contenders=(), **changes):
    return Task(workload, workload, SPEC, tokens, contenders=tuple(contenders), **changes)


def session(tmp_path, **changes):
    return Session(tmp_path / "session", command=FAKE, **changes)


def times(records):
    """By workload and contender, a time or an error."""
    return {(r.workload, r.contender): r.median_ms or r.error for r in records if isinstance(r, Row)}


def ends(records):
    return {record.workload: (record.status, record.reason) for record in records if isinstance(record, TaskRow)}


def test_tasks_are_done_in_order_by_one_worker(tmp_path):
    said = []
    records = session(tmp_path, progress=said.append).run([task("A"), task("B", contenders=["x"])])
    assert times(records) == {("A", OURS): 1.0, ("B", OURS): 1.0, ("B", "x"): 1.0}
    assert ends(records) == {"A": ("ok", ""), "B": ("ok", "")}
    assert said[-1] == "[2/2] B: 128 tokens, independent"


@pytest.mark.parametrize(
    ("culprit", "reason"),
    [
        ("dies", "crashed: the process was ended by SIGSEGV"),
        ("dies mid-line", "crashed: the process was ended by SIGKILL"),
        ("loses the device", "left the GPU unusable: RuntimeError: illegal access"),
    ],
)
def test_a_contender_that_ends_its_process_is_a_row_and_the_others_are_timed_by_the_next(tmp_path, culprit, reason):
    records = session(tmp_path).run([task("A"), task("B", contenders=["x", culprit, "y"]), task("C")])
    assert times(records) == {
        ("A", OURS): 1.0,
        ("B", OURS): 1.0,
        ("B", "x"): 1.0,
        ("B", culprit): reason,
        ("B", "y"): 1.0,
        ("C", OURS): 1.0,
    }
    assert {status for status, _ in ends(records).values()} == {"ok"}


def test_two_contenders_that_die_in_one_task_are_both_left_out(tmp_path):
    found = times(session(tmp_path).run([task("A", contenders=["dies", "loses the device", "x"])]))
    assert found[("A", "x")] == 1.0 and "SIGSEGV" in found[("A", "dies")]
    assert "illegal access" in found[("A", "loses the device")]


def test_a_contender_that_died_is_not_tried_again_at_that_length_or_a_longer_one(tmp_path):
    tasks = [task(name, tokens, ["dies"]) for name, tokens in (("A", 200), ("B", 300), ("C", 200))]
    said = []
    found = times(session(tmp_path, progress=said.append).run(tasks))
    assert {found[(name, "dies")] for name in "ABC"} == {"crashed: the process was ended by SIGSEGV"}
    assert sum("SIGSEGV" in line for line in said) == 1
    again = [task("A", 200, ["dies"]), task("B", 100, ["dies"])]
    said.clear()
    session(tmp_path, progress=said.append).run(again)
    assert sum("SIGSEGV" in line for line in said) == 2


def test_a_contender_that_hangs_is_ended_after_its_silence(tmp_path):
    found = times(session(tmp_path, silence=25).run([task("A", contenders=["hangs", "x"])]))
    assert (
        "hung: no sign of life for 25 s (in _time (bench/fake_worker.py:" in found[("A", "hangs")]
        and found[("A", "x")] == 1.0
    )


def test_a_task_that_fails_outside_of_any_contender_is_given_up_and_the_next_is_done(tmp_path):
    records = session(tmp_path).run([task("A", contenders=["raises"]), task("B")])
    assert ends(records) == {"A": ("failed", "ValueError: outside of any contender"), "B": ("ok", "")}
    assert times(records) == {("B", OURS): 1.0}


def test_times_that_were_taken_before_a_worker_died_are_kept_once(tmp_path):
    records = session(tmp_path).run([task("A", contenders=["dies after all is done"]), task("B")])
    assert len([record for record in records if isinstance(record, Row)]) == 3
    assert ends(records)["A"] == ("failed", "after its times were taken: crashed: the process was ended by SIGSEGV")
    assert ends(records)["B"] == ("ok", "")


def test_a_spent_budget_leaves_tasks_undone_and_says_so(tmp_path):
    tasks = [task("A", contenders=["takes a second"]), task("B")]
    records = session(tmp_path, budget=0.9).run(tasks)
    assert ends(records)["B"] == ("not run", "the budget was spent")


def test_a_task_that_outlives_the_budget_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("nsa_gen.bench.session.GRACE_SECONDS", 0.5)
    records = session(tmp_path, budget=5).run([task("A", contenders=["hangs"]), task("B")])
    assert times(records) == {}
    assert ends(records) == dict.fromkeys("AB", ("not run", "the budget was spent"))


def test_an_operator_that_is_wrong_is_not_timed_but_the_others_are(tmp_path):
    other = nsa_spec("other", 4, 2, 64, 64)
    bad, good = task("wrong", check=True), replace(task("right", check=True), spec=other)
    of_bad, of_good = task("A", contenders=["x"]), replace(task("B"), spec=other)
    records = session(tmp_path, workers=2).run([bad, good, of_bad, of_good])
    assert times(records) == {("A", OURS): "wrong, so not timed: o 3 of 1", ("A", "x"): 1.0, ("B", OURS): 1.0}
    assert {record.workload for record in records if isinstance(record, CheckRow)} == {"wrong", "right"}


def test_an_operator_whose_check_did_not_end_is_not_timed(tmp_path):
    records = session(tmp_path).run([task("unchecked", check=True), task("A", contenders=["x"])])
    assert times(records) == {("A", OURS): "not timed: its check did not come to an end", ("A", "x"): 1.0}


def test_the_journal_holds_everything_as_soon_as_it_is_known(tmp_path):
    journal = tmp_path / "records.jsonl"
    tasks = [task("A", check=True), task("A", contenders=["dies"]), task("B")]
    results = run_session(session(tmp_path, journal=journal, seed=5), tasks, {"spec": "text"})
    kept = read_results(journal)
    assert (kept.rows, kept.checks, kept.tasks) == (results.rows, results.checks, results.tasks)
    assert kept.settings == {"seed": 5, "budget_seconds": 1e9, "measurement": MEASUREMENT, "spec": "text"}
    assert results.settings["seconds"] > 0


def test_a_session_that_is_interrupted_leaves_no_worker_behind(tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(line):
        raise Interrupted

    with pytest.raises(Interrupted):
        session(tmp_path, progress=interrupt).run([task("A", contenders=["hangs"])])
    assert workers_of(tmp_path / "session") == []


def workers_of(folder):
    """Processes whose environment names a session's folder, those that have ended and wait to be collected left out."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "environ").read_bytes().decode(errors="replace")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if str(folder) in told and state != "Z":
            found.append(process.name)
    return found


def test_a_task_is_read_as_it_was_written():
    for one in (task("A", contenders=["x", "y"], profile=True), task("B", check=True, passes=("forward",))):
        again = task_of(json.loads(json.dumps(task_fields(one))))
        assert again == one and again.spec.digest() == SPEC.digest()


def test_rows_carry_the_shape_and_our_own_what_it_must_do():
    timing = Timing(2.0, 1.9, 2.1, 5, 100)
    found = [
        Measurement(OURS, {"forward": timing, "backward": replace(timing, median_ms=4.0)}),
        Measurement("cudnn", {"forward": timing}, {"backward": "RuntimeError: no"}),
        Measurement("fla", refusal="groups"),
    ]
    rows = rows_of(task("A", tokens=4096), found, "h100")
    mine, _, dense, half, *refused = rows
    assert (mine.heads, mine.head_dim, mine.dtype, mine.group) == ((8, 2), (64, 64), "bfloat16", 4)
    assert mine.flops > 0 and mine.bytes > 0 and mine.floor_ms > 0
    assert dense.dense and dense.flops is None and dense.median_ms == 2.0
    assert half.median_ms is None and half.error == "RuntimeError: no"
    assert [row.refusal for row in refused] == ["groups", "groups"]
    assert rows_of(task("A", tokens=4096), found, None)[0].floor_ms is None


def test_the_machine_is_described_even_without_a_gpu():
    found = machine()
    assert {"gpu", "driver", "torch", "triton", "python", "commit", "date"} <= set(found)
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__


@pytest.mark.gpu
def test_the_real_thing_checks_times_and_profiles_a_small_operator(tmp_path):
    tasks = spec_tasks(
        SPEC, lengths=(512,), inputs=("correlated",), contenders=("cudnn",), passes=SPEC.passes, seconds=0.1
    )
    results = run_session(Session(tmp_path), tasks, {})
    assert [each.status for each in results.tasks] == ["ok", "ok"]
    mine = [row for row in results.rows if row.contender == OURS]
    assert all(row.median_ms > 0 and row.peak_bytes > 0 for row in mine) and len(mine) == 2
    assert results.overlaps[0].overlap > 0
    assert {"cmp", "slc", "win"} <= {kernel.branch for kernel in results.kernels}
    assert not any(check.faults or check.error for check in results.checks)
