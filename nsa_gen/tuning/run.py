"""A tuning from its settings to its report: compiled, searched on every GPU, saved; a run that is cut short resumes."""

from __future__ import annotations

import functools
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nsa_gen
from nsa_gen._resources import cache_dir
from nsa_gen.hardware import GPUS, Gpu, UnknownGpuError, find_gpu
from nsa_gen.lowering import Plan, lower
from nsa_gen.rendering import generate, render
from nsa_gen.tuning.backend import Backend, BackendLost, Crew, gpu_backend
from nsa_gen.tuning.race import BACKWARD, DECODE, FORWARD, Journal
from nsa_gen.tuning.search import BucketResult, Search
from nsa_gen.tuning.space import Bucket, check_tokens
from nsa_gen.tuning.stage0 import EFFORTS, Compiler, Estimate, Selection, estimate, select, spaces_of
from nsa_gen.tuning.store import (
    Device,
    Entry,
    Identity,
    Provenance,
    Store,
    kernels_of,
    merge_into_bundle,
    merged,
)

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

Say = Callable[[str], None]


DEFAULT_SHAPES = (8192, 65536)
PASSES = (
    (FORWARD,),
    (FORWARD, BACKWARD),
    (FORWARD, DECODE),
    (FORWARD, BACKWARD, DECODE),
    (DECODE,),
)

