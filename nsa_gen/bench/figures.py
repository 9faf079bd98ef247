"""The figures of a benchmark, from its records: a report's charts as SVG, and files for papers. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from nsa_gen._files import replacing
from nsa_gen.bench.drawing import (
    Look,
    add_legend,
    chart,
    draw_bars,
    draw_heat_map,
    draw_roofline,
    draw_speed_ups,
    look,
    pyplot,
    short,
)
from nsa_gen.bench.records import OTHER, OURS, KernelRow, Results, SelectionRow
from nsa_gen.bench.summary import DIRECTIONS, TITLES, Entry, Key, branch_times, entries, profiles, speed_up
from nsa_gen.hardware import Gpu, gpu_for_device
from nsa_gen.lowering.parts import BRANCH_NAMES

BRANCHES = {**BRANCH_NAMES, OTHER: "torch"}


@dataclass(frozen=True)
class Figure:
    """One figure: charts side by side under one title.

    Attributes:
        title: what it shows, in a few words.
        caption: how to read it.
        charts: (heading, SVG) of each chart.
    """

    title: str
    caption: str
    charts: tuple[tuple[str, str], ...]


def figures(results: Results) -> list[Figure]:
    """All figures for which the results have records, in the order of a report."""
    keys = (f"fig{number}" for number in count(1))
    device = gpu_for_device(str(results.machine.get("gpu")))
    found = [_speed_ups(sweep, keys) for sweep in (*_by_group(results), *_by_length(results))]
    for kernels in profiles(results.kernels):
        found.append(_branches(kernels, keys))
        if device is not None and any(kernel.flops for kernel in kernels):
            found.append(_roofline(kernels, device, keys))
    return found + [_selection(row, keys) for row in results.selections]


def plot_by_length(results: Results, path: Path) -> None:
    """Draw speed-up against length: a row of axes per workload and kind of inputs, a column per pass. PNG, SVG or PDF.

    Raises:
        drawing.MatplotlibMissing: it is not installed.
        ValueError: there is nothing to draw.
    """
    _save(_by_length(results), path)


def plot_by_group(results: Results, path: Path) -> None:
    """Draw speed-up against group size. Raises like `plot_by_length`."""
    _save(_by_group(results), path)


@dataclass(frozen=True)
class _Sweep:
    """Speed-ups over the best dense contender along one axis.

    Attributes:
        by: the name of the axis in a title.
        label: the label of the axis.
        title: what all points have in common.
        series: points (place on the axis, speed-up) by pass and contender, for those that have any.
    """

    by: str
    label: str
    title: str
    series: Mapping[str, Mapping[str, tuple[Sequence[tuple[int, float]], Look]]]


def _sweeps(
    panels: Mapping[str, Mapping[Key, Sequence[Entry]]],
    place: Callable[[Key, Sequence[Entry]], int],
    by: str,
    label: str,
) -> list[_Sweep]:
    """One sweep per titled panel of sequences with a time of a dense contender. A contender looks the same in all."""
    names = dict.fromkeys(each.contender for panel in panels.values() for found in panel.values() for each in found)
    others = [name for name in names if name != OURS]
    looks = {name: look(number) for number, name in enumerate(others)} | {OURS: look(0, ours=True)}
    sweeps = []
    for title, panel in panels.items():
        series: dict[str, dict[str, tuple[Sequence[tuple[int, float]], Look]]] = {}
        for direction in DIRECTIONS:
            for name in names:
                points = {
                    place(key, found): ratio
                    for key, found in panel.items()
                    if (ratio := speed_up(found, name, direction)) is not None
                }
                if points:
                    series.setdefault(direction, {})[name] = sorted(points.items()), looks[name]
        if series:
            sweeps.append(_Sweep(by, label, title, series))
    return sweeps


def _by_length(results: Results) -> list[_Sweep]:
    """Speed-up by length, one sweep per workload and kind of inputs."""
    panels: dict[str, dict[Key, Sequence[Entry]]] = {}
    for key, found in entries(row for row in results.rows if row.part not in ("groups", "breakeven")).items():
        title = f"{key.workload}, groups of {_group(key, found)}, {key.inputs} inputs"
        panels.setdefault(title, {})[key] = found
    return _sweeps(panels, lambda key, found: key.tokens, "length", "tokens")


def _by_group(results: Results) -> list[_Sweep]:
    """Speed-up by group size: from the sweep over groups, or workloads of several groups at the most common length."""
    swept = entries(row for row in results.rows if row.part == "groups")
    found = swept or {
        key: each for key, each in entries(results.rows).items() if key.inputs == "independent" and _equal_dims(each)
    }
    lengths: dict[int, set[int]] = {}
    for key, each in found.items():
        lengths.setdefault(key.tokens, set()).add(_group(key, each))
    if not lengths or max(map(len, lengths.values())) < 2:
        return []
    tokens = max(lengths, key=lambda length: (len(lengths[length]), length))
    panel = {key: each for key, each in found.items() if key.tokens == tokens}
    return _sweeps({f"{tokens:,} tokens": panel}, _group, "group size", "query heads a KV head")


def _equal_dims(found: Sequence[Entry]) -> bool:
    qk, v = found[0].row.head_dim
    return qk == v


def _group(key: Key, found: Sequence[Entry]) -> int:
    return found[0].row.group


def _speed_ups(sweep: _Sweep, keys: Iterator[str]) -> Figure:
    """A sweep as a report's figure: one chart per pass."""
    title = f"Speed-up over the best dense attention by {sweep.by}, {sweep.title}"
    charts = []
    for direction, series in sweep.series.items():
        said = "; ".join(
            f"{name}: {', '.join(f'{y:.2f}x at {short(x)}' for x, y in points)}" for name, (points, _) in series.items()
        )
        draw = partial(draw_speed_ups, series=series, label=sweep.label)
        charts.append((TITLES[direction], chart(next(keys), f"{title}, {TITLES[direction]}", said, draw)))
    caption = "Above the dashed line a contender is quicker than the quickest dense attention of the same run."
    return Figure(title, caption, tuple(charts))


