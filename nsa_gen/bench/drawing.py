"""Draw with matplotlib: charts on given axes, and charts as SVG text for an HTML page.

Colours of SVG charts are the page's style variables, so one chart works on light, dark and printed pages.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

MARKERS = "os^DvP*X"
SERIES = 8
"""The number of colours. Further series reuse them from the start."""
_WIDTH, _HEIGHT = 3.6, 2.5
"""Size in inches of a chart in a page whose text has 8 points."""


class MatplotlibMissing(RuntimeError):
    """Figures were requested, but matplotlib is not installed."""

    def __init__(self) -> None:
        super().__init__("figures need matplotlib: pip install 'nsa-gen[bench]'")


@dataclass(frozen=True)
class Look:
    """Colour and marker of a series; `colour` names a style variable of the page: `c0` to `c7`, or `ink` for ours."""

    colour: str
    marker: str
    width: float = 1.2


def look(number: int, ours: bool = False) -> Look:
    """The look of series `number`."""
    if ours:
        return Look("ink", MARKERS[0], 2.2)
    return Look(f"c{number % SERIES}", MARKERS[(number + 1) % len(MARKERS)])


@functools.cache
def pyplot() -> Any:
    """matplotlib.pyplot without a window. Raises MatplotlibMissing."""
    try:
        import matplotlib
    except ImportError as error:
        raise MatplotlibMissing from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


# Each of the page's style variables, and the colour that represents it while matplotlib draws (files show this one).
_PALETTE = {
    "ink": "#000001", "soft": "#57606a", "rule": "#d0d7de", "page": "#fffffe", "c0": "#0064b4", "c1": "#b84a00",
    "c2": "#00734f", "c3": "#9c3a7d", "c4": "#7a6000", "c5": "#00788c", "c6": "#6a4fc4", "c7": "#6e7781",
}  # fmt: skip


def short(value: float) -> str:
    """A length in the short form for axes: 8k for 8192."""
    whole = int(value)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else f"{whole}"


def draw_speed_ups(ax: Any, series: Mapping[str, tuple[Sequence[tuple[float, float]], Look]], label: str) -> None:
    """Lines of (place, ratio) on two logarithmic axes, and a dashed line at 1."""
    places = sorted({x for points, _ in series.values() for x, _ in points})
    for name, (points, style) in series.items():
        ax.plot(
            *zip(*points, strict=True),
            label=name,
            color=_PALETTE[style.colour],
            marker=style.marker,
            linewidth=style.width,
            zorder=3 if style.colour == "ink" else 2,
        )
    ax.axhline(1, color=_PALETTE["soft"], linewidth=0.8, linestyle="--")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(places, [short(each) for each in places])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, position: ratio_text(value))
    ax.set_xlabel(label)
    ax.grid(alpha=0.6)


def ratio_text(value: float) -> str:
    """A ratio as a tick label: 4x, 1x, 1/2x. 0.0625x would be too long and be cut off on the left."""
    return f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x"


def draw_roofline(ax: Any, points: Sequence[tuple[str, float, float, Look]], *, peak: float, bandwidth: float) -> None:
    """Points (series, FLOPs a byte, TFLOP/s) under the roof of a GPU: `peak` in TFLOP/s, `bandwidth` in TB/s."""
    ridge = peak / bandwidth
    low = min([ridge / 8, *(x for _, x, _, _ in points)])
    high = max([ridge * 2, *(x for _, x, _, _ in points)])
    ax.plot([low, ridge, high], [low * bandwidth, peak, peak], color=_PALETTE["soft"], linewidth=1.6)
    for name, x, y, style in points:
        ax.plot([x], [y], label=name, color=_PALETTE[style.colour], marker=style.marker, linestyle="none")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    ax.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    ax.minorticks_off()
    ax.set_xlabel("FLOPs a byte that must be moved")
    ax.set_ylabel("TFLOP/s")
    ax.grid(alpha=0.6)


def draw_bars(ax: Any, bars: Sequence[tuple[str, Sequence[tuple[str, float, Look]]]], unit: str = "ms") -> None:
    """Horizontal stacked bars of parts (name, amount, look), one below the other, with their sums in `unit`."""
    for number, (_, parts) in enumerate(bars):
        left = 0.0
        for name, amount, style in parts:
            colour = _PALETTE[style.colour]
            ax.barh(number, amount, left=left, label=name, color=colour, edgecolor=_PALETTE["page"], height=0.7)
            left += amount
        ax.annotate(f"{left:.2f} {unit}", (left, number), (4, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(bars)), [name for name, _ in bars])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.3 * max(sum(amount for _, amount, _ in parts) for _, parts in bars))
    ax.set_xticks([])
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)


def draw_heat_map(ax: Any, shares: Sequence[Sequence[float]], *, extent: str) -> None:
    """A square of cells, row 0 at the top. A cell is darker the larger it is relative to its row's largest."""
    for i, row in enumerate(shares):
        most, left = max(row) or 1.0, 0
        # The square root makes blocks that are selected rarely visible beside those that are selected always.
        for shade, run in groupby(row, lambda share: round(12 * math.sqrt(share / most)) / 12):  # noqa: B023
            width = len(list(run))
            if shade > 0:
                ax.barh(i, width, 1, left, align="edge", color=_PALETTE["c0"], alpha=shade, linewidth=0)
            left += width
    ax.set(xlim=(0, len(shares)), ylim=(len(shares), 0), aspect="equal", xticks=[], yticks=[])
    ax.set_xlabel(f"key, 0 to {extent}")
    ax.set_ylabel(f"query, {extent} to 0")


