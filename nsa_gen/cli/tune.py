"""`nsa-gen tune`: the quickest configurations of a spec's kernels on the GPU at hand."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsa_gen.cli.common import (
    CORES,
    PASSES,
    BudgetOption,
    JobsOption,
    JsonOption,
    SeedOption,
    SpecArgument,
    lengths_option,
    names_option,
    note,
    noted_warnings,
    print_json,
    read_spec,
    refuse,
    require_folder,
    require_gpu_name,
    require_output,
    require_pass,
    some_of,
    stop,
)

if TYPE_CHECKING:
    from nsa_gen.spec import Spec
    from nsa_gen.tuning import Tools, TuneReport


class EffortName(StrEnum):
    """How much is tried."""

    quick = "quick"
    default = "default"
    thorough = "thorough"


def _require_out(path: Path | None) -> Path | None:
    """Refuse, before hours of work, what the result cannot be saved in."""
    return require_output(path) if path is not None and path.suffix == ".json" else require_folder(path)


def _require_passes(values: list[str]) -> list[str]:
    """Refuse what is no pass; in the order in which they are tuned."""
    return sorted(some_of(PASSES)(values), key=PASSES.index)


PASSES_HELP = "Passes to tune; decode is tuned only if it is named."


def tune(
    spec: SpecArgument,
    shapes: Annotated[
        list[str], lengths_option("Numbers of key tokens, rounded up to powers of two.", "8192,65536")
    ] = [],
    batch: Annotated[list[str], lengths_option("Numbers of sequences in a call.", "1")] = [],
    packed: Annotated[
        bool, typer.Option("--packed", help="Tune calls of packed sequences, N tokens in total.")
    ] = False,
    passes: Annotated[list[str], names_option(PASSES_HELP, _require_passes, "the spec's without decode")] = [],
    effort: Annotated[EffortName, typer.Option(help="How many candidates to try, and how long to time them.")] = (
        EffortName.default
    ),
    budget: BudgetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            callback=_require_out,
            help="Where to save: a package's tuned folder, or a file.",
            show_default="the user's cache",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compile and rank candidates; needs no GPU.")] = False,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", callback=require_gpu_name, help="With --dry-run: the GPU to compile for.")
    ] = "h100",
    jobs: JobsOption = CORES,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find the fastest configurations on this machine's GPUs.

    Candidates for tile sizes, warps, stages and schedules are compiled ahead of time, compared with the dense
    reference, and then timed in alternation with the default, in separate processes. The result is saved where the
    operator finds it. Every step is written to a journal at once, so --resume can continue an interrupted run. Exits 1
    if a bucket could not be tuned or saved, or if a candidate was wrong.

    \b
    Example:
      nsa-gen tune llama3_8b --budget 5m
      nsa-gen tune llama3_8b --shapes 8192,65536 --out generated/llama3_8b/tuned
      nsa-gen tune llama3_8b --passes decode --shapes 65536 --batch 1,32
      nsa-gen tune llama3_8b --dry-run --gpu h100
    """
    loaded = read_spec(spec, as_json=as_json)
    require_pass(loaded, passes)
    # Triton's interpreter would replace the compiler; whatever the caller's shell says, this command compiles.
    os.environ.pop("TRITON_INTERPRET", None)
    settings: dict[str, Any] = {"packed": packed, "effort": effort.value, "budget": budget, "resume": resume}
    settings |= {"out": out, "jobs": jobs, "seed": seed, "passes": tuple(passes) or None}
    settings |= {name: tuple(values) for name, values in (("shapes", shapes), ("batch", batch)) if values}
    with noted_warnings():
        report = _run(loaded, settings, gpu if dry_run else None)
    if as_json:
        print_json(report.to_json())
    else:
        from nsa_gen.cli.blocks import show
        from nsa_gen.cli.tables import tuning_blocks

        show(*tuning_blocks(report))
    stop(report.ok)


def _run(spec: Spec, settings: dict[str, Any], dry_gpu: str | None) -> TuneReport:
    from nsa_gen.cli.blocks import progress_bar
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
        refuse(str(error))
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
