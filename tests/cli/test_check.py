"""`nsa-gen check`."""

from __future__ import annotations

import json

from nsa_gen.spec import shipped_specs


def test_every_shipped_spec_is_valid_by_name_and_by_path(call):
    shipped = shipped_specs()
    answer = call("check", *shipped, *map(str, shipped.values()))
    assert answer.returncode == 0
    assert answer.stdout.splitlines() == [f"{one}: ok" for one in (*shipped, *map(str, shipped.values()))]


def test_every_mistake_is_printed_with_file_line_and_column(call, invalid_spec):
    answer = call("check", str(invalid_spec), "tiny")
    assert answer.returncode == 1
    lines = answer.stdout.splitlines()
    assert [line.split(":")[:2] for line in lines[:3]] == [[str(invalid_spec), number] for number in ("4", "5", "6")]
    assert lines[-1] == "tiny: ok"


def test_json_says_the_same(call, invalid_spec):
    answer = call("check", str(invalid_spec), "tiny", "--json")
    assert answer.returncode == 1
    result = json.loads(answer.stdout)
    assert result["ok"] is False
    invalid, tiny = result["specs"]
    assert [problem["line"] for problem in invalid["problems"]] == [4, 5, 6]
    assert {"file", "line", "column", "field", "message", "hint"} == set(invalid["problems"][0])
    assert (tiny["ok"], tiny["name"], tiny["problems"]) == (True, "tiny", [])
