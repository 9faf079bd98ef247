"""Result files as a report takes them: of benchmarks, `verify --json`, the tuner, and of GPU tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_gen._files import parse_json, read_json, read_text
from nsa_gen.bench.breakdown import OTHER, estimates
from nsa_gen.bench.records import KernelRow, Results, Row, read_results
from nsa_gen.bench.registry import CONTENDERS
from nsa_gen.hardware import gpu_for_device
from nsa_gen.spec import Spec, SpecError, load_spec

_FORMS = (
    "the JSON of nsa-gen bench, nsa-gen verify --json, nsa-gen cache export or an entry of the tuner's cache, "
    "tools/compare_peers.py or the report of pytest --gpu-report"
)
_NUMBER = float | int | None
_COMPARISON = {
    "case": str,
    "quantity": str,
    "measure": str,
    "error": _NUMBER,
    "bound": _NUMBER,
    "ok": bool,
    "problem": str,
}
"""Fields of a row of `verify --json`, and their types."""


@dataclass(frozen=True)
class Job:
    """One job of a suite of checks: how it ended, and its comparisons as `verify --json` has them, if any."""

    name: str
    status: str
    seconds: float
    detail: str
    rows: tuple[Mapping[str, Any], ...] = ()
    examples: int = 0


@dataclass(frozen=True)
class Document:
    """What one file holds: any of a benchmark's results, one verification, tuned entries, and the jobs of a suite.

    `tuned` is the JSON of a file of the tuner, for `nsa_gen.tuning.store` to read.
    """

    path: Path
    results: Results | None = None
    verification: Mapping[str, Any] | None = None
    tuned: Mapping[str, Any] | None = None
    machine: Mapping[str, Any] | None = None
    jobs: tuple[Job, ...] = ()


def read_document(path: Path) -> Document:
    """Read a result file, whichever of the forms it has.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none of them, or is cut short; the message names the file.
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
        return _suite(path, found)
    if {"cases", "rows", "digest"} <= found.keys():
        return Document(path, verification=_verification(found))
    if {"machine", "rows", "kernels"} <= found.keys():
        return Document(path, results=Results.from_document(found))
    if "schema" in found and ("identity" in found or "entries" in found):
        return Document(path, tuned=found)
    raise ValueError(f"got an object of {', '.join(list(found)[:8]) or 'nothing'}")


def _verification(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `verify --json` has printed, all of whose fields that are shown are there."""
    for name in ("name", "dtype"):
        _require(found, name, str)
    for name in ("heads", "passes", "cases", "rows", "notes"):
        _require(found, name, list)
    _require(found, "seed", int)
    for number, row in enumerate(found["rows"]):
        for name, kind in _COMPARISON.items():
            _require(row, name, kind, f"rows[{number}].")
    return found


def _require(found: Mapping[str, Any], name: str, kind: Any, place: str = "") -> None:
    if not isinstance(found[name], kind):
        wanted = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{place}{name}: expected {wanted}, got {found[name]!r:.60}")


def _suite(path: Path, found: Mapping[str, Any]) -> Document:
    """The jobs of a suite; those that time are results, the others checks."""
    machine, jobs = found["machine"], found["jobs"]
    timed = [job["result"] for job in jobs if "kernels" in (job.get("result") or {})]
    checks = tuple(_job(job) for job in jobs if "kernels" not in (job.get("result") or {}))
    results = None
    if timed:
        gpu = gpu_for_device(str(machine.get("gpu")))
        pairs = [_benchmark(result, gpu.key if gpu else None) for result in timed]
        rows, kernels = (tuple(item for pair in pairs for item in pair[part]) for part in (0, 1))
        results = Results(machine, {"seed": found.get("seed", 0)}, rows, kernels)
    return Document(path, results=results, machine=machine, jobs=checks)


def _gpu_report(path: Path) -> Document | None:
    """The tests of a report of `pytest --gpu-report`, each with what it found last; None if the file is none.

    A test that was cut short has no outcome. The last line may be cut short itself.
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
        line = ended.get(name, {})
        status = line.get("outcome")
        if status != "skipped":
            rest = {"seconds": line.get("seconds", 0), "detail": line.get("detail", ""), "result": result}
            jobs.append(_job({"name": name.rpartition("::")[2], "status": statuses.get(status, status), **rest}))
    return Document(path, machine=machines[0], jobs=tuple(jobs))


def _job(job: Mapping[str, Any]) -> Job:
    result = job.get("result") or {}
    rows = tuple(row for row in result.get("rows", ()) if {"quantity", "ok"} <= row.keys())
    examples = result.get("examples", 0)
    count = examples if isinstance(examples, int) else 0
    seconds, detail = float(job.get("seconds") or 0), str(job.get("detail", ""))
    return Job(str(job["name"]), str(job["status"]), seconds, detail, rows, count)


def _benchmark(result: Mapping[str, Any], gpu_key: str | None) -> tuple[list[Row], list[KernelRow]]:
    """Rows and kernels of a suite's timing of one shipped spec; of other specs nothing is known, so there are none."""
    try:
        spec = load_spec(str(result["request"]["spec"]))
    except SpecError:
        return [], []
    rows = [_row(spec, row) for row in result.get("rows", ())]
    tokens = result.get("profiled_tokens")
    if not tokens:
        return rows, []
    return rows, _kernels(spec, int(tokens), result["kernels"], gpu_key)


def _row(spec: Spec, row: Mapping[str, Any]) -> Row:
    name = str(row["contender"])
    return Row(
        workload=spec.name,
        part=spec.name,
        inputs="independent",
        tokens=int(row["tokens"]),
        heads=(spec.heads.query, spec.heads.kv),
        head_dim=(spec.head_dim.qk, spec.head_dim.v),
        dtype=spec.dtype,
        contender=name,
        dense=name in CONTENDERS and CONTENDERS[name].dense,
        direction=str(row["direction"]),
        median_ms=row["median_ms"],
        repeats=int(row.get("repeats", 0)),
        peak_bytes=row.get("peak_bytes"),
    )


def _kernels(spec: Spec, tokens: int, kernels: Sequence[Mapping[str, Any]], gpu_key: str | None) -> list[KernelRow]:
    known = estimates(spec, tokens, gpu_key)
    found = []
    for kernel in kernels:
        name = str(kernel["kernel"]).removesuffix("_kernel")
        one = known.get(name)
        # A kernel that the spec's program does not have any more is told by its name alone.
        direction = one.direction if one else "backward" if "backward" in name else "forward"
        branch = one.branch if one else _branch(name)
        costs = (one.flops, one.bytes, 1000 * one.seconds_floor, one.limited_by) if one else (0.0, 0.0, None, "")
        place = (spec.name, "independent", tokens, name[:120], branch, direction)
        found.append(KernelRow(*place, float(kernel["ms"]), int(kernel["launches"]), *costs))
    return found


def _branch(name: str) -> str:
    for start, branch in (("compressed", "cmp"), ("select", "slc"), ("window", "win")):
        if name.startswith(start):
            return branch
    return OTHER
