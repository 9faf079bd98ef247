"""`nsa-gen explain`: which kernels a spec becomes, what each computes, and the least time it can take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsa_gen.cli.common import JsonOption, SpecArgument, print_json, read_spec, show

if TYPE_CHECKING:
    from nsa_gen.lowering import KernelEstimate


def require_gpu(key: str) -> str:
    """Refuse a GPU that the hardware table does not know."""
    from nsa_gen.hardware import UnknownGpuError, gpu

    try:
        return gpu(key).key
    except UnknownGpuError as error:
        raise typer.BadParameter(str(error)) from None


def explain(
    spec: SpecArgument,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the one sequence the costs are for.")] = 65536,
    gpu: Annotated[str, typer.Option(callback=require_gpu, help="GPU whose peaks give the floor.")] = "h100",
    formulas: Annotated[bool, typer.Option("--formulas", help="Show the formulas of FLOPs and bytes as well.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a spec's kernels and their costs.

    Schedules, FLOPs, bytes, and the floor: the time that arithmetic or traffic takes at the GPU's peak, a lower bound.

    \b
    Example:
      nsa-gen explain llama3_8b --tokens 65536 --gpu h100
    """
    loaded = read_spec(spec, as_json=as_json)
    from nsa_gen.lowering import explain as estimate
    from nsa_gen.lowering import lower

    estimates = estimate(lower(loaded), tokens=tokens, gpu_key=gpu)
    rows = [as_row(one, formulas=formulas) for one in estimates]
    result = {"ok": True, "name": loaded.name, "tokens": tokens, "gpu": gpu, "kernels": rows}
    if as_json:
        print_json(result)
        return
    from nsa_gen.cli.tables import explain_table

    show(explain_table(result))
    for row in rows if formulas else ():
        print(f"{row['kernel']}\n  FLOPs = {row['flops_formula']}\n  bytes = {row['bytes_formula']}\n")


def as_row(one: KernelEstimate, *, formulas: bool) -> dict[str, Any]:
    """One kernel's estimate for `--json`: FLOPs and bytes of one launch, the floor in seconds."""
    row = {
        "kernel": one.kernel,
        "branch": one.branch,
        "direction": one.direction,
        "purpose": one.purpose,
        "schedule": one.schedule,
        "flops": one.flops,
        "bytes": one.bytes,
        "seconds_floor": one.seconds_floor,
        "limited_by": one.limited_by,
        "config": one.config,
    }
    if formulas:
        row |= {"flops_formula": one.flops_formula, "bytes_formula": one.bytes_formula}
    return row
