"""`nsa-gen compile`: does every kernel of a spec compile for these GPUs and fit on them? No GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nsa_gen.cli.common import (
    CORES,
    JobsOption,
    JsonOption,
    SpecsArgument,
    names_option,
    noted_warnings,
    print_json,
    read_specs,
    some_of,
    split_list,
    stop,
)
from nsa_gen.hardware import TABLES, TARGETS

CALLS = ("batched", "packed")
"""Calls that launch kernels of their own, as `nsa_gen.targets.VARIANTS` names them."""
ARCHITECTURES = (
    f"Architectures: {', '.join(TARGETS)}; when left out, those with their own configurations: {', '.join(TABLES)}."
)


def require_targets(values: list[str]) -> list[str]:
    """Split `sm_90,gfx942`, and refuse unknown names."""
    from nsa_gen.hardware import UnknownGpuError, gpu_for_target

    try:
        return list(dict.fromkeys(gpu_for_target(name).target for name in split_list(values)))
    except UnknownGpuError as error:
        raise typer.BadParameter(str(error)) from None


def _require_triton(folder: Path | None) -> Path | None:
    """Refuse a folder that has no Triton in it."""
    if folder is not None and not (folder / "triton").is_dir():
        raise typer.BadParameter(f"expected a folder with a triton package in it, got {folder}")
    return folder


def compile_(
    specs: SpecsArgument,
    target: Annotated[list[str], names_option(ARCHITECTURES, require_targets, False)] = [],
    calls: Annotated[
        list[str],
        names_option(f"Calls whose launches are compiled: {', '.join(CALLS)}.", some_of(CALLS), "both"),
    ] = [],
    jobs: JobsOption = CORES,
    triton: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            callback=_require_triton,
            help="Use another Triton, installed with pip install --no-deps --target DIR.",
            show_default="the one installed",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compile kernels ahead of time; needs no GPU.

    Shows registers, spills, shared memory and compile time of every kernel on every target. Exits 1 if one does not
    compile or does not fit.

    \b
    Example:
      nsa-gen compile llama3_8b --target sm_90,gfx942
    """
    loaded = read_specs(specs, as_json=as_json)
    # Triton's interpreter would replace the compiler; whatever the caller's shell says, this command compiles.
    os.environ.pop("TRITON_INTERPRET", None)
    from nsa_gen.cli.blocks import output_console, progress_bar
    from nsa_gen.targets import compile_spec, print_report

    options = {"variants": calls or CALLS, "triton_path": triton}
    reports = []
    for spec in loaded:
        with noted_warnings(), progress_bar(f"compiling {spec.name}") as progress:
            report = compile_spec(spec, target or TABLES, jobs=jobs, progress=progress, **options)
        reports.append(report)
        if not as_json:
            print_report(report, output_console())
    ok = all(report.ok for report in reports)
    if as_json:
        print_json({"ok": ok, "specs": [report.to_json() for report in reports]})
    stop(ok)
