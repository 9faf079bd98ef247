"""Results of commands as blocks; the commands, the demo and the report's page show the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nsa_gen.cli.blocks import Block, Heading, Table, Text, bullets

if TYPE_CHECKING:
    from nsa_gen.tuning import BucketResult, TuneReport
    from nsa_gen.tuning.stage0 import Selection
    from nsa_gen.tuning.store import Configs, Entry

Json = Mapping[str, Any]


def explain_blocks(result: Json) -> list[Block]:
    """What `explain --json` says: the kernels of each pass with their costs, and why they are what they are."""
    directions = list(dict.fromkeys(kernel["direction"] for kernel in result["kernels"]))
    blocks: list[Block] = [Text(_opening(result))]
    blocks += [_cost_table(result, direction) for direction in directions]
    blocks += [_kernel_table(result), *_notes(result)]
    return blocks


def _opening(result: Json) -> str:
    from nsa_gen.hardware import gpu

    facts = gpu(result["gpu"])
    peaks = f"{facts.name} ({facts.bf16_tflops:.0f} TFLOP/s, {facts.bandwidth_tbs:g} TB/s)"
    sequences = "one sequence" if result["batch"] == 1 else f"{result['batch']} sequences"
    return f"{result['name']}: {sequences} of {result['tokens']:,} tokens on {peaks}"


def _cost_table(result: Json, direction: str) -> Table:
    """A row a kernel of one pass, and the sum."""
    kernels = [kernel for kernel in result["kernels"] if kernel["direction"] == direction]
    timed = any("measured_seconds" in kernel for kernel in result["kernels"])
    sums = {
        field: sum(kernel[field] for kernel in kernels)
        for field in ("flops", "bytes", "seconds_floor", "seconds_predicted")
    }
    both = [kernel for kernel in kernels if "measured_seconds" in kernel]
    if both:
        sums["measured_seconds"] = sum(kernel["measured_seconds"] for kernel in both)
        sums["error"] = sum(kernel["seconds_predicted"] for kernel in both) / sums["measured_seconds"]
    columns = ("kernel", "branch", ">FLOPs", ">bytes", ">floor", "limited by", ">predicted", "bound by")
    rows = [
        (
            kernel["kernel"],
            _branch_name(kernel["branch"]),
            *_cost(kernel),
            kernel["limited_by"],
            si(kernel["seconds_predicted"], "s") + ("" if kernel["calibrated"] else " *"),
            kernel["bound_by"],
            *(_measured(kernel) if timed else ()),
        )
        for kernel in kernels
    ]
    total = si(sums["seconds_predicted"], "s")
    return Table(
        columns=(*columns, *((">measured", ">predicted/measured") if timed else ())),
        rows=rows,
        footer=("sum", "", *_cost(sums), "", total, "", *(_measured(sums) if timed else ())),
        title=direction,
    )


def _branch_name(branch: str) -> str:
    from nsa_gen.lowering.parts import BRANCH_NAMES

    return BRANCH_NAMES.get(branch, branch)


def _measured(kernel: Json) -> tuple[str, str]:
    if "measured_seconds" not in kernel:
        return "-", "-"
    return si(kernel["measured_seconds"], "s"), f"{kernel['error']:.2f}x"


def _kernel_table(result: Json) -> Table:
    """What each kernel is for, how it goes about it, and how its configuration came about."""
    rows = []
    for kernel in result["kernels"]:
        config = ", ".join(f"{name}={value}" for name, value in kernel["config"].items())
        fit = f"{kernel['legal_configs']} of {kernel['configs']}"
        rows.append((kernel["kernel"], kernel["purpose"], kernel["schedule"], config, fit))
    columns = ("kernel", "purpose", "schedule", "configuration", ">fit")
    title = "What runs, and how: of the configurations that fit the GPU, the one of least modelled time"
    return Table(columns, rows, title=title)


def _notes(result: Json) -> list[Block]:
    """The choices between schedules, what the predictions rest on, and how far they are off."""
    lines = [f"{each['choice']}: {_decision(each)}, by the cost model" for each in result["choices"]]
    if any(each["chosen_seconds"] > each["other_seconds"] for each in result["choices"]):
        lines.append("near a tie the schedule of less memory is chosen; the tuner measures both")
    if any(not kernel["calibrated"] for kernel in result["kernels"]):
        lines.append("* no kernel of this kind has been measured: the cost model's time as it is")
    if result["gpu"] != "h100":
        lines.append("predictions are scaled by measurements on an H100; on another GPU they are further off")
    errors = {kernel["kernel"]: kernel["error"] for kernel in result["kernels"] if "error" in kernel}
    if errors:
        worst = max(errors, key=lambda name: max(errors[name], 1 / errors[name]))
        lines.append(f"the prediction furthest off: {worst}, {errors[worst]:.2f} times what was measured")
    if result["unpredicted"]:
        seconds = sum(each["measured_seconds"] for each in result["unpredicted"])
        names = [each["kernel"].partition("<")[0] for each in result["unpredicted"]]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"measured beside these: {', '.join(names[:4])}{more}, {si(seconds, 's')} together")
    return bullets(lines)


def _decision(choice: Json) -> str:
    if choice["chosen"] == choice["other"]:
        chosen, other = (si(choice[f"{side}_seconds"], "s") for side in ("chosen", "other"))
        return f"{'yes' if choice['value'] else 'no'} ({', '.join(choice['chosen'])}: {chosen}, else {other})"
    return f"{_side(choice, 'chosen')} rather than {_side(choice, 'other')}"


def _side(choice: Json, side: str) -> str:
    names = " and ".join(choice[side]) or "nothing"
    return f"{names} ({si(choice[f'{side}_seconds'], 's')})"


def branch_table(result: Json) -> Table:
    """What `explain --json` says, summed over the kernels of each branch."""
    branches = list(dict.fromkeys(kernel["branch"] for kernel in result["kernels"]))
    groups = {branch: [kernel for kernel in result["kernels"] if kernel["branch"] == branch] for branch in branches}
    return Table(
        columns=("branch", ">kernels", ">FLOPs", ">bytes", ">forward floor", ">backward floor"),
        rows=[(_branch_name(branch), *_sums(kernels)) for branch, kernels in groups.items()],
        footer=("sum", *_sums(result["kernels"])),
        title="By branch",
    )


def _sums(kernels: Sequence[Json]) -> tuple[str, ...]:
    """Number of kernels, FLOPs, bytes, and floor of the forward and of the backward ones."""
    floors = {
        direction: sum(kernel["seconds_floor"] for kernel in kernels if kernel["direction"] == direction)
        for direction in ("forward", "backward")
    }
    return (
        str(len(kernels)),
        si(sum(kernel["flops"] for kernel in kernels), "FLOP"),
        si(sum(kernel["bytes"] for kernel in kernels), "B"),
        *(si(floor, "s") for floor in floors.values()),
    )


def compile_matrix(result: Json) -> Table:
    """What `compile` says of one spec, at a glance: a row a kernel, a column a target, the worst variant each."""
    targets = _by_target(result)
    kernels = list(dict.fromkeys(row["kernel"] for row in result["rows"]))
    rows = []
    for kernel in kernels:
        cells = []
        for compiled in targets.values():
            variants = [row for row in compiled if row["kernel"] == kernel]
            cells.append(_worst(variants) if variants else "-")
        rows.append((kernel, *cells))
    return Table(
        columns=("kernel", *(f">{target}" for target in targets)),
        rows=rows,
        footer=("fits", *(f"{sum(row['ok'] for row in rows)} of {len(rows)}" for rows in targets.values())),
        title="Registers of a thread and shared memory of a block, of the variant that needs most",
    )


def failures(result: Json) -> list[str]:
    """Why kernels do not compile or do not fit, a line each; variants that fail alike share one."""
    lines = (f"{row['kernel']} on {row['target']}: {row['reason']}" for row in result["rows"] if not row["ok"])
    return list(dict.fromkeys(lines))


def _by_target(result: Json) -> dict[str, list[Json]]:
    targets: dict[str, list[Json]] = {}
    for row in result["rows"]:
        targets.setdefault(row["target"], []).append(row)
    return targets


def _worst(variants: list[Json]) -> str:
    """The cell of a kernel's variants on one target."""
    if not all(row["ok"] for row in variants):
        return "fails"
    registers = max(row["resources"]["registers"] or 0 for row in variants)
    shared = max(row["resources"]["shared_memory"] for row in variants)
    spills = " spills" if any(row["spills_heavily"] for row in variants) else ""
    return f"{registers or '?'} / {kib(shared)}{spills}"


