"""`nsa-gen verify`."""

from __future__ import annotations

import importlib
import json

import pytest

from nsa_gen.cli.blocks import Table, Text
from nsa_gen.cli.tables import verify_blocks

WINDOW = """\
version: 1
name: window_alone
heads: {query: 2, kv: 1}
head_dim: 16
dtype: float32
window: {size: 7}
"""


@pytest.mark.slow
def test_a_spec_is_right_on_the_cpu_whatever_the_shell_says_of_the_interpreter(nsa_gen, tmp_path):
    (tmp_path / "window.yaml").write_text(WINDOW)
    answer = nsa_gen("verify", "window.yaml", "--device", "cpu", "--length", "17", "--seed", "3", "--json", timeout=600)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    report = json.loads(answer.stdout)
    assert report["ok"] is True
    assert (report["name"], report["seed"], report["environment"]["device"]) == ("window_alone", 3, "cpu")
    assert {"o", "dq", "dk", "dv"} <= {row["quantity"] for row in report["rows"]}
    assert "case 1 of" in answer.stderr


@pytest.mark.slow
def test_examples_are_drawn_from_their_seeds_and_one_of_them_is_repeated_by_its_words(nsa_gen, tmp_path):
    path = tmp_path / "window_alone.yaml"
    path.write_text(WINDOW)
    drawn = nsa_gen("verify", str(path), "--device", "cpu", "--examples", "4", "--seed", "5", "--json", timeout=600)
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    report = json.loads(drawn.stdout)
    assert report["ok"] is True and report["reproduction"] is None
    assert [each["seed"] for each in report["examples"]] == [5, 6, 7, 8] and all(
        each["ok"] for each in report["examples"]
    )
    assert report["cases"] == [each["example"] for each in report["examples"]]
    assert "example 4 of 4, seed 8" in drawn.stderr
    words = report["examples"][2]["example"]
    again = nsa_gen("verify", str(path), "--device", "cpu", "--example", words, "--seed", "7", "--json", timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads(again.stdout)["examples"] == [report["examples"][2]]


def test_a_failing_example_ends_with_the_command_that_repeats_the_smallest(call, monkeypatch, tmp_path):
    from tests.verification.test_shrinking import runner, too_wide

    path = tmp_path / "window_alone.yaml"
    path.write_text(WINDOW.replace("size: 7", "size: 2"))
    room = importlib.import_module("nsa_gen.verification.verify")
    monkeypatch.setattr(room, "_runner", lambda spec, package, folder, device: runner(spec, device, too_wide))
    answer = call("verify", str(path), "--device", "cpu", "--examples", "40", "--json")
    assert answer.returncode == 1
    smallest = json.loads(answer.stdout)["reproduction"]
    assert smallest["example"].endswith("B=1 T=2") and "size: 1" in smallest["spec"]
    assert f"--example '{smallest['example']}' --seed {smallest['seed']} --device cpu" in smallest["command"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--examples", "3", "--length", "5"], "--length"),
        (["--examples", "3", "--example", "oracle: B=1 T=3"], "--example"),
        (["--example", "oracle: B=1 T=3", "--length", "5"], "--length"),
        (["--example", "oracle of T=3"], "expected a property and a call"),
        (["--example", "waiting: B=1 T=3"], "can have on cpu"),
        (["--examples", "0"], "--examples"),
    ],
)
def test_examples_that_cannot_be_had_are_a_wrong_call(call, arguments, said):
    answer = call("verify", "tiny", "--device", "cpu", *arguments)
    assert answer.returncode == 2
    assert said in " ".join(answer.stderr.split())


def test_bfloat16_under_the_interpreter_is_a_wrong_call(nsa_gen):
    answer = nsa_gen("verify", "tiny", "--device", "cpu", "--dtype", "bfloat16")
    assert answer.returncode == 2
    assert "interpreter" in answer.stderr


def test_a_gpu_that_is_not_there_is_a_wrong_call(call, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = call("verify", "tiny", "--device", "cuda")
    assert answer.returncode == 2
    assert "no GPU" in answer.stderr


def test_the_table_keeps_the_worst_case_of_each_quantity_and_lists_failures():
    def row(case, quantity, error, ok=True, problem=""):
        return {
            "case": case,
            "quantity": quantity,
            "measure": "row",
            "error": error,
            "bound": 1e-3,
            "ok": ok,
            "problem": problem,
        }

    rows = [row("T=17", "o", 1e-4), row("T=33", "o", 5e-4), row("T=17", "dq", None, ok=False, problem="NaN")]
    head, table, tail = verify_blocks(
        {
            "rows": rows,
            "heads": [4, 2],
            "passes": ["forward"],
            "dtype": "float32",
            "cases": ["T=17", "T=33"],
            "seed": 0,
            "notes": ["a note"],
            "coverage": {"exercised": {}, "left_out": ["packed sequences"], "ways": []},
        }
    )
    assert isinstance(head, Text) and "4 query and 2 KV heads" in head.text
    assert isinstance(table, Table)
    assert table.rows == [
        ("o", "row", "5.0e-04", "1.0e-03", "50%", "T=33", "ok"),
        ("dq", "row", "-", "1.0e-03", "-", "T=17", "fails"),
    ]
    assert isinstance(tail, Text) and tail.text == "- T=17: dq: NaN\n- left out: packed sequences\n- a note"


def test_a_quick_run_is_a_few_calls_of_every_pass_and_says_so(nsa_gen, tmp_path):
    (tmp_path / "window.yaml").write_text(WINDOW)
    answer = nsa_gen("verify", "window.yaml", "--device", "cpu", "--quick", "--json", timeout=600)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    report = json.loads(answer.stdout)
    assert len(report["cases"]) == 3 and {"o", "dq", "dk", "dv"} <= {row["quantity"] for row in report["rows"]}
    assert any("quick" in note for note in report["notes"]) and report["coverage"]["left_out"]


def test_a_quick_run_names_its_own_calls(call):
    for more in (["--length", "5"], ["--examples", "2"], ["--example", "oracle: T=5"]):
        answer = call("verify", "tiny", "--device", "cpu", "--quick", *more)
        assert answer.returncode == 2 and "--quick" in answer.stderr
