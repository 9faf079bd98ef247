"""tools/calibrate.py: factors from results, and what they predict beside what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

import tools.calibrate as tool
from nsa_gen.bench.records import Results, read_results, write_json

MEASURED = Path(__file__).parents[2] / "docs" / "results" / "h100_2026-11-23_one_loop" / "bench.json"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Where the tool writes, in place of the project's files."""
    monkeypatch.setattr(tool, "TARGET", tmp_path / "calibration.py")
    monkeypatch.setattr(tool, "PAGE", tmp_path / "predictions.md")
    monkeypatch.setattr(tool, "PROJECT", tmp_path)
    return tmp_path


def test_it_prints_every_row_and_writes_only_when_asked(written, capsys):
    assert tool.main([str(MEASURED)]) == 0
    text = capsys.readouterr().out
    assert "compressed_backward_dkdv" in text and "The worst is " in text
    assert not list(written.iterdir())


def test_what_it_writes_is_a_module_of_factors_and_a_page(written):
    assert tool.main([str(MEASURED), "--write"]) == 0
    names: dict[str, dict[str, float]] = {}
    exec((written / "calibration.py").read_text(), names)
    assert all(0.1 < factor < 10 for factor in names["FACTORS"].values()) and len(names["FACTORS"]) > 15
    page = (written / "predictions.md").read_text()
    assert page.count("| llama3_8b |") > 15 and "NVIDIA H100" in page


def test_predictions_that_are_far_off_end_with_1(written, tmp_path, capsys):
    """One kernel that is ten times as slow at one length as at another: no factor serves both."""
    found = read_results(MEASURED)
    row = next(each for each in found.kernels if (each.kernel, each.tokens) == ("merge_dq", 65536))
    slow = type(row)(**{**row.__dict__, "tokens": 8192, "workload": "nsa_64x4"})
    write_json(tmp_path / "odd.json", Results(found.machine, {}, kernels=(row, slow)))
    assert tool.main([str(tmp_path / "odd.json")]) == 1


@pytest.mark.parametrize(
    ("machine", "said"),
    [({"gpu": "Voodoo 2"}, "hardware table does not have"), ({"gpu": "NVIDIA H100"}, "no profiled")],
)
def test_results_that_cannot_serve_are_a_wrong_call(tmp_path, capsys, machine, said):
    write_json(tmp_path / "other.json", Results(machine))
    with pytest.raises(SystemExit) as ended:
        tool.main([str(tmp_path / "other.json")])
    assert ended.value.code == 2 and said in capsys.readouterr().err
