"""The report of a tuning, and the entries that it leaves, as blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nsa_gen.cli.blocks import Block, Heading, Table, Text

if TYPE_CHECKING:
    from nsa_gen.tuning import BucketResult, TuneReport
    from nsa_gen.tuning.stage0 import Selection
    from nsa_gen.tuning.store import Configs, Entry

MOST_LISTED = 20


def report_blocks(report: TuneReport) -> list[Block]:
    """Stage 0 for a dry run; else the results, what was quarantined, and where everything is."""
    if report.device is None:
        blocks = [
            *_stage0(report),
            Text(f"{report.name} for {report.target}: {report.seconds:.0f} s; nothing was timed."),
        ]
        if (expected := report.expected) is not None:
            blocks.append(
                Text(
                    f"Tuning it would take about {expected.wall_seconds:.0f} s: compiling, "
                    f"{expected.compile_seconds:.0f} s over {expected.jobs} processes, and "
                    f"{expected.gpu_seconds:.0f} s on the GPU."
                )
            )
        return blocks
    blocks: list[Block] = [Heading(f"{report.name} on {report.device.name}")]
    blocks += [block for result in report.results for block in _result(result)]
    if report.wrong:
        lines = "\n".join(f"{name}: {reason}" for name, reason in report.wrong.items())
        blocks.append(Heading("WRONG RESULTS"))
        blocks.append(Text(f"These candidates do not compute what they must. Please report them.\n{lines}"))
    others = [item for item in report.quarantined.items() if item[0] not in report.wrong]
    if others:
        rows = [(name, reason) for name, reason in others[:MOST_LISTED]]
        title = f"{len(others)} candidates failed and were left out"
        blocks.append(Table(("candidate", "reason"), rows, title=title))
    resumed = f", {report.resumed} answers taken from the journal" if report.resumed else ""
    blocks.append(Text(f"{report.measured} times taken in {report.seconds:.0f} s{resumed}. Journal: {report.journal}"))
    return blocks


def _result(result: BucketResult) -> list[Block]:
    if result.problem and not result.times and result.saved is None and not result.configs:
        return [Text(f"{result.bucket.label}: {result.problem}")]
    won = f"{result.gain:.3f} +- {result.noise:.3f} times the default's speed"
    title = f"{result.bucket.label}: {won if result.configs else 'the default won'}"
    blocks = _tables(title, result.times, result.configs)
    end = f"saved in {result.saved}" if result.saved is not None else result.problem
    cut = "; the budget ran out before every kernel was tried" if result.cut_short else ""
    return [*blocks, Text(f"{end}{cut}")]


def _tables(title: str, times: Mapping[str, Any], configs: Configs) -> list[Block]:
    """Milliseconds by kind of input and pass, and the configurations that are not the default's, if any."""
    rows = [
        (kind, name, f"{ms['default']:.3f}", f"{ms['tuned']:.3f}", f"{ms['default'] / ms['tuned']:.2f}x")
        for kind, passes in times.items()
        for name, ms in passes.items()
    ]
    blocks: list[Block] = [Table(("inputs", "pass", ">default ms", ">tuned ms", ">gain"), rows, title=title)]
    if configs:
        lines = [
            (name, ", ".join(f"{key}={value}" for key, value in values.items())) for name, values in configs.items()
        ]
        blocks.append(Table(("kernel or schedule", "configuration"), lines))
    return blocks


def entries_table(entries: Iterable[Entry]) -> Table:
    """A row a tuned entry: what it is for, what it gains over the default, and what it was made with."""
    columns = ("spec", "GPU", "calls", ">gain", ">changed", "kernels", "tuned with")
    return Table(columns, [_entry_row(each) for each in entries])


def _entry_row(entry: Entry) -> tuple[str, ...]:
    identity, made = entry.identity, entry.provenance
    versions = {"torch": made.torch, "triton": made.triton, "driver": made.driver, "nsa_gen": made.nsa_gen}
    return (
        identity.spec,
        identity.gpu,
        identity.bucket.label,
        f"{entry.result['gain']:.2f}x" if "gain" in entry.result else "",
        str(len(entry.configs)),
        identity.kernels,
        ", ".join([*(f"{name} {version}" for name, version in versions.items() if version), made.date[:10]]),
    )


def entry_blocks(entries: Sequence[Entry]) -> list[Block]:
    """Tuned entries: all of them in a table, then the times and configurations of each."""
    blocks: list[Block] = [entries_table(entries)]
    for entry in entries:
        identity = entry.identity
        end = "" if entry.configs else ": the default won"
        title = f"{identity.spec}, {identity.bucket.label}, {identity.gpu}{end}"
        blocks += _tables(title, entry.result.get("ms", {}), entry.configs)
    return blocks


def _stage0(report: TuneReport) -> list[Block]:
    blocks: list[Block] = []
    columns = ("kernel", ">of", ">legal", ">tried", ">dropped", ">merged", ">left", "candidates, the default first")
    for bucket, selections in report.selections.items():
        rows = [_selected(each) for each in selections]
        blocks.append(Table(columns, rows, title=f"{report.name} for {report.target}, {bucket.label}"))
        dropped = [(each.kernel, config, reason) for each in selections for config, reason in each.dropped.items()]
        if dropped:
            blocks.append(Table(("kernel", "dropped", "reason"), dropped))
    return blocks


def _selected(one: Selection) -> tuple[str, ...]:
    shown = [
        f"{' '.join(str(value) for value in each.config.values())} ({1e6 * each.seconds:.0f} us)"
        for each in one.survivors[:3]
    ]
    more = len(one.survivors) - len(shown)
    tried = len(one.survivors) + len(one.dropped) + one.merged
    counts = (one.total, one.legal, tried, len(one.dropped), one.merged, len(one.survivors))
    return (one.kernel, *map(str, counts), ", ".join(shown) + (f", {more} more" if more > 0 else ""))