def verify_blocks(result: Json) -> list[Block]:
    """What `verify --json` says: of each quantity the comparison that came nearest to its bound, failures, notes."""
    worst: dict[str, Json] = {}
    for row in result["rows"]:
        if row["quantity"] not in worst or _usage(row) > _usage(worst[row["quantity"]]):
            worst[row["quantity"]] = row
    rows = []
    for row in worst.values():
        used = f"{100 * _usage(row):.0f}%" if math.isfinite(_usage(row)) else "-"
        sizes = (_scientific(row["error"]), _scientific(row["bound"]), used)
        rows.append((row["quantity"], row["measure"], *sizes, row["case"], "ok" if row["ok"] else "fails"))
    heads, passes = result["heads"], " and ".join(result["passes"])
    blocks: list[Block] = [
        Text(
            f"{result['dtype']}, {heads[0]} query and {heads[1]} KV heads, {passes}, {len(result['cases'])} cases, "
            f"{len(result['rows'])} comparisons with the dense reference in float64, seed {result['seed']}."
        ),
        Table(("quantity", "measure", ">error", ">bound", ">used", "worst case", "result"), rows),
    ]
    failed = [
        f"{row['case']}: {row['quantity']}: {row['problem'] or 'error beyond its bound'}"
        for row in result["rows"]
        if not row["ok"]
    ]
    left_out = (result.get("coverage") or {}).get("left_out", ())
    return blocks + bullets([*failed, *(f"left out: {what}" for what in left_out), *result["notes"]])


