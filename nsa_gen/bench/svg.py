"""Charts as SVG text: lines, points under a roof, stacked bars and a heat map, for a page that is one file.

Colours are classes (`s0`, `s1`, ... for series, `ours`, `axis`, `grid`, `roof`, `cell`) that the page's style sheet
gives a light and a dark form; series differ in marker as well as in colour. Every chart is an image to a screen reader,
with a title and a description of what it shows in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 42
SHAPES = 6
"""Markers there are; series beyond them begin again."""


@dataclass(frozen=True)
class Series:
    """Points (x, y) under a name; `style` is a class of the style sheet and `shape` the number of a marker."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: str
    shape: int


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis from `low` to `high`, drawn from `start` to `end`, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def _scale(values: Sequence[float], start: float, end: float, base: float, ticks: Sequence[float] = ()) -> Scale:
    """A scale that holds all values, from a power of the base to one (or a little beyond the ticks that are given)."""
    if ticks:
        margin = (max(ticks) / min(ticks)) ** 0.04 if max(ticks) > min(ticks) else 1.5
        return Scale(min(ticks) / margin, max(ticks) * margin, start, end, tuple(ticks))
    low = math.floor(math.log(min(values), base) + 1e-9)
    high = max(math.ceil(math.log(max(values), base) - 1e-9), low + 1)
    step = max(1, math.ceil((high - low) / 7))
    powers = tuple(base**power for power in range(low, high + 1, step))
    return Scale(base**low, base**high, start, end, powers)


def line_chart(
    key: str, title: str, description: str, series: Sequence[Series], *, x_label: str, x_text: Callable[[float], str]
) -> str:
    """Lines over a logarithmic axis of lengths or sizes, with a dashed line where y is 1."""
    xs = sorted({x for each in series for x, _ in each.points})
    ys = [y for each in series for _, y in each.points] + [1.0]
    across = _scale(xs, _LEFT, WIDTH - _RIGHT, 2, xs)
    up = _scale(ys, HEIGHT - _BOTTOM, _TOP, 2)
    parts = [*_axes(across, up, x_label, x_text, lambda y: f"{y:g}x")]
    parts.append(f'<line class="one" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{up(1):.1f}" y2="{up(1):.1f}"/>')
    for each in series:
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in each.points)
        parts.append(f'<polyline class="line {each.style}" points="{points}"/>')
        for x, y in each.points:
            parts.append(_marker(across(x), up(y), each, f"{each.name}, {x_text(x)}: {y:.2f}x"))
    return _image(key, title, description, parts)


def roofline(key: str, title: str, description: str, series: Sequence[Series], *, peak: float, bandwidth: float) -> str:
    """Points (FLOPs a byte, TFLOP/s) under the roof of a GPU: `peak` in TFLOP/s, `bandwidth` in TB/s."""
    ridge = peak / bandwidth
    xs = [x for each in series for x, _ in each.points] + [ridge * 2, ridge / 8]
    ys = [y for each in series for _, y in each.points] + [peak]
    across, up = _scale(xs, _LEFT, WIDTH - _RIGHT, 10), _scale(ys, HEIGHT - _BOTTOM, _TOP, 10)
    parts = [*_axes(across, up, "FLOPs a byte that must be moved", _thousands, _thousands)]
    parts.append(f'<text class="label" x="{_LEFT + 6}" y="{_TOP + 14}">TFLOP/s</text>')
    start = max(across.low, up.low / bandwidth)
    corners = [(start, start * bandwidth), (ridge, peak), (across.high, peak)]
    roof = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in corners)
    parts.append(f'<polyline class="roof" points="{roof}"/>')
    for each in series:
        for x, y in each.points:
            parts.append(_marker(across(x), up(y), each, f"{each.name}: {y:.0f} TFLOP/s at {x:.0f} FLOPs a byte"))
    return _image(key, title, description, parts)


