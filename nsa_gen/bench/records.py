"""A benchmark's results as plain data: rows that a worker appends one by one, and the whole as a JSON document."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nsa_gen._files import parse_json, read_json, read_text, write_whole

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from nsa_gen.spec import Spec

T = TypeVar("T")

OURS = "nsa_gen"
"""The contender that is a generated package's operator."""
OTHER = "other"
"""The branch of kernels from outside the package: copies, fills and sorts of torch."""


@dataclass(frozen=True)
class Row:
    """One pass of one contender on one sequence.

    Attributes:
        workload, part, inputs, tokens: the task it belongs to.
        heads: (query, KV) heads.
        head_dim: (query and key, value) head dims.
        dtype: the inputs' dtype.
        contender: its name.
        dense: whether it computes dense attention.
        direction: "forward" or "backward".
        median_ms, low_ms, high_ms: median and quartiles; None without a time.
        repeats: the number of samples.
        peak_bytes: peak of memory in use in addition to the inputs, from the start of the forward on.
        graph: whether a CUDA graph was timed.
        note: what a reader must know of this contender.
        refusal: why it was not tried.
        error: the first line of its error.
        flops, bytes, floor_ms: for our own operator, the work that no schedule avoids, and the least time for it at the
            GPU's peaks. None for others; floor_ms is also None if the GPU is not in the hardware table.
    """

    workload: str
    part: str
    inputs: str
    tokens: int
    heads: tuple[int, int]
    head_dim: tuple[int, int]
    dtype: str
    contender: str
    dense: bool
    direction: str
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    repeats: int = 0
    peak_bytes: int | None = None
    graph: bool = False
    note: str = ""
    refusal: str = ""
    error: str = ""
    flops: float | None = None
    bytes: float | None = None
    floor_ms: float | None = None

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads[0] // self.heads[1]


@dataclass(frozen=True)
class KernelRow:
    """GPU time of one kernel of our operator in one profiled pass of one call.

    Attributes:
        workload, inputs, tokens: the task it belongs to.
        kernel: the name of the package's kernel, or torch's.
        branch: "cmp", "slc", "win", "all", or "other" for kernels from outside the package.
        direction: "forward" or "backward".
        ms: GPU milliseconds, all launches together.
        launches: the number of launches.
        flops, bytes: the work that no schedule avoids, by the cost model; 0 for kernels that it does not know.
        floor_ms: the least time for this work at the GPU's peaks; None if the GPU is not in the hardware table.
        limited_by: "matrix units" or "memory"; "" without a floor.
    """

    workload: str
    inputs: str
    tokens: int
    kernel: str
    branch: str
    direction: str
    ms: float
    launches: int
    flops: float = 0.0
    bytes: float = 0.0
    floor_ms: float | None = None
    limited_by: str = ""


@dataclass(frozen=True)
class OverlapRow:
    """The share of a query's selected blocks that the previous query also selected."""

    workload: str
    inputs: str
    tokens: int
    overlap: float


@dataclass(frozen=True)
class SelectionRow:
    """Where the selected blocks lie, over all KV heads.

    `shares[i][j]` is the share of the i-th query range's slots whose block is in the j-th key range. Rows add up to 1.
    """

    workload: str
    inputs: str
    tokens: int
    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class CheckRow:
    """The result of a check: our operator's faults, found by the oracle, or a contender's distance from our output.

    `difference` is the norm of the two outputs' difference divided by the norm of ours, at `tokens` tokens. Packages
    that select blocks or round in other ways differ by a few percent; a wrong package differs by more than half.
    """

    workload: str
    tokens: int
    contender: str
    faults: tuple[str, ...] = ()
    difference: float | None = None
    error: str = ""


