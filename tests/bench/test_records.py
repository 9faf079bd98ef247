"""Results as JSON: what is written is what is read, and a session that was cut short keeps what it has."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nsa_gen.bench.records import Results, merge, read_results, to_line, write_json
from tests.bench.fakes import pair, row, sample_results


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, sample_results())
    assert read_results(path) == sample_results()
    assert path.read_text().count("\n") > len(sample_results().rows)  # a record a line
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_what_says_nothing_is_not_written():
    (written,) = Results(rows=(row("fsa", "forward", None),)).to_document()["rows"]
    assert "median_ms" not in written and "refusal" not in written and written["contender"] == "fsa"


def test_a_journal_is_read_without_the_line_that_was_cut_short(tmp_path):
    results = sample_results()
    lines = [json.dumps({"machine": dict(results.machine), "settings": dict(results.settings)})]
    lines += [to_line(record) for record in (*results.rows, *results.kernels, *results.overlaps, *results.checks)]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines) + "\n" + lines[-1][:20])
    assert read_results(path) == results


@pytest.mark.parametrize("text", ["{}", '{"machine": {}, "settings": {}, "rows": [{"nonsense": 1}]}', "[]", "x"])
def test_what_is_no_benchmark_is_refused(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        read_results(path)


def test_a_later_answer_to_the_same_question_replaces_the_earlier():
    first = Results({"gpu": "H100"}, {"seed": 1}, tuple(pair("cudnn", 1.0, 2.0)))
    second = Results({"gpu": "H100"}, {"seed": 2}, (row("cudnn", "forward", 9.0), row("fa2", "forward", 3.0)))
    found = merge([first, second])
    assert [(each.contender, each.direction, each.median_ms) for each in found.rows] == [
        ("cudnn", "forward", 9.0),
        ("cudnn", "backward", 2.0),
        ("fa2", "forward", 3.0),
    ]
    assert found.settings == {"seed": 1}


def test_merged_results_name_every_way_in_which_they_were_measured():
    earlier = replace(sample_results(), settings={"seed": 1})
    later = replace(sample_results(), settings={"seed": 2, "measurement": "interleaved-2"})
    assert (earlier.measurements, later.measurements) == (["interleaved-1"], ["interleaved-2"])
    assert merge([later, later]).settings == {"seed": 2, "measurement": "interleaved-2"}
    both = merge([earlier, later])
    assert both.settings == {"seed": 1, "measurement": "interleaved-1, interleaved-2"}
    assert merge([both, later]).measurements == both.measurements == ["interleaved-1", "interleaved-2"]


def test_results_of_two_gpus_are_not_mixed():
    other = replace(sample_results(), machine={"gpu": "NVIDIA H200"})
    with pytest.raises(ValueError, match="one GPU"):
        merge([sample_results(), other])
