"""The commands' JSON results as tables; the commands and the demo's report show the same ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nsa_gen.cli.blocks import Block, Table, Text
from nsa_gen.lowering.plan import BRANCH_NAMES

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
    return f"{result['name']}: one sequence of {result['tokens']:,} tokens on {peaks}"


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
            BRANCH_NAMES.get(kernel["branch"], kernel["branch"]),
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
    return [Text("\n".join(f"- {line}" for line in lines))] if lines else []


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
        rows=[(BRANCH_NAMES.get(branch, branch), *_sums(kernels)) for branch, kernels in groups.items()],
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
    rows = [
        (
            row["quantity"],
            row["measure"],
            _scientific(row["error"]),
            _scientific(row["bound"]),
            f"{100 * _usage(row):.0f}%" if math.isfinite(_usage(row)) else "-",
            row["case"],
            "ok" if row["ok"] else "fails",
        )
        for row in worst.values()
    ]
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
    lines = failed + [f"left out: {what}" for what in left_out] + list(result["notes"])
    if lines:
        blocks.append(Text("\n".join(f"- {line}" for line in lines)))
    return blocks


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
    for size, prefix in (
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1.0, ""),
        (1e-3, "m"),
        (1e-6, "µ"),
    ):
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)} {prefix}{unit}"
    return f"{_three_digits(value / 1e-9)} n{unit}" if value else f"0 {unit}"


def _three_digits(value: float) -> str:
    """Three significant digits without an exponent: 1.26, 12.6, 126, 1260."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def _cost(kernel: Json) -> tuple[str, str, str]:
    return si(kernel["flops"], "FLOP"), si(kernel["bytes"], "B"), si(kernel["seconds_floor"], "s")