@dataclass(frozen=True)
class TaskRow:
    """How a task ended: "ok", or "not run" or "failed" with the reason."""

    workload: str
    inputs: str
    tokens: int
    status: str
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class DecodeRow:
    """One step of decode, one query per sequence: its time in microseconds for one layer.

    Attributes:
        workload: the name of the spec.
        tokens, batch: tokens that each sequence holds, and sequences.
        bytes: keys and values that a step must read.
        floor_us: the time in which a plain copy reads these bytes.
        us, paged_us: a step on a contiguous cache, and on a paged one.
        dense_us: dense attention of the same queries to the contiguous keys; None if not timed.
        problem: why there is no time.
    """

    workload: str
    tokens: int
    batch: int
    bytes: float = 0.0
    floor_us: float | None = None
    us: float | None = None
    paged_us: float | None = None
    dense_us: float | None = None
    problem: str = ""


Record = Row | DecodeRow | KernelRow | OverlapRow | SelectionRow | CheckRow | TaskRow
_KINDS: dict[str, type[Any]] = {
    "row": Row,
    "kernel": KernelRow,
    "overlap": OverlapRow,
    "selection": SelectionRow,
    "decode": DecodeRow,
    "check": CheckRow,
    "task": TaskRow,
}
"""Records by their name in a journal's line; with an s, it is the name of their list in `Results`."""
_LATER = ("selection", "decode")
"""Kinds of records that results of earlier versions lack."""
FIRST_MEASUREMENT = "interleaved-1"
"""The measurement of results whose settings do not name one: every timed run began on an idle GPU."""


@dataclass(frozen=True)
class Results:
    """A whole benchmark. `machine` has GPU, driver, versions and commit; `settings` has seeds, budget and so on.

    `settings["measurement"]` is the version of the measurement, `nsa_gen.rendering.identity.MEASUREMENT`.
    """

    machine: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    kernels: tuple[KernelRow, ...] = ()
    overlaps: tuple[OverlapRow, ...] = ()
    checks: tuple[CheckRow, ...] = ()
    tasks: tuple[TaskRow, ...] = ()
    selections: tuple[SelectionRow, ...] = ()
    decodes: tuple[DecodeRow, ...] = ()

    @property
    def measurements(self) -> list[str]:
        """The versions of the measurement that took the times: several in merged results."""
        return str(self.settings.get("measurement", FIRST_MEASUREMENT)).split(", ")

    @property
    def ours_is_timed(self) -> bool:
        """Whether our operator passed its check and has a time for everything that was requested."""
        mine = [row.median_ms for row in self.rows if row.contender == OURS] + [row.us for row in self.decodes]
        timed = bool(mine) and all(time is not None for time in mine)
        return timed and all(task.status == "ok" for task in self.tasks)

    @classmethod
    def of(cls, records: Iterable[Record], machine: Mapping[str, Any], settings: Mapping[str, Any]) -> Results:
        """Sort records by kind."""
        records = list(records)
        lists = {f"{name}s": tuple(one for one in records if isinstance(one, kind)) for name, kind in _KINDS.items()}
        return cls(machine, settings, **lists)

    def to_document(self) -> dict[str, Any]:
        """The results as a JSON document."""
        lists = {f"{name}s": [_without_defaults(one) for one in getattr(self, f"{name}s")] for name in _KINDS}
        return {"machine": dict(self.machine), "settings": dict(self.settings), **lists}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Results:
        """The inverse of `to_document`. Raises ValueError if it is no such document."""
        try:
            lists = {
                f"{name}s": tuple(_from_json(kind, record) for record in document[f"{name}s"])
                for name, kind in _KINDS.items()
                if f"{name}s" in document or name not in _LATER
            }
            return cls(document["machine"], document["settings"], **lists)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"expected the JSON of a benchmark: {type(error).__name__}: {error}") from error


def to_line(record: Record) -> str:
    """A record as one line of JSON."""
    kind = next(name for name, each in _KINDS.items() if isinstance(record, each))
    return json.dumps({"record": kind, **asdict(record)}, allow_nan=False)


def from_line(line: str) -> Record:
    """The record of a line that `to_line` made."""
    found = parse_json(line)
    return _from_json(_KINDS[found.pop("record")], found)


