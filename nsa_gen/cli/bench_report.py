"""The results of a benchmark as tables, for `nsa-gen bench` and for the comparison with other packages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nsa_gen.bench.records import FIRST_MEASUREMENT, OURS, KernelRow, Results, Row
from nsa_gen.bench.summary import (
    BOTH,
    DIRECTIONS,
    TITLES,
    Entry,
    Key,
    branch_times,
    crossing,
    entries,
    profiles,
    speed_up,
)
from nsa_gen.cli.blocks import Block, Heading, Table, Text, bullets
from nsa_gen.lowering.parts import BRANCH_NAMES
from nsa_gen.rendering.identity import MEASUREMENT

STARTS = {
    FIRST_MEASUREMENT: "Timed runs begin on an idle GPU, so the host's time until the first kernels run counts too",
    MEASUREMENT: "A timed run of less than 50 ms directly follows an untimed one",
}
"""What the GPU does when a timed run begins, by version of the measurement."""


def report_blocks(results: Results) -> list[Block]:
    """Everything that a benchmark found: the machine, then times, costs, branches, and what was not measured."""
    found = entries(row for row in results.rows if row.part not in ("groups", "breakeven"))
    blocks: list[Block] = [Text(_machine(results))]
    for workload in dict.fromkeys(key.workload for key in found):
        mine = {key: each for key, each in found.items() if key.workload == workload}
        blocks.append(Heading(_title(workload, mine)))
        for inputs in dict.fromkeys(key.inputs for key in mine):
            blocks.append(times_table({key: each for key, each in mine.items() if key.inputs == inputs}, results))
        blocks += cost_blocks(row for row in results.rows if row.workload == workload)
        for kernels in profiles(row for row in results.kernels if row.workload == workload):
            blocks.append(branch_table(kernels))
    blocks += group_blocks(results) + crossing_blocks(results) + decode_blocks(results)
    return blocks + closing_blocks(results)


def _machine(results: Results) -> str:
    on, settings = results.machine, results.settings
    versions = ", ".join(
        f"{name} {on[name]}" for name in ("torch", "triton", "flash-attn-4", "nsa_gen") if on.get(name) is not None
    )
    facts = (
        on.get("gpu") or "unknown GPU",
        f"driver {on.get('driver') or 'unknown'}",
        versions,
        f"commit {(on.get('commit') or 'unknown')[:12]}",
        on.get("date"),
        f"seed {settings.get('seed', 0)}",
    )
    return (
        f"{', '.join(filter(None, facts))}. Medians of rounds in which every contender takes its turn; one sequence. "
        f"{_starts(results)}Speed-ups are over the quickest dense contender of the same column; memory is what the "
        "passes need beside their inputs."
    )


def _starts(results: Results) -> str:
    """What the GPU does when a timed run begins, as sentences; of merged results, a warning if they differ."""
    if not results.rows:
        return ""
    said = [f"{STARTS[name]}. " for name in results.measurements if name in STARTS]
    return "".join(
        said if len(said) < 2 else ["Times were taken in different ways, which differ for short runs. ", *said]
    )


def _title(workload: str, found: dict[Key, list[Entry]]) -> str:
    row = next(iter(found.values()))[0].row
    dims = str(row.head_dim[0]) if row.head_dim[0] == row.head_dim[1] else f"{row.head_dim[0]} and {row.head_dim[1]}"
    heads = f"{row.heads[0]} query and {row.heads[1]} KV heads (groups of {row.group}), head dim {dims}, {row.dtype}"
    return f"{workload}: {heads}"


def times_table(found: dict[Key, list[Entry]], results: Results) -> Table:
    """Milliseconds, speed-ups and memory of every contender at every length, of one workload and kind of inputs."""
    overlaps = {(row.workload, row.inputs, row.tokens): row.overlap for row in results.overlaps}
    rows = []
    inputs = next(iter(found)).inputs
    shares = []
    for key in sorted(found, key=lambda key: key.tokens):
        if (overlap := overlaps.get((key.workload, key.inputs, key.tokens))) is not None:
            shares.append(f"{100 * overlap:.0f}% at {key.tokens:,}")
        timed = [each for each in found[key] if any(row.median_ms is not None for row in each.rows.values())]
        for number, each in enumerate(timed):
            place = f"{key.tokens:,}" if number == 0 else ""
            ms = (_ms(each.ms(direction)) for direction in DIRECTIONS)
            ratios = (_ratio(speed_up(found[key], each.contender, direction)) for direction in DIRECTIONS)
            spread = "-" if each.spread is None else f"{100 * each.spread:.1f}%"
            peak = "-" if each.peak_bytes is None else f"{each.peak_bytes / 2**30:.2f}"
            rows.append((place, each.contender, *ms, *ratios, spread, peak))
    said = f"; neighbouring queries share {', '.join(shares)} of their blocks" if shares else ""
    columns = (">tokens", "contender", *(f">{name}{unit}" for unit in (" ms", "") for name in DIRECTIONS))
    return Table((*columns, ">spread", ">peak GiB"), rows, title=f"{inputs} inputs{said}")


def cost_blocks(rows: Iterable[Row]) -> list[Block]:
    """Achieved arithmetic and traffic of our operator, and its share of the floor; nothing where it has no time."""
    cells = []
    for row in sorted(rows, key=lambda row: (row.inputs, row.tokens)):
        if row.median_ms is None or row.flops is None or row.bytes is None:
            continue
        seconds = row.median_ms / 1000
        rates = (f"{row.flops / seconds / 1e12:.0f}", f"{row.bytes / seconds / 1e12:.2f}")
        floor = (_ms(row.floor_ms), _share(row.floor_ms, row.median_ms))
        cells.append((row.inputs, f"{row.tokens:,}", row.direction, _ms(row.median_ms), *rates, *floor))
    columns = ("inputs", ">tokens", "pass", ">ms", ">TFLOP/s", ">TB/s", ">floor ms", ">of the floor")
    title = f"{OURS}: what no schedule avoids, over the time taken; the floor is what the GPU's peaks allow"
    return [Table(columns, cells, title=title)] if cells else []


def branch_table(kernels: Sequence[KernelRow]) -> Table:
    """GPU time of our operator by branch, of one profiled forward and backward."""
    times = branch_times(kernels)
    rows = []
    for branch in dict.fromkeys(one.branch for one in times):
        passes = {one.direction: one for one in times if one.branch == branch}
        rows.append(
            (BRANCH_NAMES.get(branch, branch), *_pass_cells(passes, "forward"), *_pass_cells(passes, "backward"))
        )
    sums = [_ms(sum(one.ms for one in times if one.direction == direction)) for direction in ("forward", "backward")]
    columns = ("branch", ">forward ms", ">TFLOP/s", ">of the floor", ">backward ms", ">TFLOP/s", ">of the floor")
    one = kernels[0]
    return Table(
        columns,
        rows,
        footer=("sum", sums[0], "", "", sums[1], "", ""),
        title=f"{OURS} by branch, {one.tokens:,} tokens, {one.inputs} inputs, as profiled",
    )


def _pass_cells(passes: dict[str, KernelRow], direction: str) -> tuple[str, str, str]:
    one = passes.get(direction)
    if one is None:
        return "-", "-", "-"
    rate = f"{one.flops / one.ms / 1e9:.0f}" if one.flops else "-"
    return _ms(one.ms), rate, _share(one.floor_ms, one.ms)


def group_blocks(results: Results) -> list[Block]:
    """Speed-ups by group size, forward and backward together, and in each pass."""
    found = entries(row for row in results.rows if row.part == "groups")
    if not found:
        return []
    names = list(dict.fromkeys(each.contender for members in found.values() for each in members if not each.dense))
    blocks: list[Block] = [Heading(f"Group sizes at {next(iter(found)).tokens:,} tokens")]
    for direction in (BOTH, "forward", "backward"):
        rows = []
        for members in sorted(found.values(), key=lambda members: members[0].row.group):
            row = members[0].row
            shown = (_ratio(speed_up(members, name, direction)) for name in names)
            rows.append((f"{row.group}", f"{row.heads[0]}/{row.heads[1]}", *shown))
        columns = (">group", ">heads", *(f">{name}" for name in names))
        blocks.append(Table(columns, rows, title=f"Speed-up over the best dense, {TITLES[direction]}"))
    return blocks


def crossing_blocks(results: Results) -> list[Block]:
    """The length from which on each sparse contender beats the best dense attention."""
    found = entries(row for row in results.rows if row.part == "breakeven")
    rows = []
    for workload in dict.fromkeys(key.workload for key in found):
        mine = {key.tokens: each for key, each in found.items() if key.workload == workload}
        row = next(iter(mine.values()))[0].row
        for name in dict.fromkeys(each.contender for members in mine.values() for each in members if not each.dense):
            cells = []
            for direction in DIRECTIONS:
                ratios = {tokens: speed_up(members, name, direction) for tokens, members in mine.items()}
                cells.append(crossing({tokens: ratio for tokens, ratio in ratios.items() if ratio is not None}))
            if any(cells):
                heads = f"{row.heads[0]}/{row.heads[1]}"
                rows.append((f"{row.group}", heads, name, *(cell.text if cell else "-" for cell in cells)))
    if not rows:
        return []
    columns = (">group", ">heads", "contender", ">forward", ">backward", ">both")
    return [Heading("Break-even against the best dense"), Table(columns, rows)]


def decode_blocks(results: Results) -> list[Block]:
    """Microseconds of a step of decode by batch and context."""
    blocks: list[Block] = []
    for workload in dict.fromkeys(row.workload for row in results.decodes):
        rows = []
        for row in results.decodes:
            if row.workload == workload and row.us is not None:
                share = "-" if row.floor_us is None else f"{100 * row.floor_us / row.us:.0f}%"
                gain = None if row.dense_us is None else row.dense_us / row.us
                times = (row.us, row.paged_us, row.floor_us)
                cells = (*map(_us, times), share, _us(row.dense_us), _ratio(gain))
                rows.append((f"{row.tokens:,}", f"{row.batch}", *cells))
        columns = (">tokens", ">batch", ">us", ">paged us", ">floor us", ">of the floor", ">dense us", ">speed-up")
        blocks += [Heading(f"{workload}: decode"), Table(columns, rows, title="A step of one layer, from a CUDA graph")]
    return blocks


def closing_blocks(results: Results) -> list[Block]:
    """What a reader must know beside the figures: checks, notes, and what was not measured."""
    lines: list[str] = []
    for check in results.checks:
        if check.faults:
            lines.append(f"{check.workload}: {check.contender} is wrong: {'; '.join(check.faults)}")
        elif check.error:
            lines.append(f"{check.workload}: {check.contender} failed its check: {check.error}")
    lines += [
        f"{row.workload}, decode, {row.tokens:,} tokens, batch {row.batch}: {row.problem}"
        for row in results.decodes
        if row.problem
    ]
    differences: dict[str, list[float]] = {}
    for check in results.checks:
        if check.difference is not None:
            differences.setdefault(check.contender, []).append(check.difference)
    for name, sizes in differences.items():
        span = " to ".join(dict.fromkeys(f"{100 * size:.1f}%" for size in (min(sizes), max(sizes))))
        lines.append(f"{name}: its output differs from {OURS}'s by {span} in norm")
    lines += dict.fromkeys(f"{row.contender}: {row.note}" for row in results.rows if row.note)
    missing: dict[str, list[str]] = {}
    for key, members in entries(results.rows).items():
        for each in members:
            if each.problem:
                failed = [name for name, row in each.rows.items() if row.median_ms is None]
                passes = f" {failed[0]}" if len(failed) < len(each.rows) else ""
                place = f"{key.workload} {key.tokens:,}" + ("" if key.inputs == "independent" else f" {key.inputs}")
                missing.setdefault(f"{each.contender}{passes}: {each.problem}", []).append(place)
    lines += [f"{what} ({_places(places)})" for what, places in missing.items()]
    lines += [
        f"{task.workload}, {task.tokens:,} tokens, {task.inputs}: {task.status}: {task.reason}"
        for task in results.tasks
        if task.status != "ok"
    ]
    return bullets(lines, "Notes")


def _places(places: Sequence[str], most: int = 4) -> str:
    shown = list(dict.fromkeys(places))
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(floor_ms: float | None, ms: float) -> str:
    return "-" if floor_ms is None else f"{100 * floor_ms / ms:.0f}%"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
