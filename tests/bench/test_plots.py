"""Figures: files that are pictures, with a line for each contender that has a speed-up."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest

from nsa_gen.bench import drawing, figures
from nsa_gen.bench.records import Results
from tests.bench.fakes import pair, sample_results

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are closed in the end."""
    closed = []
    monkeypatch.setattr(pyplot, "close", closed.append)
    return closed


def lines(ax):
    """Label -> points of each line that has a label."""
    return {
        line.get_label(): list(zip(*line.get_data(), strict=True))
        for line in ax.lines
        if not line.get_label().startswith("_")
    }


def test_speed_ups_by_length_have_a_panel_a_pass(tmp_path, drawn):
    figures.plot_by_length(sample_results(), tmp_path / "new" / "speed.png")
    assert (tmp_path / "new" / "speed.png").read_bytes().startswith(b"\x89PNG")
    forward, backward, both = drawn[0].axes
    assert re.fullmatch(r"A, groups of \d+, independent inputs\nforward", forward.get_title())
    assert set(lines(forward)) == {"nsa_gen", "cudnn", "fa4", "fla"}
    assert set(lines(both)) == {"nsa_gen", "cudnn", "fla"}  # fa4 has no backward here
    assert lines(backward)["nsa_gen"] == [(8192, pytest.approx(5.6 / 6)), (65536, pytest.approx(5.6 / 6 * 40**0.2))]
    assert lines(forward)["fa4"] == [(8192, 1.0), (65536, 1.0)]


def test_speed_ups_by_group_size_are_of_the_sweep_alone(tmp_path, drawn):
    figures.plot_by_group(sample_results(), tmp_path / "groups.svg")
    assert "<svg" in (tmp_path / "groups.svg").read_text()
    *_, both = drawn[0].axes
    assert lines(both)["nsa_gen"] == [(group, pytest.approx(16 * group / 30)) for group in (1, 4, 16)]


def test_without_a_dense_contender_there_is_nothing_to_draw(tmp_path):
    results = Results(rows=tuple(pair("nsa_gen", 1.0, 2.0)))
    with pytest.raises(ValueError, match="nothing to plot"):
        figures.plot_by_length(results, tmp_path / "x.png")
    with pytest.raises(ValueError, match="nothing to plot"):
        figures.plot_by_group(replace(sample_results(), rows=()), tmp_path / "x.png")


def test_without_matplotlib_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    drawing.pyplot.cache_clear()
    with pytest.raises(drawing.MatplotlibMissing, match=r"nsa-gen\[bench\]"):
        figures.plot_by_length(sample_results(), tmp_path / "x.png")
