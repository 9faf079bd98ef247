"""`nsa-gen compile`: does every kernel of a spec compile for these GPUs and fit on them? No GPU is needed."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

from nsa_gen.cli.common import (
    MOST_JOBS,
    JsonOption,
    SpecsArgument,
    noted_warnings,
    output_console,
    print_json,
    progress_bar,
    read_specs,
    require_some,
    split_list,
    stop,
    whole,
)
from nsa_gen.hardware import TABLES, TARGETS


def require_targets(values: list[str]) -> list[str]:
    """Split `sm_90,gfx942`, refuse unknown names; the targets with tables of their own when none is given."""
    from nsa_gen.hardware import UnknownGpuError, gpu_for_target

    try:
        named = dict.fromkeys(gpu_for_target(name).target for name in split_list(values))
    except UnknownGpuError as error:
        raise typer.BadParameter(str(error)) from None
    return list(named or TABLES)


class Call(StrEnum):
    """Calls that launch kernels of their own, as `nsa_gen.targets.VARIANTS` names them."""

    batched = "batched"
    packed = "packed"


def require_calls(values: list[str]) -> list[str]:
    """Split `batched,packed`, refuse what is no call; both when none is given."""
    return require_some(Call, values) or list(Call)


TargetOption = Annotated[
    list[str],
    typer.Option(
        metavar="NAME[,NAME]",
        callback=require_targets,
        help=f"Architectures: {', '.join(TARGETS)}; when left out, those with configurations of their own: "
        f"{', '.join(TABLES)}.",
        show_default=False,
    ),
]


def compile_(
    specs: SpecsArgument,
    target: TargetOption = [],  # noqa: B006  typer copies it
    calls: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[,NAME]",
            callback=require_calls,
            help=f"Calls whose launches are compiled: {', '.join(Call)}.",
            show_default="both",
        ),
    ] = [],  # noqa: B006  typer copies it
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            metavar="N",
            parser=whole(1, MOST_JOBS),
            help="Kernels compiled at the same time.",
            show_default="number of cores",
        ),
    ] = os.cpu_count() or 1,
    as_json: JsonOption = False,
) -> None:
    """Compile kernels for GPUs that are not here.

    Shows registers, spills, shared memory and time of every kernel on every target. Exits 1 when one does not
    compile or does not fit.

    \b
    Example:
      nsa-gen compile llama3_8b --target sm_90,gfx942
    """
    loaded = read_specs(specs, as_json=as_json)
    # Triton's interpreter would replace the compiler; whatever the caller's shell says, this command compiles.
    os.environ.pop("TRITON_INTERPRET", None)
    from nsa_gen.targets import compile_spec, print_report

    reports = []
    for spec in loaded:
        with noted_warnings(), progress_bar(f"compiling {spec.name}") as progress:
            report = compile_spec(spec, target, jobs=jobs, progress=progress, variants=calls)
        reports.append(report)
        if not as_json:
            print_report(report, output_console())
    ok = all(report.ok for report in reports)
    if as_json:
        print_json({"ok": ok, "specs": [report.to_json() for report in reports]})
    stop(ok)
