"""`nsa-gen demo`: the steps in a row, their report, and its exit code."""

from __future__ import annotations

import json

import pytest

from nsa_gen.bench.records import Results
from nsa_gen.cli import demo as demo_module
from nsa_gen.cli.demo import Step
from nsa_gen.hardware import TABLES
from tests.bench.fakes import pair


@pytest.fixture
def answers(tmp_path):
    """What each command of the demo answers, on a machine without a GPU; a test may change it."""
    package = tmp_path / "out" / "tiny"
    (package / "kernels").mkdir(parents=True)
    (package / "spec.yaml").write_text("# resolved\nname: tiny\n")
    (package / "kernels/banded.py").write_text('"""Window."""\n\n\n@triton.jit\ndef window_forward():\n    pass\n')
    kernel = {
        "kernel": "window_forward",
        "branch": "win",
        "direction": "forward",
        "purpose": "attention over the window",
        "schedule": "one query block a program",
        "flops": 4.0e12,
        "bytes": 2.0e9,
        "seconds_floor": 0.004,
        "limited_by": "matrix units",
        "config": {},
        "legal_configs": 3,
        "configs": 9,
        "seconds_predicted": 0.006,
        "bound_by": "matrix units",
        "calibrated": True,
    }
    no_more: dict[str, list[object]] = {"choices": [], "unpredicted": []}
    compiled = {
        "kernel": "window_forward",
        "target": "sm_90",
        "ok": True,
        "reason": "",
        "spills_heavily": False,
        "resources": {"registers": 168, "shared_memory": 65536},
    }
    row = {"case": "T=65", "quantity": "o", "measure": "row", "error": 1e-6, "bound": 1e-5, "ok": True, "problem": ""}
    versions = {"nsa_gen": "0.1.0", "torch": "2.13.0", "triton": "3.7.1", "python": "3.11.7 (python)", "cpu_cores": 2}
    return {
        "env": ({**versions, "gpus": []}, True),
        "check": ({"ok": True}, True),
        "generate": ({"ok": True, "packages": [{"name": "tiny", "path": str(package)}]}, True),
        "explain": ({"name": "tiny", "tokens": 65536, "batch": 1, "gpu": "h100", "kernels": [kernel], **no_more}, True),
        "compile": ({"ok": True, "specs": [{"rows": [compiled]}]}, True),
        "verify": (
            {
                "rows": [row],
                "heads": [4, 2],
                "passes": ["forward"],
                "dtype": "float32",
                "cases": ["T=65"],
                "seed": 0,
                "notes": [],
            },
            True,
        ),
    }


@pytest.fixture
def commands(answers, monkeypatch):
    """The commands the demo runs, in order; each is answered from `answers`."""
    ran = []

    def run(*command):
        ran.append(command)
        result, ok = answers[command[0]]
        return Step(command, result, ok, 1.0)

    monkeypatch.setattr(demo_module, "_run", run)
    return ran


def test_it_runs_the_commands_in_order_and_writes_a_report_of_what_they_said(call, commands, tmp_path):
    answer = call("demo", "tiny", "-o", "out")
    assert answer.returncode == 0, answer.stderr
    assert [command[0] for command in commands] == ["env", "check", "generate", "explain", "verify", "compile"]
    report = (tmp_path / "out" / "report.md").read_text()
    for text in (
        "| kernels/banded.py | 6 | 1 | Window. |",
        "| window | 1 | 4.00 TFLOP | 2.00 GB | 4.00 ms | 0 s |",
        "| window_forward | 168 / 64 KiB |",
        "| o | row | 1.0e-06 | 1.0e-05 | 10% | T=65 | ok |",
        "nsa-gen generate tiny -o out",
    ):
        assert text in report
    assert "window_forward" in answer.stdout
    assert "[" not in report.split("## Next")[0].replace("](", "")  # no markup of the terminal's


def test_a_step_whose_answer_is_no_is_in_the_report_and_in_the_exit_code(call, commands, answers, tmp_path):
    refused = answers["compile"][0]["specs"][0]["rows"][0]
    refused |= {"ok": False, "reason": "shared memory: 300,000 bytes a block"}
    answers["compile"] = (answers["compile"][0], False)
    answer = call("demo", "tiny", "-o", "out", "--json")
    assert answer.returncode == 1
    result = json.loads(answer.stdout)
    assert (result["ok"], result["steps"]["compile"]["ok"], result["steps"]["verify"]["ok"]) == (False, False, True)
    assert "window_forward on sm_90: shared memory: 300,000 bytes a block" in (tmp_path / "out/report.md").read_text()


def test_with_a_gpu_it_verifies_there_and_times_it(call, commands, answers, tmp_path):
    answers["env"][0]["gpus"] = [{"name": "H100"}]
    rows = (*pair("nsa_gen", 2.0, 8.0), *pair("cudnn", 5.0, 12.0))
    answers["bench"] = (Results({"gpu": "NVIDIA H100"}, {}, rows).to_document(), True)
    assert call("demo", "tiny", "-o", "out").returncode == 0
    assert [command for command in commands if command[0] == "verify"] == [
        ("verify", "tiny", "--device", "cuda", "--length", "65,97,8192")
    ]
    (timed,) = (command for command in commands if command[0] == "bench")
    assert timed == ("bench", "tiny", "--against", "cudnn,fa2,efficient", "--tokens", "8192,65536")
    report = (tmp_path / "out/report.md").read_text()
    assert "Beside dense causal attention on H100" in report
    assert "| 8,192 | nsa_gen | 2.00 | 8.00 | 10.00 | 2.50x | 1.50x | 1.70x |" in report


@pytest.mark.slow
def test_the_real_thing_ends_well(nsa_gen, small, tmp_path):
    answer = nsa_gen("demo", small, "-o", "out", "--target", "sm_90", timeout=900)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (tmp_path / "out" / "small" / "__init__.py").is_file()
    report = (tmp_path / "out" / "report.md").read_text()
    for heading in ("The spec and the package", "Compiled", "Verified", "Outcome"):
        assert f"## {heading}" in report
    assert "| fails |" not in report


def test_without_a_gpu_it_is_short_and_in_full_if_asked_for(call, commands):
    def ran(name):
        (found,) = (command[1:] for command in commands if command[0] == name)
        commands[:] = [command for command in commands if command[0] != name]
        return found

    assert call("demo", "tiny", "-o", "out").returncode == 0
    assert ran("verify") == ("tiny", "--device", "cpu", "--quick")
    assert ran("compile") == ("tiny", "--target", "sm_90,gfx942", "--calls", "batched")
    assert call("demo", "tiny", "-o", "out", "--full").returncode == 0
    assert ran("verify") == ("tiny", "--device", "cpu")
    assert ran("compile") == ("tiny", "--target", ",".join(TABLES))
    assert call("demo", "tiny", "-o", "out", "--full", "--target", "sm_80").returncode == 0
    assert ran("compile") == ("tiny", "--target", "sm_80")
