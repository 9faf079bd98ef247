"""The GPU suite's orchestration: what becomes of jobs that fail, crash, hang or come too late, and what is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nsa_gen.spec import shipped_specs
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.gradients import reference_gradients
from nsa_gen.verification.inputs import make_inputs
from tests.machine import alive
from tools import gpu_suite
from tools.gpu import plan, pool, report, sizes
from tools.gpu.long import check_rows
from tools.gpu.packages import variant
from tools.gpu.pool import RESULT_VARIABLE, Job, Outcome, run_jobs

WRITE = f"import json, os, sys, time; open(os.environ['{RESULT_VARIABLE}'], 'w').write"
OK = f"{WRITE}('{{\"ok\": true}}')"


def job(name: str, code: str, expected: float = 0.0, **environment: str) -> Job:
    return Job(name, (sys.executable, "-c", code), expected, environment)


def run(
    tmp_path: Path, *jobs: Job, workers: int = 4, silence: float = 30.0, budget: float = 60.0
) -> dict[str, Outcome]:
    outcomes = run_jobs(
        jobs,
        folder=tmp_path,
        workers=workers,
        silence=silence,
        deadline=time.monotonic() + budget,
        poll=0.02,
    )
    assert [outcome.name for outcome in outcomes] == [job.name for job in jobs]
    return {outcome.name: outcome for outcome in outcomes}


def test_a_job_that_fails_crashes_or_ends_without_a_result_leaves_the_others_alone(tmp_path):
    found = run(
        tmp_path,
        job("good", OK),
        job("wrong", f"{WRITE}(json.dumps(dict(ok=False, error='3 comparisons failed')))"),
        job("exit", f"{OK}; print('last words'); sys.exit(3)"),
        job("signal", f"{OK}; os.kill(os.getpid(), 11)"),
        job("mute", "pass"),
        job("garbled", f"{WRITE}('{{')"),
        job("missing", f"{WRITE}('{{}}')"),
        job("also good", OK),
        workers=2,
    )
    statuses = {name: outcome.status for name, outcome in found.items()}
    assert statuses == {
        "good": "ok",
        "wrong": "failed",
        "exit": "crashed",
        "signal": "crashed",
        "mute": "crashed",
        "garbled": "crashed",
        "missing": "failed",
        "also good": "ok",
    }
    assert found["wrong"].detail == "3 comparisons failed"
    assert "exit status 3" in found["exit"].detail
    assert "last words" in found["exit"].detail
    assert "SIGSEGV" in found["signal"].detail
    assert "without a result" in found["mute"].detail
    assert "no JSON" in found["garbled"].detail


def test_a_silent_job_is_killed_with_what_it_started_and_a_talking_one_is_not(tmp_path):
    child = tmp_path / "child"
    hung = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); print('begun', flush=True); "
        f"from nsa_gen.workers import watched; watched(); p.wait()"
    )
    talking = f"import time\nfor i in range(40): print(i, flush=True); time.sleep(0.2)\n{OK}"
    found = run(tmp_path, job("hung", hung), job("talking", talking), silence=6.0)
    assert found["hung"].status == "timed out"
    assert "printed nothing for 6 s (in " in found["hung"].detail
    assert "wait (python" in found["hung"].detail and "<module> (<string>:1)" in found["hung"].detail
    assert "begun" in found["hung"].detail
    assert found["talking"].ok
    assert found["talking"].seconds > 6.0
    assert not alive(int(child.read_text()))


def test_when_the_budget_is_spent_no_job_starts_and_running_ones_are_ended_after_a_grace(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_SECONDS", 1.0)
    endless = "import time\nwhile True: print('.', flush=True); time.sleep(0.1)"
    late = tmp_path / "late"
    found = run(
        tmp_path,
        job("endless", endless, 2.0),
        job("never", f"open({str(late)!r}, 'w').close(); {OK}", 1.0),
        workers=1,
        budget=0.5,
    )
    assert found["endless"].status == "timed out"
    assert "budget" in found["endless"].detail
    assert found["never"].status == "not run"
    assert not found["never"].ok
    assert not late.exists()


def test_the_job_expected_to_last_longest_starts_first(tmp_path):
    order = tmp_path / "order"
    code = f"open({str(order)!r}, 'a').write(os.environ['ME'])"
    jobs = [
        job(name, f"import os; {code}", expected, ME=name) for name, expected in (("a", 1.0), ("b", 3.0), ("c", 2.0))
    ]
    run(tmp_path, *jobs, workers=1)
    assert order.read_text() == "bca"


def test_two_jobs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names that differ"):
        run(tmp_path, job("a", OK), job("a", OK))


def test_an_interrupted_suite_ends_its_jobs(tmp_path):
    started = tmp_path / "pid"
    code = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def interrupt(outcome: Outcome) -> None:
        while not started.exists() or not started.read_text():
            time.sleep(0.05)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(
            [job("hung", code), job("quick", OK)],
            folder=tmp_path,
            workers=2,
            silence=60.0,
            deadline=time.monotonic() + 60,
            on_outcome=interrupt,
        )
    assert not alive(int(started.read_text()))


def test_what_jobs_had_found_when_the_suite_was_interrupted_is_handed_over(tmp_path):
    started = tmp_path / "started"
    hung = f"{WRITE}('{{\"ok\": false, \"examples\": 7}}'); open({str(started)!r}, 'w').close(); time.sleep(60)"
    found: dict[str, Outcome] = {}

    def note(outcome: Outcome) -> None:
        found[outcome.name] = outcome
        while not started.exists():
            time.sleep(0.02)
        if outcome.name == "quick":
            raise KeyboardInterrupt

    jobs = [job("hung", hung, 2.0), job("quick", OK, 1.0), job("waiting", OK)]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(
            jobs, folder=tmp_path, workers=2, silence=60.0, deadline=time.monotonic() + 60, on_outcome=note, poll=0.02
        )
    assert found["hung"].status == "timed out" and "interrupted" in found["hung"].detail
    assert found["hung"].result == {"ok": False, "examples": 7}
    assert found["waiting"].status == "not run"


def test_a_job_is_told_when_the_budget_is_spent(tmp_path):
    code = f"from tools.gpu.progress import seconds_left; {WRITE}(json.dumps(dict(ok=True, left=seconds_left())))"
    found = run(tmp_path, job("asks", code, PYTHONPATH=os.environ["PYTHONPATH"]), budget=50.0)
    assert found["asks"].result is not None and 0 < found["asks"].result["left"] < 50.0


def test_shares_of_memory_are_taken_all_at_once_or_not_at_all(tmp_path, capsys, monkeypatch):
    from tools.gpu import packages

    with packages.memory_slot(tmp_path, 3), packages.memory_slot(tmp_path, 3, 2):
        slept: list[float] = []

        def give_up(seconds: float) -> None:
            slept.append(seconds)
            raise TimeoutError

        monkeypatch.setattr(packages.time, "sleep", give_up)
        with pytest.raises(TimeoutError), packages.memory_slot(tmp_path, 3, 2):
            pass
    assert slept and "waiting" in capsys.readouterr().out
    with packages.memory_slot(tmp_path, 3, 7):  # more than there are: all of them
        pass


def test_an_exception_in_a_job_becomes_a_failure_that_tells_it(tmp_path, project_root):
    result = tmp_path / "result.json"
    request = {
        "kind": "touch", "spec": "tiny", "dtype": "float32", "heads": [3, 2], "batch": 1, "shapes": [5],
        "device": "cpu", "seed": 0, "root": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu.worker", json.dumps(request)],
        cwd=project_root,
        env={**os.environ, RESULT_VARIABLE: str(result)},
        check=False,
    )
    found = json.loads(result.read_text())
    assert done.returncode == 0
    assert found["ok"] is False
    assert "heads" in found["error"]
    assert "Traceback" in found["traceback"]


def test_a_share_of_memory_is_held_by_one_process_and_given_back_by_one_that_is_killed(tmp_path, project_root):
    code = (
        "import sys, time; from pathlib import Path; from tools.gpu.packages import memory_slot\n"
        f"with memory_slot(Path({str(tmp_path)!r}), 1): print('held', flush=True); time.sleep(float(sys.argv[1]))"
    )

    def start(seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(seconds)]
        return subprocess.Popen(command, cwd=project_root, stdout=subprocess.PIPE, text=True)

    first = start(60)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    second = start(0)
    assert second.stdout is not None
    assert second.stdout.readline().startswith("waiting")
    time.sleep(0.5)
    assert second.poll() is None
    first.kill()
    assert second.stdout.readline() == "held\n"
    assert second.wait() == 0
    first.wait()
    first.stdout.close()
    second.stdout.close()


def the_plan(**changes: object) -> plan.Plan:
    specs = tuple(shipped_specs())
    whole = plan.Plan(specs, sizes.PARTS, sizes.DTYPES, sizes.LENGTHS, "cuda", 0, Path("packages"))
    return replace(whole, **changes)


def test_every_shipped_spec_is_verified_in_every_dtype_at_every_length():
    jobs = the_plan().jobs("correctness")
    requests = [json.loads(job.command[-1]) for job in jobs]
    assert {(each["spec"], each["dtype"]) for each in requests} == {
        (spec, dtype) for spec in shipped_specs() for dtype in ("bfloat16", "float16", "float32")
    }
    for each in requests:
        assert each["lengths"] == [1, 31, 63, 65, 511, 2049, 8192]
        assert all(0 in lengths and 1 in lengths for lengths in each["packed"])
        assert all(sum(length > 1 for length in lengths) > 1 for lengths in each["packed"])
    longest = max(jobs, key=lambda job: job.expected_seconds)
    assert longest.name == "verify nsa_paper float32"


def test_memory_shares_fit_the_gpu_beside_what_every_worker_takes():
    requests = [json.loads(job.command[-1]) for job in the_plan(gpu_memory_gb=81.6, workers=15).jobs("correctness")]
    assert {each["slots"] for each in requests} == {2}
    requests = [json.loads(job.command[-1]) for job in the_plan(gpu_memory_gb=81.6).jobs("correctness")]
    assert {each["slots"] for each in requests} == {3}
    requests = [json.loads(job.command[-1]) for job in the_plan(gpu_memory_gb=10.0).jobs("correctness")]
    assert {each["slots"] for each in requests} == {1}


def test_a_long_sequence_belongs_to_one_spec_and_is_left_out_without_it():
    (only,) = the_plan().jobs("long")
    assert json.loads(only.command[-1])["tokens"] == 131072
    assert the_plan(specs=("tiny",)).jobs("long") == []


def test_the_table_is_short_and_begins_with_what_failed():
    rows = [{"case": "T=1", "quantity": "dq", "measure": "row", "error": 9.0, "bound": 1.0, "ok": False, "problem": ""}]
    bad = [Outcome(f"verify {i}", "failed", 1.0, "1 failed", {"ok": False, "rows": rows}) for i in range(40)]
    good = [Outcome(f"fine {i}", "ok", 1.0, "", {"ok": True, "rows": []}) for i in range(40)]
    lines = report.table({"correctness": [*good, *bad], "long": [], "sanitizer": [], "bench": []}, ["a note"])
    assert len(lines) <= 58
    assert lines[0].startswith("FAILED verify 0")
    assert "dq" in lines[0]
    assert "9.00e+00 of 1.00e+00" in lines[0]
    assert lines[-1] == "40 of 80 jobs ok"


def test_the_json_reads_back_as_what_was_written_and_leaves_no_other_file(tmp_path):
    document = {"a": [{"b": [1, 2.5, None]}, {"c": {}}], "d": "é\n", "e": [], "f": {"g": {"h": True}}}
    report.write_json(tmp_path / "x.json", document)
    assert json.loads((tmp_path / "x.json").read_text()) == document
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.fixture(scope="module")
def whole_call():
    """Inputs of 90 tokens and what a right operator makes of them: the oracle stands in for it."""
    spec = variant("tiny", "float32")
    p = OracleParameters.from_spec(spec)
    inputs = make_inputs(spec, batch=1, tokens=90, dtype=torch.float32, seed=3)
    found = reference_gradients(p, inputs)
    return p, inputs, found


def as_call(found, **replaced: torch.Tensor):
    aux = {name: x for name, x in found.outputs.tensors().items() if name != "o"}
    gradients = dict(found.gradients)
    for name, x in replaced.items():
        (aux if name in aux else gradients)[name] = x
    tensors = {"o": replaced.get("o", found.outputs.o), **aux}
    return SimpleNamespace(aux=aux, gradients=gradients, tensors=lambda: tensors)


@pytest.mark.parametrize(("start", "end"), [(81, 90), (40, 52), (0, 7)])
def test_rows_of_a_long_call_agree_with_the_oracle_on_those_rows_alone(whole_call, start, end):
    p, inputs, found = whole_call
    rows = check_rows(p, inputs, as_call(found), start, end)
    assert [row for row in rows if not row.ok] == []
    names = {row.quantity for row in rows}
    assert {"o", "o_cmp", "lse_slc", "o_win", "dq", "dgates", "selection"} <= names
    assert ({"dk", "dv"} <= names) == (end == 90)


@pytest.mark.parametrize("name", ["o", "o_slc", "lse_win", "q", "k", "v", "gates"])
def test_a_wrong_row_of_a_long_call_is_found(whole_call, name):
    p, inputs, found = whole_call
    right = {**found.outputs.tensors(), **found.gradients}[name]
    wrong = right.clone()
    wrong[:, 85] *= 1.001
    rows = check_rows(p, inputs, as_call(found, **{name: wrong}), 81, 90)
    bad = {row.quantity for row in rows if not row.ok}
    assert bad == {name if name.startswith(("o", "lse")) else f"d{name}"}


def test_a_wrong_choice_of_blocks_in_a_long_call_is_found(whole_call):
    p, inputs, found = whole_call
    indices = found.outputs.indices.clone()
    indices[:, 85] = torch.tensor([0, 1, 2, 3], dtype=torch.int32)  # without the query's own block
    rows = check_rows(p, inputs, as_call(found, indices=indices), 81, 90)
    assert "selection" in {row.quantity for row in rows if not row.ok}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "correctnes"],
        ["--specs", "llama"],
        ["--dtypes", "float64"],
        ["--lengths", "1,x"],
        ["--lengths", "0"],
        ["--workers", "0"],
        ["--examples", "0"],
        ["--soak-seconds", "0"],
        ["--device", "cpu", "--only", "bench"],
        ["--device", "cpu", "--dtypes", "bfloat16"],
    ],
)
def test_a_wrong_call_ends_with_2_and_says_what_was_expected(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(["--out", str(tmp_path), *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "expected" in said
    assert arguments[-2] in said


def suite(project_root: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/gpu_suite.py", "--device", "cpu", "--specs", "tiny", "--dtypes", "float32",
         "--lengths-only", "--only", "correctness", "--out", str(out), *arguments],
        cwd=project_root,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


def test_a_small_run_on_the_cpu_verifies_and_leaves_its_report(tmp_path, project_root):
    done = suite(project_root, tmp_path / "out", "--lengths", "1,9", "--seed", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1 of 1 jobs ok"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ok"] is True
    assert summary["seed"] == 5
    assert {"gpu", "driver", "torch", "triton", "python", "date", "commit"} <= set(summary["machine"])
    found = json.loads((tmp_path / "out" / "correctness.json").read_text())
    (only,) = found["jobs"]
    assert only["result"]["cases"] == ["T=1", "T=9"]
    assert {"o", "dq", "dk", "dv", "dgates", "selection"} <= {row["quantity"] for row in only["result"]["rows"]}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["correctness.json", "summary.json"]


def test_what_the_budget_left_out_is_reported_and_makes_the_run_fail(tmp_path, project_root):
    done = suite(project_root, tmp_path, "--budget", "0")
    assert done.returncode == 1
    assert "NOT RUN verify tiny float32" in done.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["parts"] == {
        "correctness": {"verify tiny float32": "not run"}
    }
