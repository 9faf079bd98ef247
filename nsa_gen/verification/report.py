"""The results of a verification: plain data, as JSON and as tables."""

from __future__ import annotations

import json
import math
import platform
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.console import Console


@dataclass(frozen=True)
class Row:
    """One quantity of one case. `error` and `bound` are of the measure that came nearest to failing.

    `measure` is row, norm or bias (relative errors, see tolerance.py), selection (shortfall in units of the rounding
    error), bits (differing elements of two equal calls), bytes (allocated memory) or raised (an exception). `problem`
    explains a failure that has no size.
    """

    case: str
    quantity: str
    measure: str
    error: float
    bound: float
    ok: bool
    problem: str = ""

    @property
    def usage(self) -> float:
        """The error as a share of its bound; inf for a failure without a size."""
        if self.problem:
            return math.inf
        if self.bound == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.bound

    @property
    def complaint(self) -> str:
        """What is wrong, for a row that is not ok."""
        return self.problem or f"{self.measure} error {self.error:.3e}, at most {self.bound:.3e} allowed"


def raised(case: str, error: Exception) -> Row:
    """The row of a call that raised an exception, caused by the package or by the device."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    told = " ".join(str(error).split())[:600]
    problem = f"raised {type(error).__name__}: {told} ({where.filename}:{where.lineno})"
    return Row(case, type(error).__name__, "raised", math.inf, 0.0, False, problem)


@dataclass(frozen=True)
class Coverage:
    """What a run exercised, by name (a tunable as kernel.NAME) with its values, and what it left out.

    `ways` are the variations of the calls, in words.
    """

    exercised: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()


@dataclass(frozen=True)
class Environment:
    """The machine and versions with which the report was made."""

    device: str
    gpu: str
    driver: str
    torch: str
    triton: str
    python: str


def environment(device: torch.device) -> Environment:
    """The machine and versions of this process."""
    import torch
    import triton

    gpu = driver = ""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        driver = f"hip {torch.version.hip}" if torch.version.hip else _nvidia_driver()
    return Environment(str(device), gpu, driver, torch.__version__, triton.__version__, platform.python_version())


def _nvidia_driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0].strip() if version.exists() else ""


@dataclass(frozen=True)
class ExampleRecord:
    """A drawn example in the form that `nsa-gen verify --example` reads, its seed, and whether it passed."""

    seed: int
    example: str
    ok: bool


@dataclass(frozen=True)
class Reproduction:
    """The smallest failing example that was found: its spec's text, and the command that repeats it.

    `tries` is the number of examples that were run to find it.
    """

    command: str
    example: str
    seed: int
    spec: str
    tries: int


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of `verify`.

    `dtype` and `heads` (query, kv) are those verified; if they are not the spec's, the notes say so. `cases` are the
    labels of the calls, `seconds` is the total time. `examples` and `reproduction` are for drawn examples, `coverage`
    is for fixed cases.
    """

    name: str
    digest: str
    dtype: str
    heads: tuple[int, int]
    passes: tuple[str, ...]
    seed: int
    environment: Environment
    notes: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    seconds: float = 0.0
    examples: tuple[ExampleRecord, ...] = ()
    reproduction: Reproduction | None = None
    coverage: Coverage | None = None

    @property
    def ok(self) -> bool:
        """Whether something was compared, and every comparison is within its bound."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are not ok."""
        return tuple(row for row in self.rows if not row.ok)

    def worst(self) -> tuple[Row, ...]:
        """For each quantity, the row that used the largest share of its bound, in order of first appearance."""
        found: dict[str, Row] = {}
        for row in self.rows:
            if row.quantity not in found or row.usage > found[row.quantity].usage:
                found[row.quantity] = row
        return tuple(found.values())

    def to_json(self) -> str:
        """The report as a JSON object, including `ok`. Numbers that are not finite become null."""
        document = {"ok": self.ok, **asdict(self)}
        return json.dumps(_finite(document), indent=2)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_report(report: VerifyReport, console: Console) -> None:
    """Print the worst row of each quantity, the failures and the notes on a rich console."""
    from rich.markup import escape
    from rich.table import Table

    environment = report.environment
    console.print(
        f"{report.name} ({report.digest}): {report.dtype}, {report.heads[0]} query and {report.heads[1]} KV heads, "
        f"{' and '.join(report.passes)}, {len(report.cases)} cases, seed {report.seed}",
        highlight=False,
    )
    console.print(
        f"{environment.gpu or environment.device}, torch {environment.torch}, triton {environment.triton}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    for column in ("quantity", "measure", "error", "bound", "used", "worst case", ""):
        table.add_column(column, justify="right" if column in ("error", "bound", "used") else "left", no_wrap=True)
    for row in report.worst():
        sized = not row.problem
        table.add_row(
            row.quantity,
            row.measure,
            f"{row.error:.2e}" if sized else "-",
            f"{row.bound:.2e}" if sized else "-",
            f"{100 * row.usage:.0f}%" if sized and math.isfinite(row.usage) else "-",
            escape(row.case),
            "ok" if row.ok else "[red]FAILED[/red]",
        )
    console.print(table)
    for row in report.failures:
        console.print(f"[red]failed[/red] {escape(row.case)}: {row.quantity}: {escape(row.complaint)}", highlight=False)
    coverage = report.coverage or Coverage()
    for way in coverage.ways:
        if any(way.split(":")[0] in row.case for row in report.failures):
            console.print(escape(way), highlight=False)
    for what in coverage.left_out:
        console.print(f"left out: {escape(what)}", highlight=False)
    for note in report.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    verdict = "[green]ok[/green]" if report.ok else f"[red]{len(report.failures)} failed[/red]"
    console.print(f"{verdict}, {len(report.rows)} comparisons in {report.seconds:.1f} s", highlight=False)