def _save(sweeps: Sequence[_Sweep], path: Path) -> None:
    """Write sweeps to a file: one row of axes per sweep, one column per pass."""
    if not sweeps:
        raise ValueError("nothing to plot: no sequence has the times of a dense contender")
    rows, columns = len(sweeps), len(DIRECTIONS)
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(12, 3 * rows), squeeze=False, sharey=True, layout="constrained"
    )
    for sweep, row in zip(sweeps, axes, strict=True):
        for direction, ax in zip(DIRECTIONS, row, strict=True):
            draw_speed_ups(ax, sweep.series.get(direction, {}), sweep.label)
            ax.set_title(f"{sweep.title}\n{TITLES[direction]}", fontsize=9)
        row[0].set_ylabel("speed-up over the best dense")
    add_legend(figure, columns=8, fontsize=9)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=150, format=path.suffix.removeprefix(".").lower() or "png")
    pyplot().close(figure)


def _branches(kernels: Sequence[KernelRow], keys: Iterator[str]) -> Figure:
    """Where the time goes: one bar per pass, one part per branch."""
    looks = {branch: look(number) for number, branch in enumerate(BRANCHES)}
    times = branch_times(kernels)
    bars, said = [], []
    for direction in dict.fromkeys(one.direction for one in times):
        parts = [
            (BRANCHES.get(one.branch, one.branch), one.ms, looks.get(one.branch, look(7)))
            for one in times
            if one.direction == direction
        ]
        bars.append((direction, parts))
        said.append(f"{direction}: {', '.join(f'{name} {ms:.2f} ms' for name, ms, _ in parts)}")
    title = _place(kernels[0], "time by branch")
    drawn = chart(next(keys), title, "; ".join(said), partial(draw_bars, bars=bars), height=0.6 + 0.4 * len(bars))
    caption = "GPU time of our kernels, as profiled in one forward and one backward."
    return Figure(title, caption, (("", drawn),))


def _roofline(kernels: Sequence[KernelRow], device: Gpu, keys: Iterator[str]) -> Figure:
    """Our kernels under the GPU's roofline, by branch, without kernels that have no matrix work."""
    points, said = [], []
    looks = {branch: look(number) for number, branch in enumerate(BRANCHES)}
    working = [kernel for kernel in kernels if kernel.flops and kernel.bytes]
    for branch in dict.fromkeys(kernel.branch for kernel in working):
        for kernel in (each for each in working if each.branch == branch):
            intensity, rate = kernel.flops / kernel.bytes, kernel.flops / kernel.ms / 1e9
            points.append((BRANCHES[branch], intensity, rate, looks[branch]))
            roof = min(device.bf16_tflops, intensity * device.bandwidth_tbs)
            said.append(f"{kernel.kernel}: {rate:.0f} TFLOP/s, {100 * rate / roof:.0f}% of its roof")
    title = _place(kernels[0], "roofline")
    peak, bandwidth = device.bf16_tflops, device.bandwidth_tbs
    draw = partial(draw_roofline, points=points, peak=peak, bandwidth=bandwidth)
    caption = (
        f"TFLOP/s of the work that no schedule avoids, over FLOPs a byte that must be moved. The roof: {device.name}, "
        f"{peak:.0f} TFLOP/s in bfloat16 and {bandwidth:g} TB/s. {'; '.join(said)}."
    )
    return Figure(title, caption, (("", chart(next(keys), title, "; ".join(said), draw)),))


def _selection(row: SelectionRow, keys: Iterator[str]) -> Figure:
    """Which keys the queries select."""
    size = len(row.shares)
    first = sum(each[0] for each in row.shares) / size
    own = sum(each[i] for i, each in enumerate(row.shares)) / size
    title = _place(row, "what is selected")
    said = (
        f"{size} rows of queries by {size} columns of keys, all KV heads. Of their slots, queries give "
        f"{100 * first:.0f}% to the first column and {100 * own:.0f}% to their own on average."
    )
    drawn = chart(next(keys), title, said, partial(draw_heat_map, shares=row.shares, extent=short(row.tokens)))
    return Figure(title, f"The darker, the more of a row's slots fall there. {said}", (("", drawn),))


def _place(row: KernelRow | SelectionRow, what: str) -> str:
    """The title of a figure about one sequence."""
    return f"{row.workload}: {what}, {row.tokens:,} tokens, {row.inputs} inputs"
