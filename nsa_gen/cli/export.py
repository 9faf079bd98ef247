"""`nsa-gen export`: a package in the layout of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nsa_gen.cli import ANSWER_IS_NO
from nsa_gen.cli.common import (
    JsonOption,
    SpecArgument,
    note,
    number_option,
    output_option,
    print_json,
    read_spec,
    require_folder,
)

export = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Write a package in another tool's layout.\n\n\b\nExample:\n  nsa-gen export hub llama3_8b",
)


@export.callback()
def _export() -> None:
    pass


@export.command("hub")
def hub(
    spec: SpecArgument,
    out_dir: Annotated[Path, output_option("Folder of the repositories.", require_folder)] = Path("hub"),
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Output of verify SPEC --json, for the card.")
    ] = None,
    tuned: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Tuned tables to include; the shipped ones when left out.")
    ] = None,
    version: Annotated[
        int, number_option("Version of the kernel on the hub.", most=10**6, names=("--kernel-version",))
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Write a repository for the Hugging Face kernels library.

    The repository goes into DIR/<name of the spec>. It has one build for every GPU, with tuned tables, and a card.

    \b
    Example:
      nsa-gen export hub llama3_8b -o hub
      nsa-gen export hub llama3_8b --report verified.json --tuned tables
    """
    from nsa_gen.rendering import RefusedOverwriteError
    from nsa_gen.rendering.hub import export_hub

    loaded = read_spec(spec, as_json=as_json)
    try:
        home = export_hub(loaded, out_dir, report=report, tuned=tuned, version=version)
    except (RefusedOverwriteError, OSError, ValueError) as error:
        if as_json:
            print_json({"ok": False, "problem": str(error)})
        note(f"nsa-gen: {error}")
        raise typer.Exit(ANSWER_IS_NO) from None
    if as_json:
        print_json({"ok": True, "name": loaded.name, "digest": loaded.digest(), "path": str(home)})
    else:
        print(home)