def add_legend(figure: Any, columns: int, **look: Any) -> None:
    """One legend below the figure for everything labelled on any of its axes, each label once."""
    handles: dict[str, Any] = {}
    for ax in figure.axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    if handles:
        columns = min(columns, len(handles))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, **look)


def chart(key: str, title: str, description: str, draw: Callable[[Any], None], height: float = _HEIGHT) -> str:
    """A chart as an SVG element. For a screen reader it is an image described by `title` and `description`.

    Everything that `draw` labels is in a legend below.

    Args:
        key: prefix of the identifiers in the element, unique in the page.
        draw: draws on the axes that it gets.
        height: in inches; the width is 3.6.
    """
    with _settings():
        figure, ax = pyplot().subplots(figsize=(_WIDTH, height), layout="constrained")
        draw(ax)
        add_legend(figure, columns=3, frameon=False, fontsize=7)
        words = f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-text">{escape(description)}</desc>'
        view, drawn = _svg(figure, key)
    return f'<svg {view} role="img" aria-labelledby="{key}-title {key}-text">{words}{drawn}</svg>'


def _settings() -> Any:
    muted = _PALETTE["soft"]
    return pyplot().rc_context(
        {
            "svg.fonttype": "none", "svg.hashsalt": "nsa_gen", "font.size": 8, "font.family": "sans-serif",
            "text.color": muted, "axes.labelcolor": muted, "axes.edgecolor": muted, "xtick.color": muted,
            "ytick.color": muted, "grid.color": _PALETTE["rule"], "lines.markersize": 5,
        }
    )  # fmt: skip


def _svg(figure: Any, key: str) -> tuple[str, str]:
    """View box and content of the figure for an HTML page, without URLs, with identifiers that begin with `key`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot().close(figure)
    text = buffer.getvalue()
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    inner = text[text.index(">", view.end()) + 1 : text.rindex("</svg>")]
    unwanted = r"<metadata>.*?</metadata>|<style.*?</style>|<clipPath.*?</clipPath>|<!--.*?-->| clip-path=\"[^\"]*\""
    inner = re.sub(unwanted, "", inner, flags=re.DOTALL).replace("xlink:href", "href")
    used = set(re.findall(r'href="#([^"]*)"', inner))
    inner = re.sub(r' id="([^"]*)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in used else "", inner)
    inner = inner.replace('href="#', f'href="#{key}-')
    for name, colour in _PALETTE.items():
        inner = inner.replace(colour, f"var(--{name})")
    return view[0], inner