def write_json(path: Path, results: Results) -> None:
    """Write results atomically, one record per line."""
    parts = []
    for name, value in results.to_document().items():
        body = json.dumps(value)
        if isinstance(value, list) and value:
            body = "[\n" + ",\n".join(f"  {json.dumps(record)}" for record in value) + "\n ]"
        parts.append(f" {json.dumps(name)}: {body}")
    write_whole(path, "{\n" + ",\n".join(parts) + "\n}\n")


def begin_journal(path: Path, machine: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Begin the file of a benchmark that runs. It has a line for machine and settings, then one for each record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "settings": settings}) + "\n", encoding="utf-8")


def append_record(path: Path, record: Record) -> None:
    """Append a record to the journal of a benchmark that runs."""
    with path.open("a", encoding="utf-8") as file:
        file.write(to_line(record) + "\n")


def read_results(path: Path) -> Results:
    """Read results from their JSON, or from the journal (.jsonl) of an interrupted session.

    Raises:
        ValueError: the file is neither of them.
    """
    if path.suffix != ".jsonl":
        return Results.from_document(read_json(path))
    lines = read_text(path).splitlines(keepends=True)
    try:
        opening = parse_json(lines[0])
        records = [from_line(line) for line in lines[1:] if line.endswith("\n")]
        return Results.of(records, opening["machine"], opening["settings"])
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the journal of a benchmark: {type(error).__name__}: {error}") from error


def merge(several: Sequence[Results]) -> Results:
    """Several results as one, with the machine and settings of the first. Of equal subjects, the last record counts.

    If they were measured in different ways, the settings name all of them.

    Raises:
        ValueError: the results are from different GPUs, whose times cannot be compared.
    """
    names = {str(each.machine.get("gpu")) for each in several}
    if len(names) > 1:
        raise ValueError(f"results: expected those of one GPU, got {' and '.join(sorted(names))}")
    last = {
        (type(record), *_subject(record)): record
        for each in several
        for name in _KINDS
        for record in getattr(each, f"{name}s")
    }
    settings = several[0].settings
    measurements = list(dict.fromkeys(name for each in several for name in each.measurements))
    if len(measurements) > 1:
        settings = {**settings, "measurement": ", ".join(measurements)}
    return Results.of(last.values(), several[0].machine, settings)


def kernels_of(results: Results, spec: Spec) -> list[KernelRow]:
    """The profiled kernels of a spec on independent inputs, from the workload of its name or of its shape.

    The shape is heads, head dims and dtype, as in the rows of the workload.
    """
    shape = ((spec.heads.query, spec.heads.kv), (spec.head_dim.qk, spec.head_dim.v), spec.dtype)
    named = [row for row in results.kernels if row.workload == spec.name]
    alike = {row.workload for row in results.rows if (row.heads, row.head_dim, row.dtype) == shape}
    found = named or [row for row in results.kernels if row.workload in alike]
    return [row for row in found if row.inputs == "independent"]


def _subject(record: Record) -> tuple[Any, ...]:
    """What a record is about. Two records of a kind with the same subject answer the same question."""
    names = ("part", "workload", "inputs", "tokens", "batch", "contender", "direction", "kernel")
    return tuple(getattr(record, name, None) for name in names)


def _without_defaults(record: Record) -> dict[str, Any]:
    """A record's fields, without those that have their default."""
    defaults = {each.name: each.default for each in fields(record)}
    return {name: value for name, value in asdict(record).items() if value != defaults[name]}


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def validated(kind: type[T], found: Mapping[str, Any], place: str = "") -> T:
    """A dataclass from its fields. Raises ValueError naming `place` and field if one is missing or mistyped."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(dict(found))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}{name}: {first['msg'].lower()}, got {first['input']!r:.60}") from None


def _from_json(kind: type[Any], found: Mapping[str, Any]) -> Any:
    """A record from its fields, with lists as tuples. Raises ValueError for an unknown, missing or mistyped field."""
    if unknown := set(found) - {each.name for each in fields(kind)}:
        raise ValueError(f"{kind.__name__}: expected no {', '.join(sorted(unknown))}")
    return validated(kind, found, f"{kind.__name__}.")
