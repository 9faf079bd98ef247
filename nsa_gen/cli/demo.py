"""`nsa-gen demo`: the other commands in a row on one spec, each shown as it could be typed, and a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsa_gen.cli import ANSWER_IS_NO
from nsa_gen.cli.common import (
    JsonOption,
    SpecArgument,
    command_line,
    note,
    print_json,
    read_spec,
    require_folder,
    show,
    stop,
)
from nsa_gen.cli.compile import require_targets
from nsa_gen.hardware import TABLES

if TYPE_CHECKING:
    from nsa_gen.cli.blocks import Block

TARGETS = ("sm_90", "gfx942")
"""Architectures that it compiles for unless it is told: one of each vendor."""
GPU_LENGTHS = "65,97,8192"
DENSE, DENSE_LENGTHS = "cudnn,fa2,efficient", "8192,65536"


@dataclass(frozen=True)
class Step:
    """One command of the demo and what came of it.

    Attributes:
        command: what follows `nsa-gen`, as one would type it.
        result: the command's `--json` result.
        ok: whether its answer was yes.
        seconds: how long it took, start of Python included.
    """

    command: tuple[str, ...]
    result: dict[str, Any]
    ok: bool
    seconds: float


def demo(
    spec: SpecArgument = "llama3_8b",
    out_dir: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", callback=require_folder, help="Folder for the package and the report."
        ),
    ] = Path("build/demo"),
    target: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[,NAME]",
            callback=lambda values: require_targets(values) if values else [],
            help="Architectures to compile for.",
            show_default=", ".join(TARGETS),
        ),
    ] = [],  # noqa: B006  typer copies it
    full: Annotated[
        bool, typer.Option("--full", help="Every architecture, every call and the whole verification: many minutes.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check, generate, explain, compile and verify one spec.

    With a GPU it is timed too.

    Writes DIR/<name> (the package) and DIR/report.md. Without a GPU the kernels run under Triton's interpreter, in a
    few small calls: some three minutes in all on two cores.

    \b
    Example:
      nsa-gen demo llama3_8b -o build/demo
    """
    read_spec(spec, as_json=as_json)
    from nsa_gen._files import write_whole
    from nsa_gen.cli import demo_report as report
    from nsa_gen.cli.blocks import to_markdown

    started = time.monotonic()
    machine = _run("env").result
    gpus = machine["gpus"]
    steps: dict[str, Step] = {}
    blocks = [*report.opening(spec, machine)]

    def present(new: Sequence[Block]) -> None:
        blocks.extend(new)
        if not as_json:
            show(*new)

    if not as_json:
        show(*blocks)
    steps["check"] = _run("check", spec)
    steps["generate"] = _run("generate", spec, "-o", str(out_dir))
    if not steps["generate"].ok:  # the command has said why
        raise typer.Exit(ANSWER_IS_NO)
    package = Path(steps["generate"].result["packages"][0]["path"])
    present(report.generated(steps["check"], steps["generate"], package))
    steps["explain"] = _run("explain", spec, "--tokens", "65536", "--gpu", "h100")
    present(report.explained(steps["explain"]))
    if gpus:
        note(f"verifying on the GPU, lengths {GPU_LENGTHS}")
        steps["verify"] = _run("verify", spec, "--device", "cuda", "--length", GPU_LENGTHS)
        present(report.verified(steps["verify"]))
        note("timing beside dense causal attention")
        steps["bench"] = _run("bench", spec, "--against", DENSE, "--tokens", DENSE_LENGTHS)
        present(report.timed(steps["bench"], gpus[0]["name"]))
    else:
        note(f"verifying on the CPU: {'some ten minutes' if full else 'about a minute'}")
        steps["verify"] = _run("verify", spec, "--device", "cpu", *([] if full else ["--quick"]))
        present(report.verified(steps["verify"]))
    targets = target or (TABLES if full else TARGETS)
    note(f"compiling every kernel for {', '.join(targets)}: a minute or so each")
    calls = [] if full else ["--calls", "batched"]
    steps["compile"] = _run("compile", spec, "--target", ",".join(targets), *calls)
    present(report.compiled(steps["compile"]))
    present(report.closing(package, out_dir / "report.md", steps.values(), time.monotonic() - started))
    write_whole(out_dir / "report.md", to_markdown(blocks))
    ok = all(step.ok for step in steps.values())
    if as_json:
        results = {
            name: {"ok": step.ok, "seconds": step.seconds, "result": step.result} for name, step in steps.items()
        }
        print_json({"ok": ok, "report": str(out_dir / "report.md"), "steps": results})
    stop(ok)


def _run(*command: str) -> Step:
    """Run one command of nsa-gen in a process of its own (triton is either a compiler or an interpreter in a process).

    Its progress goes to our stderr. A command that could not answer at all ends the demo with the command's exit code.
    """
    started = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "nsa_gen", *command, "--json"], stdout=subprocess.PIPE, text=True, env=environment
    )
    seconds = time.monotonic() - started
    if done.returncode not in (0, ANSWER_IS_NO) or not done.stdout.strip():
        note(f"nsa-gen: the demo stops: {command_line(command)} ended with exit code {done.returncode}")
        raise typer.Exit(done.returncode or ANSWER_IS_NO)
    return Step(command, json.loads(done.stdout), done.returncode == 0, seconds)
