"""Compile every kernel of a package for every architecture, on a machine that may have no GPU at all.

What is compiled is what would be launched: see `launches`. A kernel that fails, hangs or takes the compiler down with
it is a row of the report with its reason; the others are still compiled.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_gen._resources import cache_dir as user_cache_dir
from nsa_gen.hardware import TABLES, TARGETS, gpu_for_target
from nsa_gen.targets.resources import Resources, excess
from nsa_gen.workers import Worker, WorkerFailure, share, worker_environment

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

HEAVY_SPILL_BYTES = 128
"""Local memory of a thread from which a kernel is flagged: 32 registers written out and read back."""

COMPILER = (sys.executable, "-m", "nsa_gen.targets.worker")
TRITON_TOOLS = {"TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_CUOBJDUMP_PATH", "TRITON_LIBDEVICE_PATH"}
"""Variables of Triton that a compiling process keeps."""

ALL_PASSES = ("forward", "backward", "decode")
VARIANTS = ("batched", "packed")
"""The calls whose launches are compiled: of sequences of one length, and of packed ones."""


@dataclass(frozen=True)
class Compilation:
    """One kernel, as launched, for one architecture.

    Attributes:
        kernel: the kernel's name.
        module: the package's module it stands in; empty, and `kernel` "(launches)", when no launch could be recorded.
        variants: the calls that launch exactly this code: "batched", "packed" or both.
        target: the architecture, e.g. "sm_90".
        shared_memory_limit: bytes of shared memory a block may have on this architecture.
        constants: the kernel's declared constants, tile sizes among them.
        num_warps, num_stages: launch options; 0 when the launch was not understood.
        resources: what a block needs; None when it did not compile.
        seconds: wall time of the compilation in this run.
        cached: the machine code was there from an earlier run, so `seconds` is the time to find it.
        reason: why `ok` is False, on one line; empty when it is True.
        detail: the compiler's whole message, where it failed.
    """

    kernel: str
    module: str
    variants: tuple[str, ...]
    target: str
    shared_memory_limit: int
    constants: dict[str, Any] = field(default_factory=dict, hash=False)
    num_warps: int = 0
    num_stages: int = 0
    resources: Resources | None = None
    seconds: float = 0.0
    cached: bool = False
    reason: str = ""
    detail: str = ""

    @property
    def ok(self) -> bool:
        """The kernel compiled and a block of it fits the device."""
        return not self.reason

    @property
    def spills_heavily(self) -> bool:
        """A thread keeps `HEAVY_SPILL_BYTES` or more in local memory: right, but the tile is too big for its warps."""
        return bool(self.resources and (self.resources.spill_bytes or 0) >= HEAVY_SPILL_BYTES)


@dataclass(frozen=True)
class CompileReport:
    """Every kernel for every architecture asked for.

    Attributes:
        name: the package's name.
        rows: one `Compilation` a kernel and architecture; architectures as asked for, kernels in launch order.
        seconds: wall time of the whole.
        versions: of python, torch and triton, as the compiling process had them; empty when it could not start.
    """

    name: str
    rows: tuple[Compilation, ...]
    seconds: float
    versions: dict[str, str] = field(hash=False)

    @property
    def ok(self) -> bool:
        """There is at least one row and all of them are ok."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON takes it (`json.dumps` needs nothing more)."""
        rows = [{**asdict(row), "ok": row.ok, "spills_heavily": row.spills_heavily} for row in self.rows]
        return json.loads(
            json.dumps(
                {"name": self.name, "ok": self.ok, "seconds": self.seconds, "versions": self.versions, "rows": rows}
            )
        )


Progress = Callable[[int, int, str], None]
"""Called with (done, total, what was just done), in the caller's process, one call at a time."""


@dataclass(frozen=True)
class _Job:
    """A launch to compile, by the worker's key and the call that it is of, and its row so far."""

    key: str
    packed: bool
    row: Compilation


