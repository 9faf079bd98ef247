"""The demo's report: what each step's result means, in blocks for the terminal and for Markdown."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_gen.cli.blocks import Block, Code, Heading, Table, Text
from nsa_gen.cli.common import command_line
from nsa_gen.cli.tables import branch_table, compile_matrix, explain_blocks, failures, verify_blocks

if TYPE_CHECKING:
    from nsa_gen.cli.demo import Step


def opening(spec: str, machine: Mapping[str, Any]) -> list[Block]:
    """What is about to be shown, and on which machine."""
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU: kernels run under Triton's interpreter"
    return [
        Heading(f"From a spec to a verified operator: {spec}", level=1),
        Text(
            f"nsa_gen {machine['nsa_gen']}, torch {machine['torch']}, triton {machine['triton']}, "
            f"Python {machine['python'].split()[0]}, {machine['cpu_cores']} cores; {gpus}."
        ),
    ]


def generated(check: Step, generate: Step, package: Path) -> list[Block]:
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


def explained(step: Step) -> list[Block]:
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


def compiled(step: Step) -> list[Block]:
    """Which kernels compile for which GPUs and fit on them."""
    result = step.result["specs"][0]
    blocks: list[Block] = [
        Heading("Compiled for GPUs that need not be here"),
        _commands(step),
        compile_matrix(result),
    ]
    refused = failures(result)
    if refused:
        blocks.append(Text("What does not work, and why:\n\n" + "\n".join(f"- {line}" for line in refused)))
    return blocks


def verified(step: Step) -> list[Block]:
    """How far the results are from the dense reference."""
    device = "the GPU" if "cuda" in step.command else "the CPU, under Triton's interpreter"
    return [Heading(f"Verified on {device}"), _commands(step), *verify_blocks(step.result)]


def timed(step: Step, gpu: str) -> list[Block]:
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


def closing(package: Path, report: Path, steps: Iterable[Step], seconds: float) -> list[Block]:
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