def _usage(row: Json) -> float:
    """The error as a share of its bound; inf for a failure that has no size."""
    if row["problem"] or row["error"] is None or row["bound"] is None:
        return math.inf
    if row["bound"] == 0:
        return math.inf if row["error"] else 0.0
    return row["error"] / row["bound"]


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def kib(size: int) -> str:
    """Bytes as KiB, without a decimal for whole ones; fewer than one KiB as bytes."""
    if size < 1024:
        return f"{size} B"
    return f"{size / 1024:.0f} KiB" if size % 1024 == 0 else f"{size / 1024:.1f} KiB"


def si(value: float, unit: str) -> str:
    """A number with an SI prefix and three significant digits: `si(1.26e12, "FLOP")` is "1.26 TFLOP"."""
    for power, prefix in zip(range(15, -10, -3), ("P", "T", "G", "M", "k", "", "m", "µ", "n"), strict=True):
        if value and (abs(value) >= 0.9995 * 10.0**power or prefix == "n"):
            return f"{_three_digits(value / 10.0**power)} {prefix}{unit}"
    return f"0 {unit}"


def _three_digits(value: float) -> str:
    """Three significant digits without an exponent: 1.26, 12.6, 126, 1260."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def _cost(kernel: Json) -> tuple[str, str, str]:
    return si(kernel["flops"], "FLOP"), si(kernel["bytes"], "B"), si(kernel["seconds_floor"], "s")


# Tunings and what they leave

MOST_LISTED = 20


def tuning_blocks(report: TuneReport) -> list[Block]:
    """Stage 0 for a dry run; else the results, what was quarantined, and where everything is."""
    if report.device is None:
        blocks = [
            *_stage0(report),
            Text(f"{report.name} for {report.target}: {report.seconds:.0f} s; nothing was timed."),
        ]
        if (expected := report.expected) is not None:
            blocks.append(
                Text(
                    f"Tuning it would take about {expected.wall_seconds:.0f} s: compiling, "
                    f"{expected.compile_seconds:.0f} s over {expected.jobs} processes, and "
                    f"{expected.gpu_seconds:.0f} s on the GPU."
                )
            )
        return blocks
    blocks: list[Block] = [Heading(f"{report.name} on {report.device.name}")]
    blocks += [block for result in report.results for block in _result(result)]
    if report.wrong:
        lines = "\n".join(f"{name}: {reason}" for name, reason in report.wrong.items())
        blocks.append(Heading("WRONG RESULTS"))
        blocks.append(Text(f"These candidates do not compute what they must. Please report them.\n{lines}"))
    others = [item for item in report.quarantined.items() if item[0] not in report.wrong]
    if others:
        rows = [(name, reason) for name, reason in others[:MOST_LISTED]]
        title = f"{len(others)} candidates failed and were left out"
        blocks.append(Table(("candidate", "reason"), rows, title=title))
    resumed = f", {report.resumed} answers taken from the journal" if report.resumed else ""
    blocks.append(Text(f"{report.measured} times taken in {report.seconds:.0f} s{resumed}. Journal: {report.journal}"))
    return blocks


def _result(result: BucketResult) -> list[Block]:
    if result.problem and not result.times and result.saved is None and not result.configs:
        return [Text(f"{result.bucket.label}: {result.problem}")]
    won = f"{result.gain:.3f} +- {result.noise:.3f} times the default's speed"
    title = f"{result.bucket.label}: {won if result.configs else 'the default won'}"
    blocks = _tables(title, result.times, result.configs)
    end = f"saved in {result.saved}" if result.saved is not None else result.problem
    cut = "; the budget ran out before every kernel was tried" if result.cut_short else ""
    return [*blocks, Text(f"{end}{cut}")]


def _tables(title: str, times: Mapping[str, Any], configs: Configs) -> list[Block]:
    """Milliseconds by kind of input and pass, and the configurations that are not the default's, if any."""
    rows = [
        (kind, name, f"{ms['default']:.3f}", f"{ms['tuned']:.3f}", f"{ms['default'] / ms['tuned']:.2f}x")
        for kind, passes in times.items()
        for name, ms in passes.items()
    ]
    blocks: list[Block] = [Table(("inputs", "pass", ">default ms", ">tuned ms", ">gain"), rows, title=title)]
    if configs:
        lines = [
            (name, ", ".join(f"{key}={value}" for key, value in values.items())) for name, values in configs.items()
        ]
        blocks.append(Table(("kernel or schedule", "configuration"), lines))
    return blocks


