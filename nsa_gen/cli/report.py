"""`nsa-gen report`: results of benchmarks, verifications and tunings as one HTML file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsa_gen.cli.blocks import Block, Heading, Table, Text, bullets
from nsa_gen.cli.common import JsonOption, output_option, print_json, refuse, require_output

if TYPE_CHECKING:
    from nsa_gen.bench.documents import Document, Job
    from nsa_gen.bench.figures import Figure
    from nsa_gen.bench.records import Results

MOST_FAILURES = 20


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS",
            exists=True,
            dir_okay=False,
            help="Files of nsa-gen bench -o, verify --json, cache export, or the project's GPU tools.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, output_option("The page to write.", require_output)] = Path("report.html"),
    title: Annotated[str, typer.Option(metavar="TEXT", help="Heading of the page.")] = "Native sparse attention",
    as_json: JsonOption = False,
) -> None:
    """Write tables and figures of results as one HTML file.

    The page shows speed-ups by length and group size, kernels under the roofline, time by branch, the blocks that a run
    selects, what was verified and what was tuned. It needs no network and no scripts, prints well, and has a light and
    a dark style. If several files have the same benchmark, the last one counts.

    \b
    Example:
      nsa-gen bench llama3_8b -o results.json
      nsa-gen verify llama3_8b --device cuda --json > verified.json
      nsa-gen report results.json verified.json -o report.html
    """
    from nsa_gen._files import write_whole

    try:
        blocks = report_page(files)
        write_whole(output, to_html(title, blocks))
    except (OSError, ValueError) as error:
        refuse(str(error), {"problem": str(error)} if as_json else None)
    if as_json:
        print_json({"ok": True, "path": str(output), "files": [str(path) for path in files]})
    else:
        print(output)


def report_page(paths: Sequence[Path]) -> list[Block | Figure]:
    """The page of some result files.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file holds no results, or the benchmarks are of different GPUs.
    """
    from nsa_gen.bench.documents import read_document
    from nsa_gen.bench.records import merge
    from nsa_gen.cli.bench_report import report_blocks

    documents = [read_document(path) for path in paths]
    blocks: list[Block | Figure] = []
    timed = [document.results for document in documents if document.results is not None]
    if timed:
        results = merge(timed)
        blocks += [Heading("Figures"), *_figures(results), *report_blocks(results)]
    for document in documents:
        blocks += [*_verified(document), *_tuned(document)]
    return [*blocks, *bullets((path.name for path in paths), "Made from")]


def _figures(results: Results) -> list[Block | Figure]:
    """The figures of benchmarks, or how to get them."""
    from nsa_gen.bench.drawing import MatplotlibMissing
    from nsa_gen.bench.figures import figures

    try:
        return list(figures(results))
    except MatplotlibMissing as error:
        return [Text(f"Not drawn: {error}.")]


def _verified(document: Document) -> list[Block]:
    """The checks of one file."""
    from nsa_gen.cli.tables import verify_blocks

    if document.verification is not None:
        name = document.verification["name"]
        return [Heading(f"Verification of {name}"), *verify_blocks(document.verification)]
    if not document.jobs:
        return []
    machine = document.machine or {}
    facts = [machine.get("gpu"), f"torch {machine.get('torch')}", f"triton {machine.get('triton')}"]
    facts += [f"commit {str(machine.get('commit'))[:12]}", machine.get("date")]
    blocks: list[Block] = [
        Heading(f"Checks: {document.path.stem}"),
        Text(", ".join(str(each) for each in facts if each)),
    ]
    return [*blocks, *_jobs(document.jobs)]


def _tuned(document: Document) -> list[Block]:
    """The tuned entries of one file."""
    if not document.tuned:
        return []
    from nsa_gen.cli.tables import entry_blocks
    from nsa_gen.tuning.store import read_entries

    entries = read_entries(document.path)
    return [Heading(f"Tuned configurations: {document.path.stem}"), *entry_blocks(entries)]


def _jobs(jobs: Sequence[Job]) -> list[Block]:
    """A row a job, and what failed."""
    rows, failures = [], []
    for job in jobs:
        bad = [row for row in job.rows if not row["ok"]]
        failures += [f"{job.name}: {row.get('case', '')}: {row['quantity']}: {row.get('problem', '')}" for row in bad]
        counts = str(len(job.rows)), str(len(bad)), str(job.examples or "-")
        rows.append((job.name, job.status, *counts, f"{job.seconds:.0f} s", job.detail.partition("\n")[0][:160]))
    sums = str(sum(len(job.rows) for job in jobs)), str(len(failures)), str(sum(job.examples for job in jobs) or "-")
    columns = ("job", "result", ">comparisons", ">failed", ">examples", ">time", "remarks")
    more = [f"and {len(failures) - MOST_FAILURES} more"] if len(failures) > MOST_FAILURES else []
    return [Table(columns, rows, footer=("sum", "", *sums, "", "")), *bullets(failures[:MOST_FAILURES] + more)]


def to_html(title: str, blocks: Iterable[Block | Figure]) -> str:
    """One document: `title` as its heading, a table of contents of the level-2 headings, then the blocks in order."""
    from jinja2 import Environment

    page = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(page)
    kinds = [(_kind(block), block) for block in blocks]
    headings = [(number, block) for number, (_, block) in enumerate(kinds, 1) if isinstance(block, Heading)]
    contents = [(number, block.text) for number, block in headings if block.level == 2]
    return template.render(title=title, blocks=kinds, contents=contents) + "\n"


def _kind(block: Block | Figure) -> str:
    """What the page shows a block as: the name of its type, or "List" where all of its lines begin with a dash."""
    is_list = isinstance(block, Text) and all(line.startswith("- ") for line in block.text.splitlines() or [""])
    return "List" if is_list else type(block).__name__
