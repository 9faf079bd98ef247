"""What commands show: a report as a list of blocks, on a terminal or as Markdown, and how far something is."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nsa_gen.cli.common import note

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; plain text without markup."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines to be copied: commands or a program."""

    text: str
    language: str = "sh"


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns.

    Attributes:
        columns: the names of the columns; one that starts with ">" is aligned to the right (and shown without it).
        rows: as many cells in each row as there are columns.
        footer: a last row set apart from the others, such as a sum.
        title: what the table shows; shown above it.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    footer: Sequence[str] = field(default=())
    title: str = ""

    def __post_init__(self) -> None:
        for row in (*self.rows, *([self.footer] if self.footer else [])):
            if len(row) != len(self.columns):
                raise ValueError(f"expected {len(self.columns)} cells in a row, got {len(row)}: {list(row)}")


Block = Heading | Text | Code | Table


def bullets(lines: Iterable[str], heading: str = "") -> list[Block]:
    """A list, a dash before each line, below a heading if one is given; nothing where there are no lines."""
    text = "\n".join(f"- {line}" for line in lines)
    return [*([Heading(heading)] if heading else []), Text(text)] if text else []


def to_markdown(blocks: Iterable[Block]) -> str:
    """The blocks as one Markdown document."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_terminal(blocks: Iterable[Block], console: Console) -> None:
    """Print the blocks on a rich console."""
    for block in blocks:
        _print(block, console)


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Text():
            return block.text
        case Code():
            return f"```{block.language}\n{block.text}\n```"
        case Table():
            names = [name.removeprefix(">") for name in block.columns]
            rule = ["--:" if name.startswith(">") else "---" for name in block.columns]
            rows = [names, rule, *block.rows, *([block.footer] if block.footer else [])]
            lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
            return "\n".join([f"{block.title}\n"] * bool(block.title) + lines)


def _print(block: Block, console: Console) -> None:
    match block:
        case Heading():
            console.print()
            console.rule(f"[bold]{_escape(block.text)}", align="left", style="cyan")
        case Text():
            console.print(_escape(block.text))
        case Code():
            console.print("\n".join(f"  {line}" for line in block.text.splitlines()), style="cyan", markup=False)
        case Table():
            _print_table(block, console)


_LONGEST_WORD = 24
"""Words longer than this are broken where a table is narrow."""


def _print_table(block: Table, console: Console) -> None:
    """Print a table; on a terminal that is too narrow, as wide as it must be, rather than with columns left out."""
    least = sum(_least_width(block, index) + 3 for index in range(len(block.columns)))
    if least > console.width:
        like = {"force_terminal": console.is_terminal, "no_color": console.no_color, "highlight": False}
        console = type(console)(file=console.file, width=least, **like)
    console.print(_rich_table(block))


def _least_width(block: Table, index: int) -> int:
    """The narrowest that a column can be: its longest cell where cells are not broken, else its longest word."""
    cells = [block.columns[index].removeprefix(">"), *(row[index] for row in (*block.rows, block.footer) if row)]
    if _is_unbroken(block, index):
        return max(map(len, cells))
    return min(max((len(word) for cell in cells for word in cell.split()), default=1), _LONGEST_WORD)


def _is_unbroken(block: Table, index: int) -> bool:
    """Names in the first column and numbers are never broken; descriptions are, where the terminal is narrow."""
    return index == 0 or block.columns[index].startswith(">")


def _rich_table(block: Table) -> RichTable:
    """The block as a rich table: a word "yes" or "ok" is green, a word "no" or "fails" is red."""
    from rich import box
    from rich.table import Table as RichTable

    table = RichTable(title=_escape(block.title) or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(block.columns):
        table.add_column(
            name.removeprefix(">"),
            justify="right" if name.startswith(">") else "left",
            no_wrap=_is_unbroken(block, index),
            min_width=_least_width(block, index),
        )
    for row in block.rows:
        table.add_row(*map(_coloured, row))
    if block.footer:
        table.add_section()
        table.add_row(*(f"[bold]{_escape(cell)}" for cell in block.footer))
    return table


_COLOURS = {"ok": "green", "yes": "green", "no": "red", "fails": "red"}


def _coloured(cell: str) -> str:
    colour = _COLOURS.get(cell)
    return f"[{colour}]{cell}[/]" if colour else _escape(cell)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


# Where it is shown


def output_console() -> Console:
    """A rich console on stdout. Where stdout is no terminal, tables are as wide as they need to be rather than cut."""
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end with exit code 1, which here means "the answer is no"

    console = PipedConsole(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = PipedConsole(highlight=False, width=200)
    return console


def show(*blocks: Block) -> None:
    """Print blocks of a report on stdout."""
    to_terminal(blocks, output_console())


LINE_SECONDS = 10.0
"""Time between lines of progress where there is no terminal."""


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show how far something is: a bar on a terminal's stderr, elsewhere a line now and then, the last one always.

    Gives a function to call with (done, total, what was just done).
    """
    if not sys.stderr.isatty():
        next_line = 0.0

        def say(done: int, total: int, what: str) -> None:
            nonlocal next_line
            if (now := time.monotonic()) >= next_line or done == total:
                next_line = now + LINE_SECONDS
                note(f"{label}: {done}/{total} {what}")

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    detail = TextColumn("{task.fields[what]}", style="dim")
    with Progress(*columns, detail, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None, what="")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, what=what)
