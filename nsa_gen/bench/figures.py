"""The figures of a report, from the records of a benchmark: charts as SVG, a caption, and words for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from nsa_gen.bench.breakdown import OTHER
from nsa_gen.bench.contenders import OURS
from nsa_gen.bench.drawing import Look, chart, draw_bars, draw_heat_map, draw_roofline, draw_speed_ups, look
from nsa_gen.bench.records import KernelRow, Results, SelectionRow
from nsa_gen.bench.summary import DIRECTIONS, TITLES, Entry, Key, branch_times, entries, profiles, short, speed_up
from nsa_gen.hardware import Gpu, gpu_for_device
from nsa_gen.lowering.plan import BRANCH_NAMES

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
    """All figures that the results have records for, in the order of a report."""
    keys = (f"fig{number}" for number in count(1))
    device = gpu_for_device(str(results.machine.get("gpu")))
    found = [*_by_group(results, keys), *_by_length(results, keys)]
    for kernels in profiles(results.kernels):
        found.append(_branches(kernels, keys))
        if device is not None and any(kernel.flops for kernel in kernels):
            found.append(_roofline(kernels, device, keys))
    found += [_selection(row, keys) for row in results.selections]
    return found


def _by_length(results: Results, keys: Iterator[str]) -> list[Figure]:
    """Speed-up over the best dense contender by length, a figure a workload and kind of inputs."""
    found = entries(row for row in results.rows if row.part not in ("groups", "breakeven"))
    figures = []
    for workload, inputs in dict.fromkeys((key.workload, key.inputs) for key in found):
        panel = {key: each for key, each in found.items() if (key.workload, key.inputs) == (workload, inputs)}
        title = f"{workload}: speed-up over the best dense attention by length, {inputs} inputs"
        figures += _speed_ups(panel, lambda key, each: key.tokens, title, "tokens", short, keys)
    return figures


def _by_group(results: Results, keys: Iterator[str]) -> list[Figure]:
    """Speed-up by group size: of the sweep over groups, or of workloads of several groups at the commonest length."""
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
    title = f"Speed-up over the best dense attention by group size, {tokens:,} tokens"
    return _speed_ups(panel, _group, title, "query heads a KV head", lambda x: f"{x:g}", keys)


def _equal_dims(found: Sequence[Entry]) -> bool:
    qk, v = found[0].row.head_dim
    return qk == v


def _group(key: Key, found: Sequence[Entry]) -> int:
    return found[0].row.group


def _speed_ups(
    panel: Mapping[Key, Sequence[Entry]],
    place: Callable[[Key, Sequence[Entry]], int],
    title: str,
    label: str,
    text: Callable[[float], str],
    keys: Iterator[str],
) -> list[Figure]:
    """A chart a pass; nothing where no sequence has a dense contender's time."""
    names = list(dict.fromkeys(each.contender for found in panel.values() for each in found))
    others = [name for name in names if name != OURS]
    looks = {name: look(number) for number, name in enumerate(others)} | {OURS: look(0, ours=True)}
    charts = []
    for direction in DIRECTIONS:
        series: dict[str, tuple[list[tuple[int, float]], Look]] = {}
        for name in names:
            points = {
                place(key, found): ratio
                for key, found in panel.items()
                if (ratio := speed_up(found, name, direction)) is not None
            }
            if points:
                series[name] = (sorted(points.items()), looks[name])
        if series:
            said = "; ".join(
                f"{name}: {', '.join(f'{y:.2f}x at {text(x)}' for x, y in points)}"
                for name, (points, _) in series.items()
            )
            draw = partial(draw_speed_ups, series=series, label=label, text=text)
            charts.append((TITLES[direction], chart(next(keys), f"{title}, {TITLES[direction]}", said, draw)))
    if not charts:
        return []
    caption = "Above the dashed line a contender is quicker than the quickest dense attention of the same run."
    return [Figure(title, caption, tuple(charts))]


def _branches(kernels: Sequence[KernelRow], keys: Iterator[str]) -> Figure:
    """Where the time goes: a bar a pass, a part a branch."""
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
    one = kernels[0]
    title = f"{one.workload}: time by branch, {one.tokens:,} tokens, {one.inputs} inputs"
    drawn = chart(next(keys), title, "; ".join(said), partial(draw_bars, bars=bars), height=0.6 + 0.4 * len(bars))
    caption = "GPU time of our kernels, as profiled in one forward and one backward."
    return Figure(title, caption, (("", drawn),))


def _roofline(kernels: Sequence[KernelRow], device: Gpu, keys: Iterator[str]) -> Figure:
    """Our kernels under the roof of the GPU, by branch; those without matrix work have no place in it."""
    points, said = [], []
    looks = {branch: look(number) for number, branch in enumerate(BRANCHES)}
    working = [kernel for kernel in kernels if kernel.flops and kernel.bytes]
    for branch in dict.fromkeys(kernel.branch for kernel in working):
        for kernel in (each for each in working if each.branch == branch):
            intensity, rate = kernel.flops / kernel.bytes, kernel.flops / kernel.ms / 1e9
            points.append((BRANCHES[branch], intensity, rate, looks[branch]))
            roof = min(device.bf16_tflops, intensity * device.bandwidth_tbs)
            said.append(f"{kernel.kernel}: {rate:.0f} TFLOP/s, {100 * rate / roof:.0f}% of its roof")
    one = kernels[0]
    title = f"{one.workload}: roofline, {one.tokens:,} tokens, {one.inputs} inputs"
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
    title = f"{row.workload}: what is selected, {row.tokens:,} tokens, {row.inputs} inputs"
    said = (
        f"{size} rows of queries by {size} columns of keys, all KV heads. Of their slots, queries give "
        f"{100 * first:.0f}% to the first column and {100 * own:.0f}% to their own on average."
    )
    drawn = chart(next(keys), title, said, partial(draw_heat_map, shares=row.shares, extent=short(row.tokens)))
    return Figure(title, f"The darker, the more of a row's slots fall there. {said}", (("", drawn),))
