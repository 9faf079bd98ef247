"""Candidates that crash, hang, compute something else or take too much memory, and runs that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nsa_gen.tuning import EFFORTS, TuneReport, tune
from nsa_gen.tuning.race import Reading
from tests.machine import alive
from tests.tuning.fakes import fake_tools, spec
from tests.tuning.test_search import began, other_tile

GOOD, BAD, LATER = other_tile("window_forward"), "combine_forward ROW_BLOCK=4", other_tile("window_backward_dkdv")
QUICKER = {"forward": {GOOD: 2.0, BAD: 5.0}}
"""The bad candidate would be the quickest of all."""


def tuned(cache: Path, fault: str, *, seconds: float = 60.0, **settings: Any) -> tuple[TuneReport, list[str]]:
    script = {"times": QUICKER, "faults": {BAD: fault}, "log": str(cache.parent / "log")}
    tools = fake_tools(cache, script, candidate_seconds=seconds)
    report = tune(spec(), tools=tools, **{"shapes": (8192,), "effort": "quick", **settings})
    return report, tools.said  # type: ignore[attr-defined]


REASONS = {
    "crash": "crashed: the process exited with 11",
    "hang": "hung: no sign of life for 1 s (in _timed (tuning/fake_worker.py:",
    "lost": "left the GPU unusable: CUDA error: an illegal memory access was encountered",
    "wrong": "wrong: dq 3 of 1",
    "oom": "OutOfMemoryError: CUDA out of memory",
    "kill": "crashed: the process was ended by SIGKILL",
}


@pytest.mark.parametrize("fault", REASONS)
def test_a_bad_candidate_costs_itself_alone(cache: Path, fault: str) -> None:
    report, said = tuned(cache, fault, seconds=1.0 if fault == "hang" else 60.0)
    (result,) = report.results
    assert set(result.configs) == {"window_forward"}, "the others' results are intact"
    assert result.gain == pytest.approx(30 / 28) and result.saved.is_file()
    bad = {name: reason for name, reason in report.quarantined.items() if "combine_forward ROW_BLOCK=4" in name}
    assert bad and all(reason.startswith(REASONS[fault]) for reason in bad.values())
    assert set(bad) == set(report.quarantined), "nobody else was blamed"
    assert any("combine_forward ROW_BLOCK=4" in line for line in said), "it is said aloud"
    assert report.ok == (fault != "wrong"), "a wrong candidate is a failure of the run"
    assert bool(report.wrong) == (fault == "wrong")


def test_a_worker_killed_from_outside_once_is_replaced_and_nobody_is_blamed(cache: Path) -> None:
    report, said = tuned(cache, "kill once")
    assert report.quarantined == {} and "combine_forward" in report.results[0].configs
    assert any("tried again" in line for line in said)


def test_a_candidate_that_hangs_is_tried_once(cache: Path) -> None:
    tuned(cache, "hang", seconds=1.0)
    times = [each for each in began(cache.parent / "log") if each["what"] == "time"]
    hung = [each for each in times if each["configs"].get("combine_forward", {}).get("ROW_BLOCK") == 4]
    assert len(hung) == 1


def test_a_default_that_is_wrong_is_reported_and_nothing_is_saved(cache: Path) -> None:
    tools = fake_tools(cache, {"faults": {}})
    make = tools.backend

    def wrong(*arguments: Any) -> Any:
        backend = make(*arguments)
        backend.check = lambda candidate, bucket: "wrong: o 2 of 1"
        return backend

    tools.backend = wrong
    report = tune(spec(), tools=tools, shapes=(8192,), effort="quick")
    assert not report.ok and report.results[0].problem == "the default itself fails: wrong: o 2 of 1"
    assert not list(cache.glob("tuned/*/*/*.json"))


def test_a_default_that_fails_in_the_final_is_reported_and_not_compared_with(cache: Path) -> None:
    tools = fake_tools(cache, {"times": QUICKER})
    make = tools.backend

    def failing(*arguments: Any) -> Any:
        backend = make(*arguments)
        plain = backend.race

        def race(asked: Any, *rest: Any) -> Any:
            readings = plain(asked, *rest)
            if asked.seconds == EFFORTS["quick"].final_seconds:
                readings[0] = Reading(error="OutOfMemoryError: CUDA out of memory")
            return readings

        backend.race = race
        return backend

    tools.backend = failing
    report = tune(spec(), tools=tools, shapes=(8192,), effort="quick")
    assert not report.ok and "the default itself fails: OutOfMemoryError" in report.results[0].problem


# Runs that end early

PROGRAM = """
import sys
from pathlib import Path
from nsa_gen.tuning import tune
from tests.tuning.fakes import fake_tools, spec
import json
script = json.loads(sys.argv[2])
tools = fake_tools(Path(sys.argv[1]), script)
tools.say = lambda line: print(line, flush=True)
report = tune(spec(), tools=tools, shapes=(8192,), effort="quick", resume="--resume" in sys.argv)
print(json.dumps(report.to_json()["results"]))
"""


def run(cache: Path, script: dict[str, Any], *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(cache), json.dumps(script), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)


def test_a_run_that_is_killed_is_resumed_without_measuring_anything_twice(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = {"times": QUICKER, "log": str(log), "faults": {LATER: "kill parent"}}
    killed = run(cache, script)
    assert killed.returncode == -signal.SIGKILL
    first = began(log)
    assert len([each for each in first if each["what"] == "time"]) > 30

    log.unlink()
    resumed = run(cache, {**script, "faults": {}}, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "answers from" in resumed.stdout
    result = json.loads(resumed.stdout.splitlines()[-1])[0]
    assert set(result["configs"]) == {"window_forward", "combine_forward"}

    def checks(entries: list[dict[str, Any]]) -> set[str]:
        return {json.dumps(each["configs"], sort_keys=True) for each in entries if each["what"] == "check"}

    answered = json.dumps(first[-1]["configs"], sort_keys=True)  # asked when the run died, so it is asked again
    assert checks(first) & checks(began(log)) <= {answered}

    log.unlink()
    again = run(cache, script, "--resume")
    assert json.loads(again.stdout.splitlines()[-1])[0]["configs"] == result["configs"]
    assert not log.exists(), "everything was known"


def test_a_final_that_is_interrupted_goes_on_with_the_rounds_that_are_left(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = {"times": QUICKER, "log": str(log), "final seconds": EFFORTS["quick"].final_seconds}
    killed = run(cache, {**script, "kill parent after": 3})
    assert killed.returncode == -signal.SIGKILL
    rounds = [each for each in began(log) if each["what"] == "round"]
    assert len(rounds) == 4

    log.unlink()
    resumed = run(cache, script, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    finals = [each for each in began(log) if each["what"] == "round"]
    # The interrupted race has two rounds left, that of the other kind of input all of its six.
    assert len(finals) == 2 + 6


def test_the_measuring_process_ends_with_its_owner(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = {"log": str(log), "faults": {GOOD: "hang"}}
    command = [sys.executable, "-c", PROGRAM, str(cache), json.dumps(script)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
    try:
        while process.poll() is None and not any("window_forward" in e["configs"] for e in began(log)):
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.kill()
        process.wait()
    assert children
    while any(alive(int(child)) for child in children):  # for ever, if it does not
        time.sleep(0.05)


def test_two_tuners_on_one_cache_both_come_to_an_end(cache: Path, tmp_path: Path) -> None:
    script = json.dumps({"times": QUICKER})
    command = [sys.executable, "-c", PROGRAM, str(cache), script]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    results = [json.loads(each.splitlines()[-1])[0]["configs"] for each in said]
    assert results[0] == results[1]
    (path,) = cache.glob("tuned/*/*/*.json")
    assert json.loads(path.read_text())["configs"] == results[0]
    assert not list(cache.glob("tuned/*/*/.*json*")), "no half-written file is left"


def test_a_cache_that_is_read_only_costs_the_saving_and_not_the_result(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file stands where the folder of the cache should be made: that fails for root too."""
    cache.write_text("not a folder")
    tools = fake_tools(cache, {"times": QUICKER})
    report = tune(spec(), tools=tools, shapes=(8192,), effort="quick")
    (result,) = report.results
    assert not report.ok and result.saved is None and "not saved" in result.problem
    assert result.configs and result.gain > 1
    assert any("cannot be written" in line for line in tools.said)  # type: ignore[attr-defined]


def test_a_disk_that_is_full_costs_the_journal_and_the_saving_and_not_the_result(cache: Path) -> None:
    """The journal is a device that is always full, and the store's disk fills up when it is written."""
    from nsa_gen.tuning import run as module
    from nsa_gen.tuning.race import Journal

    class Full(Journal):
        def __init__(self, path: Path, heading: Any, *, resume: bool) -> None:
            super().__init__(path, heading, resume=resume)
            self.close()
            self._file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115

    tools = fake_tools(cache, {"times": QUICKER})
    tools.store.save = lambda *entries: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="cannot be resumed.*No space left"):
        patch.setattr(module, "Journal", Full)
        report = tune(spec(), tools=tools, shapes=(8192,), effort="quick")
    assert report.results[0].gain > 1 and "No space left on device" in report.results[0].problem and not report.ok

    tools = fake_tools(cache, {"times": QUICKER})
    assert tune(spec(), tools=tools, shapes=(8192,), effort="quick", resume=True).ok
