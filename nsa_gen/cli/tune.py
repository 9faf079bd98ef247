"""`nsa-gen tune`: the quickest configurations of a spec's kernels on the GPU at hand."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsa_gen.cli.common import (
    MOST_JOBS,
    MOST_SEED,
    JsonOption,
    SpecArgument,
    note,
    noted_warnings,
    print_json,
    progress_bar,
    read_spec,
    require_folder,
    require_lengths,
    require_output,
    seconds,
    shortened,
    show,
    split_list,
    stop,
    whole,
)

if TYPE_CHECKING:
    from nsa_gen.spec import Spec
    from nsa_gen.tuning import Tools, TuneReport


class EffortName(StrEnum):
    """How much is tried."""

    quick = "quick"
    default = "default"
    thorough = "thorough"


def require_tuned_passes(values: list[str]) -> list[str]:
    """Split `forward,backward,decode`, and refuse what is no pass; in the order in which they are tuned."""
    known = ("forward", "backward", "decode")
    named = split_list(values)
    for name in named:
        if name not in known:
            raise typer.BadParameter(f"expected some of {', '.join(known)}, got {shortened(name)!r}")
    return [name for name in known if name in named]


def require_out(path: Path | None) -> Path | None:
    """Refuse, before hours of work, what the result cannot be saved in."""
    return require_output(path) if path is not None and path.suffix == ".json" else require_folder(path)


def _require_gpu_name(name: str) -> str:
    """Refuse a GPU that the hardware table does not know."""
    from nsa_gen.hardware import UnknownGpuError, find_gpu

    try:
        find_gpu(name)
    except UnknownGpuError as error:
        raise typer.BadParameter(str(error)) from None
    return name


def tune(
    spec: SpecArgument,
    shapes: Annotated[
        list[str],
        typer.Option(
            metavar="N[,N]",
            callback=require_lengths,
            help="Key tokens of the calls, rounded up to powers of two.",
            show_default="8192,65536",
        ),
    ] = [],  # noqa: B006  typer copies it
    batch: Annotated[
        list[str],
        typer.Option(metavar="N[,N]", callback=require_lengths, help="Sequences of a call.", show_default="1"),
    ] = [],  # noqa: B006
    packed: Annotated[bool, typer.Option("--packed", help="Calls of packed sequences, N tokens in all.")] = False,
    passes: Annotated[
        list[str],
        typer.Option(
            metavar="NAMES",
            callback=require_tuned_passes,
            help="Passes to tune; decode is tuned where it is named.",
            show_default="the spec's without decode",
        ),
    ] = [],  # noqa: B006
    effort: Annotated[EffortName, typer.Option(help="How many candidates, and how long they are timed.")] = (
        EffortName.default
    ),
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="TIME", parser=seconds, help="Begin no further kernel after 90s, 5m, 1h.", show_default="no limit"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            callback=require_out,
            help="A package's tuned folder, or a file.",
            show_default="the user's cache",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compile and rank candidates; needs no GPU.")] = False,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", callback=_require_gpu_name, help="With --dry-run: the GPU to compile for.")
    ] = "h100",
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            metavar="N",
            parser=whole(1, MOST_JOBS),
            help="Compiling processes.",
            show_default="number of cores",
        ),
    ] = os.cpu_count() or 1,
    seed: Annotated[int, typer.Option(metavar="N", parser=whole(0, MOST_SEED), help="Seed of the random inputs.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Find the quickest configurations on this machine's GPUs.

    Tile sizes, warps, stages and schedules: candidates are compiled ahead of time, checked against the dense reference,
    then timed in turn with the default, in processes that may die. The result is saved for the operator to find. Every
    step is in a journal at once: an interrupted run goes on with --resume. Exits 1 when a bucket could not be tuned or
    saved, or a candidate was wrong.

    \b
    Example:
      nsa-gen tune llama3_8b --budget 5m
      nsa-gen tune llama3_8b --shapes 8192,65536 --out generated/llama3_8b/tuned
      nsa-gen tune llama3_8b --passes decode --shapes 65536 --batch 1,32
      nsa-gen tune llama3_8b --dry-run --gpu h100
    """
    loaded = read_spec(spec, as_json=as_json)
    if missing := [name for name in passes if name not in loaded.passes]:
        raise typer.BadParameter(f"--passes: the spec has no {missing[0]} pass; it has {', '.join(loaded.passes)}")
    # Triton's interpreter would replace the compiler; whatever the caller's shell says, this command compiles.
    os.environ.pop("TRITON_INTERPRET", None)
    settings: dict[str, Any] = {
        "shapes": tuple(shapes) or (8192, 65536),
        "batch": tuple(batch) or 1,
        "packed": packed,
        "passes": tuple(passes) or None,
        "effort": effort.value,
        "budget": budget,
        "resume": resume,
        "out": out,
        "jobs": jobs,
        "seed": seed,
    }
    with noted_warnings():
        report = _run(loaded, settings, gpu if dry_run else None)
    if as_json:
        print_json(report.to_json())
    else:
        from nsa_gen.cli.tune_report import report_blocks

        show(*report_blocks(report))
    stop(report.ok)


def _run(spec: Spec, settings: dict[str, Any], dry_gpu: str | None) -> TuneReport:
    from nsa_gen.hardware import UnknownGpuError
    from nsa_gen.tuning import BackendLost
    from nsa_gen.tuning import dry_run as rehearse
    from nsa_gen.tuning import tune as search

    try:
        with progress_bar(f"tuning {spec.name}") as progress:
            tools = _tools()
            tools.say, tools.show = note, progress
            if dry_gpu is not None:
                return rehearse(spec, dry_gpu, tools=tools, **settings)
            _require_gpu()
            return search(spec, tools=tools, **settings)
    except BackendLost as error:
        note(f"nsa-gen: {error}")
        raise typer.Exit(1) from None
    except (UnknownGpuError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


def _tools() -> Tools:
    """What the tuning works with; tests put others in their place."""
    from nsa_gen.tuning import Tools

    return Tools()


def _require_gpu() -> None:
    """Refuse to tune where torch sees no GPU, in a process of its own so that this one stays without a driver.

    Where there is a GPU's device file nobody is asked: if torch does not see it, the measuring process will say so.
    """
    import subprocess

    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists():
        return

    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", program], check=False, capture_output=True).returncode:
        note(
            "nsa-gen: tune measures on a GPU, and torch sees none here (see nsa-gen env). What would be tried on one: "
            "--dry-run --gpu h100"
        )
        raise typer.Exit(2)