def entries_table(entries: Iterable[Entry]) -> Table:
    """A row a tuned entry: what it is for, what it gains over the default, and what it was made with."""
    columns = ("spec", "GPU", "calls", ">gain", ">changed", "kernels", "tuned with")
    return Table(columns, [_entry_row(each) for each in entries])


def _entry_row(entry: Entry) -> tuple[str, ...]:
    identity, made = entry.identity, entry.provenance
    versions = {"torch": made.torch, "triton": made.triton, "driver": made.driver, "nsa_gen": made.nsa_gen}
    return (
        identity.spec,
        identity.gpu,
        identity.bucket.label,
        f"{entry.result['gain']:.2f}x" if "gain" in entry.result else "",
        str(len(entry.configs)),
        identity.kernels,
        ", ".join([*(f"{name} {version}" for name, version in versions.items() if version), made.date[:10]]),
    )


def entry_blocks(entries: Sequence[Entry]) -> list[Block]:
    """Tuned entries: all of them in a table, then the times and configurations of each."""
    blocks: list[Block] = [entries_table(entries)]
    for entry in entries:
        identity = entry.identity
        end = "" if entry.configs else ": the default won"
        title = f"{identity.spec}, {identity.bucket.label}, {identity.gpu}{end}"
        blocks += _tables(title, entry.result.get("ms", {}), entry.configs)
    return blocks


def _stage0(report: TuneReport) -> list[Block]:
    blocks: list[Block] = []
    columns = ("kernel", ">of", ">legal", ">tried", ">dropped", ">merged", ">left", "candidates, the default first")
    for bucket, selections in report.selections.items():
        rows = [_selected(each) for each in selections]
        blocks.append(Table(columns, rows, title=f"{report.name} for {report.target}, {bucket.label}"))
        dropped = [(each.kernel, config, reason) for each in selections for config, reason in each.dropped.items()]
        if dropped:
            blocks.append(Table(("kernel", "dropped", "reason"), dropped))
    return blocks


def _selected(one: Selection) -> tuple[str, ...]:
    shown = [
        f"{' '.join(str(value) for value in each.config.values())} ({1e6 * each.seconds:.0f} us)"
        for each in one.survivors[:3]
    ]
    more = len(one.survivors) - len(shown)
    tried = len(one.survivors) + len(one.dropped) + one.merged
    counts = (one.total, one.legal, tried, len(one.dropped), one.merged, len(one.survivors))
    return (one.kernel, *map(str, counts), ", ".join(shown) + (f", {more} more" if more > 0 else ""))
