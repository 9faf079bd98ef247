"""The application: every command under one name, with help that is plain text and quick to print."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

from nsa_gen import __version__
from nsa_gen.cli import BROKEN_PIPE
from nsa_gen.cli.bench import bench
from nsa_gen.cli.cache import cache
from nsa_gen.cli.check import check
from nsa_gen.cli.compile import compile_
from nsa_gen.cli.demo import demo
from nsa_gen.cli.doctor import doctor
from nsa_gen.cli.env import env
from nsa_gen.cli.explain import explain
from nsa_gen.cli.export import export
from nsa_gen.cli.generate import generate
from nsa_gen.cli.new import new
from nsa_gen.cli.report import report
from nsa_gen.cli.tune import tune
from nsa_gen.cli.verify import verify


class _Commands(TyperGroup):
    """A group that lists its commands in the order of use and lets a broken pipe reach `nsa_gen.cli.main`."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(self.commands)

    # typer would answer a broken pipe with exit code 1, which here means "the answer is no".

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        try:
            return super().parse_args(ctx, args)
        except BrokenPipeError:
            raise typer.Exit(BROKEN_PIPE) from None

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(BROKEN_PIPE) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nsa-gen {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile a YAML spec of native sparse attention into a readable, verified Triton package.

    SPEC is the path of a spec, or the name of one that nsa-gen ships (llama3_8b, tiny, ...).

    \b
    Example:
      nsa-gen generate llama3_8b -o generated
      nsa-gen verify llama3_8b
    """


for _name, _command in (
    ("new", new),
    ("check", check),
    ("generate", generate),
    ("explain", explain),
    ("compile", compile_),
    ("verify", verify),
    ("tune", tune),
    ("bench", bench),
    ("report", report),
    ("demo", demo),
    ("doctor", doctor),
    ("env", env),
):
    app.command(_name)(_command)
app.add_typer(cache, name="cache")
app.add_typer(export, name="export")
