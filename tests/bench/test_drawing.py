"""Axes of charts, whatever is drawn on them."""

from __future__ import annotations

import pytest

from nsa_gen.bench import drawing


def test_ticks_of_ratios_are_short():
    assert [drawing.ratio_text(2.0**power) for power in (-4, -1, 0, 2)] == ["1/16x", "1/2x", "1x", "4x"]


def test_an_axis_of_ratios_is_marked_so():
    pytest.importorskip("matplotlib")
    from nsa_gen.bench.figures import figures
    from tests.bench.fakes import sample_results

    pictures = "".join(svg for figure in figures(sample_results()) for _, svg in figure.charts)
    assert ">1/2x<" in pictures and ">1x<" in pictures and ">0.5x<" not in pictures
