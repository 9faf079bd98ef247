"""Print a `CompileReport` for people: one line per kernel and architecture, then one line of summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from nsa_gen.targets.compile import Compilation, CompileReport

if TYPE_CHECKING:
    from rich.console import Console

_HEADINGS = ("", "target", "kernel", "calls", "warps", "stages", "registers", "spill B", "shared B", "of", "seconds")
_LEFT = frozenset({0, 1, 2, 3})


def print_report(report: CompileReport, console: Console) -> None:
    """Print the report on `console`. Lines are never wrapped or cut: piped output has a line per kernel and target."""
    table = [_HEADINGS, *(_cells(row) for row in report.rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEADINGS))]
    for number, line in enumerate(table):
        padded = [
            cell.ljust(width) if column in _LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        row = report.rows[number - 1] if number else None
        _print_line(console, "  ".join(padded) + _remark(row), _style(row))
    _print_line(console, summary(report), "" if report.ok else "bold red")


def summary(report: CompileReport) -> str:
    """The verdict in one line: how many fit, fail, spill, and were found in the cache."""
    failed = [row for row in report.rows if not row.ok]
    targets = list(dict.fromkeys(row.target for row in report.rows))
    parts = [f"{report.name}: {len(report.rows) - len(failed)} of {len(report.rows)} fit ({', '.join(targets)})"]
    if failed:
        where: dict[str, list[str]] = {}
        for row in failed:
            where.setdefault(row.kernel, []).append(row.target)
        parts.append("failed: " + ", ".join(f"{name} on {'/'.join(dict.fromkeys(at))}" for name, at in where.items()))
    if heavy := sum(row.spills_heavily for row in report.rows):
        parts.append(f"{heavy} spill heavily")
    if cached := sum(row.cached for row in report.rows):
        parts.append(f"{cached} from the cache")
    triton = f" with triton {report.versions['triton']}" if "triton" in report.versions else ""
    return "; ".join(parts) + f"; {report.seconds:.1f} s{triton}"


def _cells(row: Compilation) -> tuple[str, ...]:
    used = row.resources
    return (
        ("spills" if row.spills_heavily else "ok") if row.ok else "FAIL",
        row.target,
        row.kernel,
        "+".join(row.variants),
        str(row.num_warps) if row.num_warps else "-",
        str(row.num_stages) if row.num_stages else "-",
        _number(used.registers if used else None),
        _number(used.spill_bytes if used else None),
        _number(used.shared_memory if used else None),
        f"{row.shared_memory_limit:,}",
        "cached" if row.cached else f"{row.seconds:.1f}",
    )


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _remark(row: Compilation | None) -> str:
    if row is None:
        return ""
    if not row.ok:
        return f"  {row.reason}"
    return f"  registers and spills not read: {row.resources.unread}" if row.resources and row.resources.unread else ""


def _style(row: Compilation | None) -> str:
    if row is None:
        return "bold"
    if not row.ok:
        return "red"
    return "yellow" if row.spills_heavily else ""


def _print_line(console: Console, line: str, style: str) -> None:
    console.print(Text(line.rstrip(), style=style), soft_wrap=True, overflow="ignore", crop=False)