def compile_spec(
    spec: Spec | str | os.PathLike[str],
    targets: Iterable[str] = TABLES,
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
    passes: Iterable[str] | None = None,
    variants: Iterable[str] = VARIANTS,
    tokens: int = 4096,
    batch: int = 2,
    kernel_timeout: float = 300.0,
    cache_dir: str | os.PathLike[str] | None = None,
    triton_path: str | os.PathLike[str] | None = None,
) -> CompileReport:
    """Compile a spec's kernels ahead of time; needs no GPU and no driver.

    Args:
        spec: a `Spec` (its package is generated in a temporary folder) or the folder of a generated package.
        targets: architectures, each in `TARGETS`; duplicates count once. The default is those with their own default
            configurations.
        jobs: number of worker processes; by default, the number of CPU cores.
        progress: called after every kernel.
        passes: some of "forward", "backward" and "decode"; by default those of the spec, or all for a folder.
        variants: some of "batched" and "packed": the calls whose launches are compiled; by default both.
        tokens: sequence length of the traced call; launches depend only on whether it is divisible by 16.
        batch: number of sequences in the traced call.
        kernel_timeout: seconds after which a kernel is reported as failed and its process is ended.
        cache_dir: folder that keeps machine code between runs; by default the user's cache folder or, with a
            warning, a temporary one if that cannot be written.
        triton_path: a folder with another Triton (`pip install --no-deps --target`) that is used instead of the
            installed one.

    Raises:
        UnknownGpuError: an architecture is not in the table.
        ValueError: no target, no variant or an unknown one, or jobs, tokens, batch or kernel_timeout not positive.
        FileNotFoundError: `spec` names a folder without a package.
    """
    started = time.monotonic()
    wanted = tuple(dict.fromkeys(gpu_for_target(target).target for target in targets))
    if not wanted:
        raise ValueError(f"targets: expected at least one of {', '.join(TARGETS)}, got none")
    calls = tuple(dict.fromkeys(variants))
    if not calls or not set(calls) <= set(VARIANTS):
        raise ValueError(f"variants: expected some of {', '.join(VARIANTS)}, got {', '.join(calls) or 'none'}")
    jobs = (os.cpu_count() or 1) if jobs is None else jobs
    for name, value in (("jobs", jobs), ("tokens", tokens), ("batch", batch), ("kernel_timeout", kernel_timeout)):
        if value <= 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    with tempfile.TemporaryDirectory(prefix="nsa_gen_compile_") as scratch:
        package, given_passes = _package_of(spec, Path(scratch))
        opening = {
            "package": str(package),
            "tokens": tokens,
            "batch": batch,
            "passes": list(passes if passes is not None else given_passes),
        }
        cache = Path(cache_dir) if cache_dir is not None else _user_cache(Path(scratch))
        other_triton = Path(triton_path).resolve() if triton_path is not None else None
        environment = compiler_environment(cache.resolve(), other_triton)
        rows, versions = _compile_all(opening, environment, wanted, calls, jobs, progress, kernel_timeout)
    return CompileReport(package.name, rows, time.monotonic() - started, versions)


def _user_cache(scratch: Path) -> Path:
    """The folder of the user's cache that keeps machine code; where it cannot be written, one that goes with us."""
    folder = user_cache_dir() / "triton"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        warnings.warn(f"the cache cannot be written ({error}); nothing compiled is kept", stacklevel=3)
        return scratch / "triton"


def compiler_environment(cache_dir: Path, triton_path: Path | None = None) -> dict[str, str]:
    """The environment of a process that compiles or measures: Triton of `triton_path`, kernels cached in `cache_dir`.

    Variables that change what Triton compiles are left out: the result is about the package, not the caller's shell.
    """
    environment = worker_environment(*([triton_path] if triton_path else []))
    for name in [each for each in environment if each.startswith("TRITON_") and each not in TRITON_TOOLS]:
        del environment[name]
    return {**environment, "TRITON_CACHE_DIR": str(cache_dir), "PYTHONDONTWRITEBYTECODE": "1"}