Show = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What a tuning was asked for.

    Attributes:
        shapes: key tokens of the buckets; of decode, what a cache may hold.
        batch: sequences of a call, or several numbers of them.
        packed: of every bucket.
        passes: forward, forward and backward, or these with decode, or decode alone; if None, forward and, where the
            spec has it, backward.
        effort: a name of EFFORTS.
        budget: seconds after which no further kernel is begun; None for no limit.
        resume: take what an interrupted run has found.
        out: a package's `tuned` folder or a .json file, in place of the user's cache.
        jobs: compiling processes; as many as CPU cores if None.
        seed: of the inputs.
    """

    shapes: tuple[int, ...] = DEFAULT_SHAPES
    batch: int | Sequence[int] = 1
    packed: bool = False
    passes: tuple[str, ...] | None = None
    effort: str = "default"
    budget: float | None = None
    resume: bool = False
    out: Path | None = None
    jobs: int | None = None
    seed: int = 0

    def buckets(self, passes: Sequence[str]) -> list[Bucket]:
        """What is tuned for some passes, each bucket once; those of decode come last."""
        batches = (self.batch,) if isinstance(self.batch, int) else tuple(self.batch)
        kinds = [decode for decode in (False, True) if (DECODE in passes if decode else FORWARD in passes)]
        every = itertools.product(kinds, self.shapes, batches)
        return list(dict.fromkeys(Bucket.of(tokens, n, self.packed, decode) for decode, tokens, n in every))


@dataclass(frozen=True)
class TuneReport:
    """Everything a tuning found.

    `selections` is what stage 0 left, by bucket; `quarantined` maps candidates to the reason they failed. `device` is
    None where nothing was measured (`--dry-run`), and `expected` then says how long measuring would take.
    """

    name: str
    target: str
    device: Device | None
    selections: dict[Bucket, tuple[Selection, ...]]
    results: tuple[BucketResult, ...] = ()
    quarantined: dict[str, str] = field(default_factory=dict)
    measured: int = 0
    resumed: int = 0
    journal: Path | None = None
    seconds: float = 0.0
    expected: Estimate | None = None

    @property
    def wrong(self) -> dict[str, str]:
        """Candidates that computed something else: each is a fault of a kernel or of the compiler."""
        return {name: reason for name, reason in self.quarantined.items() if reason.startswith("wrong")}

    @property
    def ok(self) -> bool:
        """Every bucket has a result that was saved, and no candidate was wrong."""
        return not self.wrong and all(not each.problem for each in self.results)

    def to_json(self) -> dict[str, Any]:
        """The report as `json.dumps` takes it."""
        plain = {name: getattr(self, name) for name in ("ok", "name", "target", "quarantined", "measured", "resumed")}
        return {
            **plain,
            "gpu": None if self.device is None else asdict(self.device),
            "results": [each.to_json() for each in self.results],
            "journal": None if self.journal is None else str(self.journal),
            "seconds": round(self.seconds, 1),
            "expected": None if self.expected is None else asdict(self.expected),
            "stage0": {bucket.name: [asdict(each) for each in found] for bucket, found in self.selections.items()},
        }


@dataclass
class Tools:
    """What a tuning works with, for tests to replace.

    `backend` makes what measures on the GPU of a number; `compiler` what compiles for a target.
    """

    say: Say = lambda line: None
    show: Show = lambda done, total, what: None
    backend: Callable[[Path, Spec, Settings, int, Say], Backend] | None = None
    compiler: Callable[..., Any] = Compiler
    store: Store = field(default_factory=Store)


def tune(spec: Spec | str | os.PathLike[str], *, tools: Tools | None = None, **settings: Any) -> TuneReport:
    """Search for the best configurations of a spec's kernels on the GPUs of this machine, and save them.

    Args:
        spec: a Spec, a path, or the name of a shipped spec.
        tools: receives progress and errors; by default, they are discarded.
        **settings: fields of `Settings`: shapes, batch, packed, passes, effort, budget, resume, out, jobs, seed.

    Raises:
        nsa_gen.spec.SpecError: the spec is invalid.
        BackendLost: there is no GPU, or none can measure.
        UnknownGpuError: the hardware table has no entry for the GPU's architecture.
        ValueError: a setting is wrong.
    """
    return _Tuning(_loaded(spec), Settings(**settings), tools or Tools()).run()


def dry_run(
    spec: Spec | str | os.PathLike[str], gpu: str, *, tools: Tools | None = None, **settings: Any
) -> TuneReport:
    """Stage 0 alone, which needs no GPU: what would be measured on a GPU of the hardware table ("h100", "sm_90").

    Raises:
        UnknownGpuError: there is no such GPU in the table.
    """
    return _Tuning(_loaded(spec), Settings(**settings), tools or Tools()).dry_run(find_gpu(gpu))


def _loaded(spec: Spec | str | os.PathLike[str]) -> Spec:
    from nsa_gen.spec import Spec, load_spec

    return spec if isinstance(spec, Spec) else load_spec(spec)


class _Tuning:
    def __init__(self, spec: Spec, settings: Settings, tools: Tools) -> None:
        if settings.effort not in EFFORTS:
            raise ValueError(f"effort: expected one of {', '.join(EFFORTS)}, got {settings.effort!r}")
        self._passes = tuple(settings.passes or (name for name in spec.passes if name != DECODE))
        if self._passes not in PASSES or set(self._passes) - set(spec.passes):
            raise ValueError(
                "passes: expected forward, or forward and backward, then decode, or decode alone, as the spec has "
                f"them ({', '.join(spec.passes)}), got {', '.join(self._passes)}"
            )
        self._spec, self._settings, self._tools = spec, settings, tools
        self._effort = EFFORTS[settings.effort]
        self._program: Plan = lower(spec)
        files = render(spec)
        self._kernels = kernels_of(files)
        self._decode_kernels = kernels_of(files, decode=True) if DECODE in self._passes else ""
        self._buckets = settings.buckets(self._passes)
        self._started = time.monotonic()
        self._deadline = self._started + (float("inf") if settings.budget is None else settings.budget)

    def dry_run(self, gpu: Gpu) -> TuneReport:
        with work_folder(self._spec, self._kernels, self._tools.say) as (work, package):
            selections = self._stage0(self._compiler(package, gpu, work), gpu)
        seconds = time.monotonic() - self._started
        expected = estimate(selections, self._effort, self._settings.jobs or os.cpu_count() or 1)
        return TuneReport(self._spec.name, gpu.target, None, selections, seconds=seconds, expected=expected)

    def run(self) -> TuneReport:
        say = self._tools.say
        with ExitStack() as stack:
            work, package = stack.enter_context(work_folder(self._spec, self._kernels, say))
            backends, device = self._backends(package)
            stack.callback(lambda: [backend.close() for backend in backends])
            gpu = device.gpu
            if gpu is None:
                known = ", ".join(dict.fromkeys(each.target for each in GPUS))
                raise UnknownGpuError(f"gpu: expected an architecture of {known}, got {device}")
            path = stack.enter_context(own_file(work / f"{device.slug}.{'-'.join(self._passes)}.journal.jsonl", say))
            journal = Journal(path, self._heading(device), resume=self._settings.resume)
            stack.callback(journal.close)
            crew = Crew(backends, journal)
            stack.callback(crew.close)
            if journal.resumed:
                say(f"resumed: {journal.resumed} answers from {path}")
            try:
                return self._search(crew, device, gpu, self._compiler(package, gpu, work), journal)
            except (KeyboardInterrupt, BackendLost):
                say(f"stopped; nothing is lost: the same command with --resume goes on from {path}")
                raise

    def _search(self, crew: Crew, device: Device, gpu: Gpu, compiler: Any, journal: Journal) -> TuneReport:
        selections = self._stage0(compiler, gpu)
        results: list[BucketResult] = []
        for number, bucket in enumerate(self._buckets):
            now = time.monotonic()
            share = (self._deadline - now) / (len(self._buckets) - number)
            what = (self._program, gpu.target, bucket, selections[bucket], crew, self._passes_of(bucket))
            found = Search(*what, self._effort, now + share, self._tell).run()
            results.append(self._concluded(found, device, journal))
        return TuneReport(
            self._spec.name,
            gpu.target,
            device,
            selections,
            tuple(results),
            quarantined=crew.quarantined,
            measured=crew.measured,
            resumed=journal.resumed,
            journal=journal.path,
            seconds=time.monotonic() - self._started,
        )

    def _compiler(self, package: Path, gpu: Gpu, work: Path) -> Any:
        return self._tools.compiler(package, gpu.target, self._passes, work / "triton", self._settings.jobs)

    def _stage0(self, compiler: Any, gpu: Gpu) -> dict[Bucket, tuple[Selection, ...]]:
        spaces = {
            bucket: spaces_of(self._program, gpu, bucket, self._effort.candidates, self._passes_of(bucket))
            for bucket in self._buckets
        }
        total = sum(len(each.candidates) for found in spaces.values() for each in found)
        done = 0

        def count(key: str, answer: Any) -> None:
            nonlocal done
            done += 1
            self._tools.show(done, total, f"compiled {json.loads(key)[0]}")

        return {
            bucket: tuple(select(found, compiler, gpu, bucket, check_tokens(self._spec), count))
            for bucket, found in spaces.items()
        }

    def _backends(self, package: Path) -> tuple[list[Backend], Device]:
        """A backend for each GPU like the first."""
        make = self._tools.backend or gpu_backend
        first = make(package, self._spec, self._settings, 0, self._tools.say)
        found = [first]
        try:
            device = first.device()
            for number in range(1, device.count):
                other = make(package, self._spec, self._settings, number, self._tools.say)
                found.append(other)
                if other.device().name != device.name:
                    found.pop().close()
        except BaseException:
            for backend in found:
                backend.close()
            raise
        return found, device

    def _passes_of(self, bucket: Bucket) -> tuple[str, ...]:
        return tuple(name for name in self._passes if (name == DECODE) == bucket.decode)

    def _identity(self, device: Device, bucket: Bucket) -> Identity:
        return Identity.of(self._program, self._decode_kernels if bucket.decode else self._kernels, device, bucket)

    def _heading(self, device: Device) -> dict[str, Any]:
        identity = asdict(self._identity(device, self._buckets[0]))
        del identity["bucket"]
        versions = {"driver": device.driver, "torch": device.torch, "triton": device.triton}
        return {**identity, **versions, "passes": list(self._passes), "seed": self._settings.seed}

    def _concluded(self, found: BucketResult, device: Device, journal: Journal) -> BucketResult:
        """Save what a search found; what cannot be saved is still in the journal and in the report."""
        if found.problem:
            return found
        passes, now = self._passes_of(found.bucket), datetime.now(UTC).isoformat(timespec="seconds")
        result = {"gain": round(found.gain, 4), "noise": round(found.noise, 4), "passes": list(passes)}
        entry = Entry(
            self._identity(device, found.bucket),
            found.configs,
            Provenance(device.driver, device.torch, device.triton, nsa_gen.__version__, now),
            {**result, "effort": self._effort.name, "ms": found.times},
        )
        journal.put(f"winner {found.bucket.name}", "winner", entry.to_json())
        saved, problem = self._save(entry)
        return replace(found, saved=saved, problem=problem)

    def _save(self, entry: Entry) -> tuple[Path | None, str]:
        out, merge = self._settings.out, functools.partial(merged, self._program)
        try:
            if out is None:
                return self._tools.store.save(entry, merge), ""
            path = out if out.suffix == ".json" else out / f"{entry.identity.device.slug}.json"
            merge_into_bundle(path, entry, merge)
        except OSError as error:
            return None, f"not saved: {error}; --resume saves it without measuring anew"
        return path, ""

    def _tell(self, done: int, total: int, best: float, what: str) -> None:
        found = f"best so far {1 / best:.2f}x" if best < 1 else "nothing better yet"
        left = self._deadline - time.monotonic()
        budget = "" if left == float("inf") else f", {max(left, 0):.0f} s of the budget left"
        self._tools.show(done, total, f"{what}: {found}{budget}")


@contextmanager
def work_folder(spec: Spec, kernels: str, say: Say) -> Iterator[tuple[Path, Path]]:
    """A folder of the cache, with the package in it; a temporary one where the cache is read-only."""
    folder = cache_dir() / "tuning" / f"{spec.name}-{spec.digest()}-{kernels}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # which a read-only folder refuses
            package = generate(spec, folder / "package")
    except OSError as error:
        say(f"the cache cannot be written ({error}); working in a temporary folder, so this run cannot be resumed")
        with tempfile.TemporaryDirectory(prefix="nsa_gen_tune_") as temporary:
            yield Path(temporary), generate(spec, Path(temporary) / "package")
        return
    yield folder, package


@contextmanager
def own_file(path: Path, say: Say) -> Iterator[Path]:
    """A file that no other tuner writes: this one, or, while another has it, one named after this process."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another tuner writes {path.name}; this one keeps a journal of its own")
        yield path.with_name(path.name.replace(".journal", f".{os.getpid()}.journal"))
        return
    except OSError:  # a folder that has become read-only: the journal will say so
        yield path
        return
    try:
        yield path
    finally:
        lock.release()
