"""`nsa-gen demo`: the other commands in a row on one spec, each shown as it could be typed, and a report."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from nsa_gen.cli import ANSWER_IS_NO
from nsa_gen.cli.blocks import Block, Code, Heading, Table, Text, bullets, show, to_markdown
from nsa_gen.cli.common import (
    JsonOption,
    SpecArgument,
    command_line,
    names_option,
    note,
    output_option,
    print_json,
    read_spec,
    require_folder,
    stop,
)
from nsa_gen.cli.compile import require_targets
from nsa_gen.cli.tables import branch_table, compile_matrix, explain_blocks, failures, verify_blocks
from nsa_gen.hardware import TABLES

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
    out_dir: Annotated[Path, output_option("Folder for the package and the report.", require_folder)] = Path(
        "build/demo"
    ),
    target: Annotated[
        list[str], names_option("Architectures to compile for.", require_targets, ", ".join(TARGETS))
    ] = [],
    full: Annotated[
        bool,
        typer.Option("--full", help="Compile for all architectures and calls, and verify completely: many minutes."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check, generate, explain, compile and verify one spec.

    With a GPU, the operator is timed too.

    Writes DIR/<name> (the package) and DIR/report.md. Without a GPU, a few small calls run under Triton's interpreter;
    the demo then takes some three minutes on two cores.

    \b
    Example:
      nsa-gen demo llama3_8b -o build/demo
    """
    read_spec(spec, as_json=as_json)
    from nsa_gen._files import write_whole

    started = time.monotonic()
    machine = _run("env").result
    gpus = machine["gpus"]
    steps: dict[str, Step] = {}
    blocks = _opening(spec, machine)

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
    present(_generated(steps["check"], steps["generate"], package))
    steps["explain"] = _run("explain", spec, "--tokens", "65536", "--gpu", "h100")
    present(_explained(steps["explain"]))
    if gpus:
        note(f"verifying on the GPU, lengths {GPU_LENGTHS}")
        steps["verify"] = _run("verify", spec, "--device", "cuda", "--length", GPU_LENGTHS)
        present(_verified(steps["verify"]))
        note("timing beside dense causal attention")
        steps["bench"] = _run("bench", spec, "--against", DENSE, "--tokens", DENSE_LENGTHS)
        present(_timed(steps["bench"], gpus[0]["name"]))
    else:
        note(f"verifying on the CPU: {'some ten minutes' if full else 'about a minute'}")
        steps["verify"] = _run("verify", spec, "--device", "cpu", *([] if full else ["--quick"]))
        present(_verified(steps["verify"]))
    targets = target or (TABLES if full else TARGETS)
    note(f"compiling every kernel for {', '.join(targets)}: a minute or so each")
    calls = [] if full else ["--calls", "batched"]
    steps["compile"] = _run("compile", spec, "--target", ",".join(targets), *calls)
    present(_compiled(steps["compile"]))
    present(_closing(package, out_dir / "report.md", steps.values(), time.monotonic() - started))
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


# What each step's result means, for the terminal and for the report


def _opening(spec: str, machine: Mapping[str, Any]) -> list[Block]:
    """What is about to be shown, and on which machine."""
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU: kernels run under Triton's interpreter"
    return [
        Heading(f"From a spec to a verified operator: {spec}", level=1),
        Text(
            f"nsa_gen {machine['nsa_gen']}, torch {machine['torch']}, triton {machine['triton']}, "
            f"Python {machine['python'].split()[0]}, {machine['cpu_cores']} cores; {gpus}."
        ),
    ]


def _generated(check: Step, generate: Step, package: Path) -> list[Block]:
    """The spec and the package made from it: every file with what its docstring says it holds."""
    rows = []
    for file in sorted(package.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            text = file.read_text(encoding="utf-8")
            counts = str(text.count("\n")), str(text.count("\n@triton.jit"))
            rows.append((str(file.relative_to(package)), *counts, _summary(file, text)))
    lines = sum(int(row[1]) for row in rows)
    kernels = sum(int(row[2]) for row in rows)
    return [
        Heading("The spec and the package"),
        _commands(check, generate),
        Text(
            f"The spec is valid. Its package, {package}, needs torch and triton, nothing of nsa_gen. The spec in full:"
        ),
        Code(_without_comments((package / "spec.yaml").read_text(encoding="utf-8")), "yaml"),
        Table(
            columns=("file", ">lines", ">Triton functions", "what it holds"),
            rows=rows,
            footer=("sum", str(lines), str(kernels), ""),
        ),
    ]


def _explained(step: Step) -> list[Block]:
    """What each branch computes and the least it can cost."""
    result = step.result
    return [
        Heading("What it computes, and the least that can cost"),
        _commands(step),
        Text(
            "The floor is the time the arithmetic or the traffic of a kernel takes at the device's peak, whichever is "
            "more: a lower bound from a formula. The prediction is the cost model's time of the schedule and tiles "
            "chosen, scaled by measurements on an H100. Neither is a measurement on this machine."
        ),
        branch_table(result),
        *explain_blocks(result),
    ]


def _compiled(step: Step) -> list[Block]:
    """Which kernels compile for which GPUs and fit on them."""
    result = step.result["specs"][0]
    title = Heading("Compiled for GPUs that need not be here")
    return [title, _commands(step), compile_matrix(result), *bullets(failures(result), "What does not work, and why")]


def _verified(step: Step) -> list[Block]:
    """How far the results are from the dense reference."""
    device = "the GPU" if "cuda" in step.command else "the CPU, under Triton's interpreter"
    return [Heading(f"Verified on {device}"), _commands(step), *verify_blocks(step.result)]


def _timed(step: Step, gpu: str) -> list[Block]:
    """Milliseconds beside dense causal attention."""
    from nsa_gen.bench.records import Results
    from nsa_gen.cli.bench_report import report_blocks

    return [
        Heading(f"Beside dense causal attention on {gpu}"),
        _commands(step),
        Text(
            "Dense is torch's scaled_dot_product_attention with the same heads; it computes another function. Tile "
            "sizes are the cost model's choice unless the operator was tuned on this machine."
        ),
        *report_blocks(Results.from_document(step.result)),
    ]


def _closing(package: Path, report: Path, steps: Iterable[Step], seconds: float) -> list[Block]:
    """The outcome of every step, and what to do next."""
    rows = [(command_line(step.command), "ok" if step.ok else "fails", f"{step.seconds:.1f} s") for step in steps]
    return [
        Heading("Outcome"),
        Table(("command", "result", ">time"), rows, footer=("all", "", f"{seconds:.0f} s")),
        Heading("Next"),
        Code(
            f'import nsa_gen\n\nop = nsa_gen.load("{package.name}")\n'
            "o = op.nsa_attention(q, k, v, gates)  # on a GPU; shapes in the docstring",
            "python",
        ),
        Text(
            f"Read the kernels in {package}; the report is {report}. `nsa-gen demo --full` compiles for every "
            "architecture and verifies every schedule. Write a spec of your own, starting from this one:"
        ),
        Code(f"cp {package / 'spec.yaml'} my_operator.yaml   # change its name\nnsa-gen check my_operator.yaml"),
    ]


def _summary(file: Path, text: str) -> str:
    """The first line of a module's docstring; empty for other files."""
    if file.suffix != ".py":
        return ""
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def _commands(*steps: Step) -> Code:
    return Code("\n".join(command_line(step.command) for step in steps))


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
