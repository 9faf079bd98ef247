"""The commands' JSON results as tables; the commands and the demo's report show the same ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nsa_gen.cli.blocks import Block, Table, Text

Json = Mapping[str, Any]

BRANCH_NAMES = {"cmp": "compression", "slc": "selection", "win": "window", "all": "every branch"}


def explain_table(result: Json) -> Table:
    """What `explain --json` says: a row a kernel, and the sum."""
    from nsa_gen.hardware import gpu

    facts = gpu(result["gpu"])
    kernels = result["kernels"]
    rows = [
        (
            kernel["kernel"],
            BRANCH_NAMES.get(kernel["branch"], kernel["branch"]),
            kernel["purpose"],
            kernel["schedule"],
            *_cost(kernel),
            kernel["limited_by"],
        )
        for kernel in kernels
    ]
    total = {field: sum(kernel[field] for kernel in kernels) for field in ("flops", "bytes", "seconds_floor")}
    return Table(
        columns=("kernel", "branch", "purpose", "schedule", ">FLOPs", ">bytes", ">floor", "limited by"),
        rows=rows,
        footer=("sum", "", "", "", *_cost(total), ""),
        title=f"{result['name']}: one sequence of {result['tokens']:,} tokens on {facts.name} "
        f"({facts.bf16_tflops:.0f} TFLOP/s, {facts.bandwidth_tbs:g} TB/s)",
    )


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
    lines = failed + list(result["notes"])
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