def stacked_bars(
    key: str, title: str, description: str, bars: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]
) -> str:
    """Horizontal bars of parts (name, milliseconds, class), one under the other on a common linear scale."""
    longest = max(sum(ms for _, ms, _ in parts) for _, parts in bars)
    room = WIDTH - 84 - 66
    height = 16 + 34 * len(bars)
    drawn = []
    for number, (name, parts) in enumerate(bars):
        y = 10 + 34 * number
        drawn.append(f'<text class="label" x="78" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        x = 84.0
        for part, ms, style in parts:
            width = room * ms / longest
            said = escape(f"{part}: {ms:.2f} ms")
            drawn.append(
                f'<rect class="bar {style}" x="{x:.1f}" y="{y}" width="{max(width, 0.1):.1f}" height="22">'
                f"<title>{said}</title></rect>"
            )
            x += width
        total = sum(ms for _, ms, _ in parts)
        drawn.append(f'<text class="label" x="{x + 5:.1f}" y="{y + 15}">{total:.2f} ms</text>')
    return _image(key, title, description, drawn, height=height)


def heat_map(key: str, title: str, description: str, shares: Sequence[Sequence[float]], *, extent: str) -> str:
    """A square of cells, row 0 at the top: the darker, the larger the cell's share of its row's largest."""
    size = HEIGHT - 34
    left, cell = (WIDTH - size) / 2, size / len(shares)
    parts = [f'<rect class="frame" x="{left:.1f}" y="4" width="{size}" height="{size}"/>']
    for i, row in enumerate(shares):
        most = max(row) or 1.0
        for j, share in enumerate(row):
            if share > 0:
                # The square root: what is chosen now and then is seen beside what is chosen always.
                strength = math.sqrt(share / most)
                parts.append(
                    f'<rect class="cell" x="{left + cell * j:.2f}" y="{4 + cell * i:.2f}" width="{cell:.2f}" '
                    f'height="{cell:.2f}" fill-opacity="{strength:.2f}"/>'
                )
    middle = WIDTH / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">key, 0 to {extent}</text>')
    turned = f'transform="translate({left - 8:.1f} {4 + size / 2}) rotate(-90)"'
    parts.append(f'<text class="label" {turned} text-anchor="middle">query, {extent} to 0</text>')
    return _image(key, title, description, parts)


def swatch(style: str, shape: int) -> str:
    """The marker of a series on a short line, for a legend; decoration to a screen reader."""
    marker = _marker(12, 7, Series("", (), style, shape), "")
    line = f'<polyline class="line {style}" points="1,7 23,7"/>'
    return f'<svg class="swatch" viewBox="0 0 24 14" width="24" height="14" aria-hidden="true">{line}{marker}</svg>'


def block_swatch(style: str) -> str:
    """A filled square of a bar's colour, for a legend."""
    return (
        '<svg class="swatch" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">'
        f'<rect class="bar {style}" x="1" y="1" width="12" height="12"/></svg>'
    )


def _image(key: str, title: str, description: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{key}-title {key}-text">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-text">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def _axes(
    across: Scale, up: Scale, x_label: str, x_text: Callable[[float], str], y_text: Callable[[float], str]
) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for y in up.ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 5}" y="{up(y) + 4:.1f}" text-anchor="end">{y_text(y)}</text>')
    last = -math.inf
    for x in across.ticks:
        place = across(x)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        if place - last >= 26:
            parts.append(
                f'<text class="tick" x="{place:.1f}" y="{bottom + 15}" text-anchor="middle">{x_text(x)}</text>'
            )
            last = place
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    return parts


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _marker(x: float, y: float, series: Series, said: str) -> str:
    outlines = (
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
        "M-3.6 -3.6H3.6V3.6H-3.6Z",
        "M0 -4.8L4.8 3.6H-4.8Z",
        "M0 -5L5 0L0 5L-5 0Z",
        "M0 4.8L4.8 -3.6H-4.8Z",
        "M-1.5 -4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    )
    title = f"<title>{escape(said)}</title>" if said else ""
    place = f'transform="translate({x:.1f} {y:.1f})"'
    return f'<path class="mark {series.style}" d="{outlines[series.shape % SHAPES]}" {place}>{title}</path>'
