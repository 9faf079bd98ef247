"""`nsa-gen explain`: which kernels a spec becomes and why, what each must cost, and how long it is expected to take."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsa_gen.cli.common import (
    JsonOption,
    SpecArgument,
    note,
    number_option,
    print_json,
    read_spec,
    refuse,
    require_gpu_name,
    require_output,
    stop,
)

if TYPE_CHECKING:
    from nsa_gen.bench.records import KernelRow
    from nsa_gen.lowering import KernelEstimate, Plan
    from nsa_gen.lowering.prediction import Prediction
    from nsa_gen.spec import Spec

DEFAULT_TOKENS = 65536


def explain(
    spec: SpecArgument,
    tokens: Annotated[int | None, number_option("Length of each sequence.", default=f"{DEFAULT_TOKENS}")] = None,
    batch: Annotated[
        int | None, number_option("Number of sequences in the call, or in a decode step.", default="1")
    ] = None,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", callback=require_gpu_name, help="The GPU to predict for.")
    ] = "h100",
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Results of nsa-gen bench, to show next to the predictions.",
        ),
    ] = None,
    formulas: Annotated[bool, typer.Option("--formulas", help="Show the formulas of FLOPs and bytes as well.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=require_output,
            help="Draw time and bytes by step, and the roofline: .png, .svg or .pdf.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a spec's kernels, why they were chosen, and what they cost.

    The floor is a lower bound: the time that the necessary arithmetic or traffic takes at the GPU's peak. The
    prediction is the cost model's time for the chosen schedule and tiles, scaled by measurements on an H100. With
    --measured, the times of a benchmark are shown next to it.

    \b
    Example:
      nsa-gen explain llama3_8b --tokens 65536 --gpu h100
      nsa-gen explain llama3_8b --tokens 65536 --batch 32
      nsa-gen explain llama3_8b --measured results.json
      nsa-gen explain llama3_8b --tokens 65536 --plot explain.svg
    """
    loaded = read_spec(spec, as_json=as_json)
    if measured is not None and batch not in (None, 1):
        raise typer.BadParameter("--batch: the kernels of a benchmark are of one sequence; leave --measured out")
    times, tokens = ({}, tokens or DEFAULT_TOKENS) if measured is None else _read_times(measured, loaded, tokens)
    from nsa_gen.lowering import lower

    plan = lower(loaded)
    result = explain_result(plan, tokens=tokens, batch=batch or 1, gpu=gpu, times=times, formulas=formulas)
    if plot is not None:
        _plot(plan, result, plot)
    if as_json:
        print_json(result)
        return
    from nsa_gen.cli.blocks import show
    from nsa_gen.cli.tables import explain_blocks

    show(*explain_blocks(result))
    for row in result["kernels"] if formulas else ():
        print(f"{row['kernel']}\n  FLOPs = {row['flops_formula']}\n  bytes = {row['bytes_formula']}\n")


def _plot(plan: Plan, result: dict[str, Any], path: Path) -> None:
    """Write the picture, or say what is missing and end with exit code 1."""
    from nsa_gen.bench.drawing import MatplotlibMissing
    from nsa_gen.bench.explained import plot_explanation
    from nsa_gen.hardware import gpu as known

    try:
        plot_explanation(plan, result, known(result["gpu"]), path)
    except (MatplotlibMissing, ValueError, OSError) as error:
        note(f"nsa-gen: no plot: {error}")
        stop(False)
    note(f"nsa-gen: wrote {path}")


def explain_result(
    program: Plan, *, tokens: int, batch: int, gpu: str, times: dict[str, KernelRow], formulas: bool = False
) -> dict[str, Any]:
    """What `explain --json` prints. `times` are measured kernels by name; those the call does not run come last."""
    from nsa_gen.lowering import explain as estimate
    from nsa_gen.lowering.prediction import alternatives, predict

    predictions = predict(program, tokens=tokens, batch=batch, gpu_key=gpu)
    estimates = estimate(program, tokens=tokens, batch=batch, gpu_key=gpu)
    rows = [_row(one, predictions[one.kernel], times.get(one.kernel), formulas=formulas) for one in estimates]
    return {
        "ok": True,
        "name": program.spec.name,
        "tokens": tokens,
        "batch": batch,
        "gpu": gpu,
        "kernels": rows,
        "choices": [asdict(each) for each in alternatives(program, gpu)],
        "unpredicted": [
            {"kernel": row.kernel, "direction": row.direction, "measured_seconds": row.ms / 1000}
            for name, row in times.items()
            if name not in predictions
        ],
    }


def _row(one: KernelEstimate, prediction: Prediction, time: KernelRow | None, *, formulas: bool) -> dict[str, Any]:
    """One kernel for `--json`: FLOPs and bytes of one call, times in seconds; `error` is predicted over measured."""
    row = asdict(one)
    texts = {name: row.pop(name) for name in ("flops_formula", "bytes_formula")}
    row |= {
        "executed_flops": prediction.flops,
        "traffic": prediction.traffic,
        "legal_configs": prediction.legal,
        "configs": prediction.candidates,
        "seconds_predicted": prediction.seconds,
        "bound_by": prediction.bound_by,
        "calibrated": prediction.calibrated,
    }
    if time is not None:
        row |= {"measured_seconds": time.ms / 1000, "error": 1000 * prediction.seconds / time.ms}
    return row | texts if formulas else row


def _read_times(path: Path, spec: Spec, tokens: int | None) -> tuple[dict[str, KernelRow], int]:
    """The profiled kernels of a spec at a length (the longest, if left open) and that length, or exit code 1."""
    from nsa_gen.bench.records import kernels_of, read_results

    try:
        rows = kernels_of(read_results(path), spec)
    except (OSError, ValueError) as error:
        refuse(f"{path}: {error}")
    lengths = sorted({row.tokens for row in rows})
    wanted = tokens if tokens is not None else max(lengths, default=DEFAULT_TOKENS)
    if wanted not in lengths:
        there = f"profiled are {', '.join(map(str, lengths))} tokens" if lengths else "no kernels of this spec"
        refuse(f"{path}: expected kernels of {spec.name} at {wanted} tokens; {there}")
    return {row.kernel: row for row in rows if row.tokens == wanted}, wanted