def _package_of(spec: Spec | str | os.PathLike[str], scratch: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder of the package and the passes it has."""
    if isinstance(spec, str | os.PathLike):
        folder = Path(os.path.realpath(spec))
        if not (folder / "__init__.py").is_file():
            raise FileNotFoundError(
                f"spec: expected a Spec or a generated package's folder (with __init__.py), got {folder}; "
                "`nsa-gen generate` makes one"
            )
        return folder, ALL_PASSES
    from nsa_gen.rendering import generate

    return Path(generate(spec, scratch)).resolve(), tuple(spec.passes)


def _compile_all(
    opening: dict[str, Any],
    environment: dict[str, str],
    targets: tuple[str, ...],
    variants: tuple[str, ...],
    jobs: int,
    progress: Progress | None,
    timeout: float,
) -> tuple[tuple[Compilation, ...], dict[str, str]]:
    tracer = Worker(COMPILER, environment, opening)
    try:
        todo, failed, versions = _trace_all(tracer, targets, variants, timeout)
        done = 0

        def count(job: _Job, row: Compilation) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, len(todo), f"{row.kernel} {row.target}")

        # The tracer has imported the package already, so it is the first of the workers.
        workers = [tracer, *(Worker(COMPILER, environment, opening) for _ in range(min(jobs, len(todo)) - 1))]
        rows = share(workers, todo, lambda worker, job: _compile_one(worker, job, timeout), count)
    finally:
        tracer.close()
    return (*failed, *rows), versions


def _trace_all(
    tracer: Worker, targets: tuple[str, ...], variants: tuple[str, ...], timeout: float
) -> tuple[list[_Job], list[Compilation], dict[str, str]]:
    """What is to be compiled, equal code once, and a failed row for each call that could not be traced."""
    todo: list[_Job] = []
    failed: list[Compilation] = []
    versions: dict[str, str] = {}
    for target in targets:
        found: dict[str, _Job] = {}
        limit = gpu_for_target(target).shared_memory_per_block
        for variant in variants:
            packed = variant == "packed"
            try:
                answer = tracer.ask({"do": "trace", "target": target, "packed": packed}, timeout)
            except WorkerFailure as failure:
                reason = f"the package's launches could not be recorded: {failure}"
                row = Compilation("(launches)", "", (variant,), target, limit, reason=reason, detail=failure.detail)
                failed.append(row)
                continue
            versions = answer["versions"]
            for refused in answer["refused"]:
                row = Compilation(refused["kernel"], refused["module"], (variant,), target, limit)
                reason = f"the launch does not fit the kernel: {refused['error']}"
                failed.append(replace(row, reason=reason, detail=refused["detail"]))
            for listed in answer["launches"]:
                key = listed.pop("key")
                if key in found:
                    row = found[key].row
                    found[key] = replace(found[key], row=replace(row, variants=(*row.variants, variant)))
                else:
                    row = Compilation(variants=(variant,), target=target, shared_memory_limit=limit, **listed)
                    found[key] = _Job(key, packed, row)
        todo += found.values()
    return todo, failed, versions


def _compile_one(worker: Worker, job: _Job, timeout: float) -> Compilation:
    start = time.monotonic()
    call = {"target": job.row.target, "packed": job.packed}
    try:
        # Known to the worker unless it is a fresh one: then its start and its tracing are not the kernel's time.
        worker.ask({"do": "trace", **call}, timeout)
        start = time.monotonic()
        answer = worker.ask({"do": "compile", **call, "key": job.key}, timeout)
    except WorkerFailure as failure:
        seconds = round(time.monotonic() - start, 3)
        return replace(job.row, seconds=seconds, reason=str(failure), detail=failure.detail)
    seconds, cached = round(answer.pop("seconds"), 3), answer.pop("cached")
    resources = Resources(**answer)
    reason = excess(resources, gpu_for_target(job.row.target))
    return replace(job.row, resources=resources, seconds=seconds, cached=cached, reason=reason)
