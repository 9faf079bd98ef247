"""Read result files for a report: of benchmarks, `verify --json`, the tuner and GPU tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsa_gen._files import parse_json, read_json, read_text
from nsa_gen.bench.records import Results, read_results, validated

_FORMS = (
    "the JSON of nsa-gen bench, nsa-gen verify --json, nsa-gen cache export or an entry of the tuner's cache, "
    "tools/compare_peers.py or the report of pytest --gpu-report"
)


@dataclass(frozen=True)
class _Comparison:
    """The shown fields of a row of `verify --json`."""

    case: str
    quantity: str
    measure: str
    error: float | None
    bound: float | None
    ok: bool
    problem: str


@dataclass(frozen=True)
class _Verification:
    """The shown fields of `verify --json`."""

    name: str
    dtype: str
    heads: list[int]
    passes: list[str]
    cases: list[Any]
    rows: list[_Comparison]
    notes: list[str]
    seed: int


@dataclass(frozen=True)
class Job:
    """One job of a suite of checks: how it ended, and its comparisons in the form of `verify --json`, if any."""

    name: str
    status: str
    seconds: float
    detail: str
    rows: tuple[Mapping[str, Any], ...] = ()
    examples: int = 0


@dataclass(frozen=True)
class Document:
    """The content of one file: a benchmark's results, one verification, tuned entries, or the jobs of a suite.

    `tuned` says that the tuner wrote the file, which `nsa_gen.tuning.store` reads.
    """

    path: Path
    results: Results | None = None
    verification: Mapping[str, Any] | None = None
    tuned: bool = False
    machine: Mapping[str, Any] | None = None
    jobs: tuple[Job, ...] = ()


def read_document(path: Path) -> Document:
    """Read a result file of any of the forms.

    Raises:
        OSError: it cannot be read.
        ValueError: it has none of the forms, or is cut short; the message names the file.
    """
    try:
        if path.suffix == ".jsonl":
            return _gpu_report(path) or Document(path, results=read_results(path))
        return _document(path, read_json(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: expected {_FORMS}: {reason}") from error


def _document(path: Path, found: Any) -> Document:
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {type(found).__name__}")
    if {"machine", "jobs"} <= found.keys():
        return Document(path, machine=found["machine"], jobs=tuple(map(_job, found["jobs"])))
    if {"cases", "rows", "digest"} <= found.keys():
        return Document(path, verification={**found, **asdict(validated(_Verification, found))})
    if {"machine", "rows", "kernels"} <= found.keys():
        return Document(path, results=Results.from_document(found))
    if "schema" in found and ("identity" in found or "entries" in found):
        return Document(path, tuned=True)
    raise ValueError(f"got an object of {', '.join(list(found)[:8]) or 'nothing'}")


def _gpu_report(path: Path) -> Document | None:
    """The tests in a report of `pytest --gpu-report`, each with its last outcome. None if the file is no such report.

    A test that was cut short has no outcome. The last line may itself be cut short.
    """
    lines = [parse_json(line) for line in read_text(path).splitlines(keepends=True) if line.endswith("\n")]
    machines = [line["machine"] for line in lines if "machine" in line and "device" in line]
    if not machines:
        return None
    found: dict[str, Any] = {}
    ended: dict[str, Any] = {}
    for line in lines:
        if "test" in line:
            found.setdefault(line["test"], {}).update(line.get("found", {}))
        if "outcome" in line:
            ended[line["test"]] = line
    statuses = {"passed": "ok", None: "not ended"}
    jobs = []
    for name, result in found.items():
        end = ended.get(name, {})
        outcome = end.get("outcome")
        if outcome != "skipped":
            job = {"name": name.rpartition("::")[2], "status": statuses.get(outcome, outcome), "result": result}
            jobs.append(_job({**end, **job}))
    return Document(path, machine=machines[0], jobs=tuple(jobs))


def _job(job: Mapping[str, Any]) -> Job:
    result = job.get("result") or {}
    rows = tuple(row for row in result.get("rows", ()) if {"quantity", "ok"} <= row.keys())
    examples = result.get("examples", 0)
    return Job(
        str(job["name"]),
        str(job["status"]),
        float(job.get("seconds") or 0),
        str(job.get("detail", "")),
        rows,
        examples if isinstance(examples, int) else 0,
    )
