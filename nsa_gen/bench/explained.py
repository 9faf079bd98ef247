"""The plot of `nsa-gen explain --plot`: predicted time and bytes by step, and the kernels under a GPU's roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsa_gen._files import replacing
from nsa_gen.bench.drawing import draw_bars, draw_roofline, look, pyplot
from nsa_gen.hardware import Gpu
from nsa_gen.lowering.plan import Plan

FORMATS = ("png", "svg", "pdf")
DIRECTIONS = ("forward", "backward")
OTHER = "other"
"""Kernels that belong to no step, such as those that pad packed batches."""


def by_step(plan: Plan, kernels: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """The rows of `explain` for one forward and backward, as step -> direction -> rows, steps in the forward's order.

    Rows of decode are left out, because they are not part of such a call.
    """
    owner = {
        kernel: step.name.replace("_", " ")
        for step in reversed(plan.steps)
        for schedule in step.schedules
        for kernel in schedule.kernels
    }
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {
        name: {} for name in (*(step.name.replace("_", " ") for step in plan.steps), OTHER)
    }
    for row in kernels:
        if row["direction"] in DIRECTIONS:
            found[owner.get(row["kernel"], OTHER)].setdefault(row["direction"], []).append(row)
    return {name: rows for name, rows in found.items() if rows}


def plot_explanation(plan: Plan, result: Mapping[str, Any], device: Gpu, path: Path) -> None:
    """Draw the result of `explain`: time by step, bytes by step, roofline. PNG, SVG or PDF, by the path's suffix.

    Args:
        plan: the lowered spec.
        result: the output of `nsa-gen explain --json`; times in seconds.
        device: the GPU of the predictions.
        path: the file to write.

    Raises:
        drawing.MatplotlibMissing: matplotlib is not installed.
        ValueError: the suffix is none of .png, .svg and .pdf.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join('.' + each for each in FORMATS)}")
    steps = by_step(plan, result["kernels"])
    figure, (times, traffic, roof) = pyplot().subplots(
        1, 3, figsize=(14, 1.2 + 0.42 * max(6, len(steps))), layout="constrained"
    )
    looks = {name: look(number) for number, name in enumerate(DIRECTIONS)}
    for ax, field, factor, unit, title in (
        (times, "seconds_predicted", 1e3, "ms", "predicted time by step"),
        (traffic, "bytes", 1e-9, "GB", "bytes that must be moved, by step"),
    ):
        bars = [
            (name, [(each, factor * sum(row[field] for row in rows.get(each, ())), looks[each]) for each in DIRECTIONS])
            for name, rows in steps.items()
        ]
        draw_bars(ax, bars, unit)
        total = sum(amount for _, parts in bars for _, amount, _ in parts)
        ax.set_title(f"{title}: {total:.4g} {unit}", fontsize=10)
    places = {name: look(number) for number, name in enumerate(steps)}
    points = [
        (name, row["flops"] / row["bytes"], row["flops"] / row["seconds_predicted"] / 1e12, places[name])
        for name, rows in steps.items()
        for each in rows.values()
        for row in each
        if row["flops"] and row["seconds_predicted"]
    ]
    draw_roofline(roof, points, peak=device.bf16_tflops, bandwidth=device.bandwidth_tbs)
    roof.set_title(f"useful work under the roof of the {device.name}", fontsize=10)
    for ax, place in ((times, "lower right"), (roof, "upper left")):
        named = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        ax.legend(named.values(), named.keys(), fontsize=8, loc=place, frameon=False)
    figure.suptitle(f"{result['name']}, {result['tokens']:,} tokens, {device.name}: forward and backward")
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else None)
    pyplot().close(figure)
