"""`nsa-gen verify`."""

from __future__ import annotations

import json

import pytest

from nsa_gen.cli.blocks import Table, Text
from nsa_gen.cli.tables import verify_blocks


@pytest.mark.slow
def test_tiny_is_right_on_the_cpu_whatever_the_shell_says_of_the_interpreter(nsa_gen):
    answer = nsa_gen("verify", "tiny", "--device", "cpu", "--length", "17", "--seed", "3", "--json", timeout=600)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    report = json.loads(answer.stdout)
    assert report["ok"] is True
    assert (report["name"], report["seed"], report["environment"]["device"]) == ("tiny", 3, "cpu")
    assert {"o", "dq", "dk", "dv", "dgates"} <= {row["quantity"] for row in report["rows"]}
    assert "case 1 of" in answer.stderr


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
        }
    )
    assert isinstance(head, Text) and "4 query and 2 KV heads" in head.text
    assert isinstance(table, Table)
    assert table.rows == [
        ("o", "row", "5.0e-04", "1.0e-03", "50%", "T=33", "ok"),
        ("dq", "row", "-", "1.0e-03", "-", "T=17", "fails"),
    ]
    assert isinstance(tail, Text) and tail.text == "- T=17: dq: NaN\n- a note"
