"""Figures of a benchmark: speed-up over the best dense attention by length and by group size. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nsa_gen._files import replacing
from nsa_gen.bench.contenders import OURS
from nsa_gen.bench.drawing import draw_speed_ups, look, pyplot
from nsa_gen.bench.records import Results
from nsa_gen.bench.summary import DIRECTIONS, TITLES, Entry, Key, best_dense, entries, short, speed_up


def plot_by_length(results: Results, path: Path, *, workloads: Sequence[str] | None = None) -> None:
    """Draw speed-up against length: a row of axes a workload and kind of inputs, a column a pass. PNG, SVG or PDF.

    `workloads` are those to draw, all if left out.

    Raises:
        drawing.MatplotlibMissing: it is not installed.
        ValueError: there is nothing to draw.
    """
    found = entries(results.rows)
    names = list(dict.fromkeys(key.workload for key in found))
    lines = [
        (name, kind)
        for name in names
        if workloads is None or name in workloads
        for kind in dict.fromkeys(key.inputs for key in found if key.workload == name)
    ]
    panels = [{key: each for key, each in found.items() if (key.workload, key.inputs) == line} for line in lines]
    groups = [_group(*next(iter(panel.items()))) for panel in panels]
    titles = [f"{name}, groups of {group}, {kind} inputs" for (name, kind), group in zip(lines, groups, strict=True)]
    _draw(panels, titles, lambda key, each: key.tokens, "tokens", path)


def plot_by_group(results: Results, path: Path) -> None:
    """Draw speed-up against group size, of the sweep over groups. Raises like `plot_by_length`."""
    found = entries(row for row in results.rows if row.part == "groups")
    tokens = next((key.tokens for key in found), 0)
    _draw([found], [f"{tokens:,} tokens"], _group, "query heads a KV head", path)


def _group(key: Key, found: Sequence[Entry]) -> int:
    return found[0].row.group


def _draw(
    panels: Sequence[Mapping[Key, Sequence[Entry]]],
    titles: Sequence[str],
    place: Callable[[Key, Sequence[Entry]], int],
    label: str,
    path: Path,
) -> None:
    shown = [
        (panel, title)
        for panel, title in zip(panels, titles, strict=True)
        if any(best_dense(found, direction) for found in panel.values() for direction in DIRECTIONS)
    ]
    if not shown:
        raise ValueError("nothing to plot: no sequence has the times of a dense contender")
    figure, axes = pyplot().subplots(
        len(shown), len(DIRECTIONS), figsize=(12, 3 * len(shown)), squeeze=False, sharey=True, layout="constrained"
    )
    everyone = dict.fromkeys(each.contender for panel, _ in shown for found in panel.values() for each in found)
    others = [name for name in everyone if name != OURS]
    looks = {name: look(number) for number, name in enumerate(others)} | {OURS: look(0, ours=True)}
    for (panel, title), row in zip(shown, axes, strict=True):
        for direction, ax in zip(DIRECTIONS, row, strict=True):
            series = {}
            for name in everyone:
                points = sorted(
                    (place(key, found), ratio)
                    for key, found in panel.items()
                    if (ratio := speed_up(found, name, direction)) is not None
                )
                if points:
                    series[name] = (points, looks[name])
            draw_speed_ups(ax, series, label, short)
            ax.set_title(f"{title}\n{TITLES[direction]}", fontsize=9)
        row[0].set_ylabel("speed-up over the best dense")
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(8, len(handles)), fontsize=9)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=150, format=path.suffix.removeprefix(".").lower() or "png")
    pyplot().close(figure)
