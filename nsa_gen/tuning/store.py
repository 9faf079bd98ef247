"""Tuned entries: what each was made for and with, and where they are kept, as readable JSON files.

    <cache>/tuned/<spec>-<dtype>-<kernels>/<gpu>/<bucket>.json     the user's cache: one entry per file
    <package>/tuned/<gpu>.json                                     shipped: the entries of one GPU in one file

An entry is used only if its identity matches. If its provenance differs, there is a warning. Files are replaced as a
whole, under a lock, so many processes may write, and any number may read. A file that cannot be understood (truncated,
of an older schema, not JSON) is set aside under another name with a warning.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from nsa_gen._files import json_text, one_at_a_time, parse_json, read_text, write_whole
from nsa_gen._resources import cache_dir
from nsa_gen.bench.records import validated
from nsa_gen.hardware import GPUS, Gpu, gpu_for_device
from nsa_gen.lowering import Plan
from nsa_gen.rendering.identity import ATTENTION, DECODE, MEASUREMENT, TUNED_SCHEMA, space_digest
from nsa_gen.rendering.legality import check_of
from nsa_gen.tuning.space import Bucket

Configs = dict[str, dict[str, int]]
Merge = Callable[["Entry", "Entry"], "Entry"]
"""Merges an earlier entry and a new one of the same identity."""
LOCK_SECONDS = 60.0


class CacheWarning(UserWarning):
    """A file of the cache was set aside, or could not be set aside."""


def slug(name: str) -> str:
    """A device's name in a form that can be part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "gpu"


@dataclass(frozen=True)
class Device:
    """A GPU, with the name that its driver reports.

    `driver`, `torch` and `triton` are versions, "" if unknown. `count` is the number of such GPUs in the machine.
    """

    name: str
    multiprocessors: int
    architecture: str
    driver: str = ""
    torch: str = ""
    triton: str = ""
    count: int = 1

    @property
    def slug(self) -> str:
        """The name in a form that can be part of a file name: nvidia_h100_80gb_hbm3."""
        return slug(self.name)

    @property
    def gpu(self) -> Gpu | None:
        """Its entry in the hardware table: the board of that name, otherwise the first of that architecture."""
        named = gpu_for_device(self.name)
        if named is not None and named.target == self.architecture:
            return named
        return next((gpu for gpu in GPUS if gpu.target == self.architecture), None)


@dataclass(frozen=True)
class Identity:
    """Everything that must match for an entry to be used.

    Attributes:
        spec: the spec's name; it is only part of folder names.
        kernels, space: digests of the kernels' code and of the space (`nsa_gen.rendering.identity`).
        dtype: dtype of the operator's tensors.
        measurement: version of the timing method.
        gpu, multiprocessors, architecture: the device, with the name that its driver reports.
        bucket: the calls for which the entry was measured.
    """

    spec: str
    kernels: str
    space: str
    dtype: str
    measurement: str
    gpu: str
    multiprocessors: int
    architecture: str
    bucket: Bucket

    @property
    def device(self) -> Device:
        """The GPU, without the versions used for measuring."""
        return Device(self.gpu, self.multiprocessors, self.architecture)

    @classmethod
    def of(cls, program: Plan, kernels: str, device: Device, bucket: Bucket) -> Identity:
        """The identity of what is tuned now."""
        spec = program.spec
        return cls(
            spec.name,
            kernels,
            space_digest(program, DECODE if bucket.decode else ATTENTION),
            spec.dtype,
            MEASUREMENT,
            device.name,
            device.multiprocessors,
            device.architecture,
            bucket,
        )


@dataclass(frozen=True)
class Provenance:
    """The versions with which an entry was made, and the time (ISO 8601, UTC)."""

    driver: str = ""
    torch: str = ""
    triton: str = ""
    nsa_gen: str = ""
    date: str = ""


def kernels_of(files: dict[str, str], *, decode: bool = False) -> str:
    """The digest of the kernels, or of those of decode, that a rendered package carries.

    Raises:
        ValueError: it carries none. A package without decode has no digest of decode.
    """
    found = json.loads(files["tiles.json"])["identity"].get("decode_kernels" if decode else "kernels")
    if found is None:
        raise ValueError("files: expected a package that decodes, got one without")
    return found


Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class _Sides:
    """Milliseconds of a pass with the default's configurations and with the tuned ones."""

    default: Positive
    tuned: Positive


@dataclass(frozen=True)
class _Result:
    """The shown parts of an entry's result."""

    gain: Positive = 1.0
    ms: dict[str, dict[str, _Sides]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One tuned bucket: what it is for, what it was made with, the configurations, and their result.

    `result` is for readers: "gain" is the default's time divided by the winner's, and "ms" has milliseconds by kind of
    input and pass, for the "default" and the "tuned" configurations.
    """

    identity: Identity
    configs: Configs
    provenance: Provenance = field(default_factory=Provenance)
    result: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The entry as it is in a file."""
        parts = asdict(self)
        return {name: parts[name] for name in ("identity", "configs", "result", "provenance")}

    @classmethod
    def from_json(cls, document: Any) -> Entry:
        """The inverse of `to_json`.

        Raises:
            ValueError: the document is something else.
        """
        if not isinstance(document, dict):
            raise ValueError(f"entry: expected an object, got {type(document).__name__}")
        if not _is_finite(document):
            raise ValueError("expected finite numbers, got NaN or Infinity, which are no JSON")
        parts = {"result": {}, "provenance": {}, **document}
        for name in ("identity", "configs", "provenance", "result"):
            if not isinstance(parts.get(name), dict):
                raise ValueError(f"{name}: expected an object, got {type(parts.get(name)).__name__}")
        for kernel, values in parts["configs"].items():
            good = isinstance(values, dict) and all(type(value) is int and value >= 0 for value in values.values())
            if not good:
                raise ValueError(f"configs.{kernel}: expected whole numbers by name, got {values!r:.200}")
        validated(_Result, parts["result"], "result.")
        # Versions that are missing or not text are unknown.
        versions = {each.name: parts["provenance"].get(each.name) for each in fields(Provenance)}
        made_with = Provenance(**{name: value for name, value in versions.items() if isinstance(value, str)})
        return cls(validated(Identity, parts["identity"], "identity."), parts["configs"], made_with, parts["result"])


def _is_finite(value: Any) -> bool:
    """Whether a JSON value contains no NaN and no infinity."""
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


class Unreadable(ValueError):
    """A file holds no entries of this schema."""


def read_each(path: Path) -> list[Entry | Unreadable]:
    """The entries of a file, one or several. A bad entry is replaced by what is wrong with it.

    Raises:
        Unreadable: the file has no tuned entries of today's schema.
        OSError: it cannot be read, or is not a regular file.
    """
    try:
        # NaN and Infinity are not JSON, but only the entry that has them is affected.
        document = parse_json(read_text(path), finite=False)
    except ValueError as error:
        raise Unreadable(f"{path}: no JSON, perhaps cut short: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != TUNED_SCHEMA:
        schema = document.get("schema") if isinstance(document, dict) else None
        raise Unreadable(f"{path}: schema: expected {TUNED_SCHEMA}, got {schema!r:.80}")
    listed = document.get("entries", [document])
    if not isinstance(listed, list):
        raise Unreadable(f"{path}: entries: expected a list, got {listed!r:.80}")
    found: list[Entry | Unreadable] = []
    for each in listed:
        try:
            found.append(Entry.from_json(each))
        except (ValueError, TypeError) as error:
            found.append(Unreadable(f"{path}: {error}"))
    return found


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file as from `read_each`. Also raises Unreadable if one of them is bad."""
    good = []
    for each in read_each(path):
        if isinstance(each, Unreadable):
            raise each
        good.append(each)
    return good


def write_entries(path: Path, entries: Iterable[Entry], *, bundle: bool) -> None:
    """Write entries to a file, atomically. A bundle holds any number of entries in the order of their buckets."""
    listed = sorted(entries, key=lambda each: each.identity.bucket)
    document: dict[str, Any] = {"schema": TUNED_SCHEMA}
    document |= {"entries": [each.to_json() for each in listed]} if bundle else listed[0].to_json()
    write_whole(path, json_text(document) + "\n")


class Store:
    """The user's cache of tuned entries."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (cache_dir() if root is None else root) / "tuned"

    def path(self, identity: Identity) -> Path:
        """The path of the entry of this identity, whether it exists or not."""
        package = f"{identity.spec}-{identity.dtype}-{identity.kernels}"
        return self.root / package / slug(identity.gpu) / f"{identity.bucket.name}.json"

    def save(self, entry: Entry, merge: Merge | None = None) -> Path:
        """Write an entry, replacing one with the same kernels, GPU and bucket. Raises OSError if that is impossible.

        `merge`, if given, combines an existing entry of exactly this identity with the new one.
        """
        path = self.path(entry.identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.locked():
            earlier = self.load(entry.identity) if merge is not None else None
            write_entries(path, [entry if earlier is None or merge is None else merge(earlier, entry)], bundle=False)
        return path

    def load(self, identity: Identity) -> Entry | None:
        """The entry of exactly this identity, or None."""
        path = self.path(identity)
        found = self._read(path) if path.is_file() else []
        return next((each for each in found if each.identity == identity), None)

    def all(self) -> Iterator[tuple[Path, Entry]]:
        """Every entry with its file. Files that cannot be understood are first set aside."""
        for path in sorted(self.root.glob("*/*/*.json")):
            for entry in self._read(path):
                yield path, entry

    def remove(self, paths: Iterable[Path]) -> int:
        """Delete files of the cache. Returns how many existed."""
        count = 0
        with self.locked():
            for path in paths:
                if path.is_file():
                    path.unlink()
                    count += 1
                for folder in (path.parent, path.parent.parent):
                    with suppress(OSError):  # it holds other files
                        folder.rmdir()
        return count

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the cache's lock. The operating system releases it if this process dies."""
        from filelock import FileLock

        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / ".lock", timeout=LOCK_SECONDS):
            yield

    def _read(self, path: Path) -> list[Entry]:
        try:
            return read_entries(path)
        except FileNotFoundError:  # another process has just removed it
            return []
        except Unreadable as error:
            set_aside(path, str(error))
        except OSError as error:
            warnings.warn(f"{path} cannot be read: {error}", CacheWarning, stacklevel=3)
        return []


def set_aside(path: Path, reason: str) -> Path | None:
    """Rename a file to `<name>.bad`, keeping earlier ones, with a warning. Returns None if that fails."""
    for number in range(1000):
        target = path.with_name(f"{path.name}.bad{number or ''}")
        if not target.exists():
            break
    try:
        path.rename(target)
    except OSError as error:
        warnings.warn(f"{reason}; it could not be set aside: {error}", CacheWarning, stacklevel=3)
        return None
    warnings.warn(f"{reason}; set aside as {target.name}", CacheWarning, stacklevel=3)
    return target


def merge_into_bundle(path: Path, entry: Entry, merge: Merge | None = None) -> None:
    """Add an entry to a shipped file, replacing one of the same bucket. Entries of other kernels are dropped.

    Entries of decode and of the other passes have different kernels and do not affect each other. `merge` is as in
    `Store.save`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path, LOCK_SECONDS):
        kept: list[Entry] = []
        if path.exists():
            try:
                found = read_each(path)
                kept = [each for each in found if isinstance(each, Entry)]
                for each in found:
                    if isinstance(each, Unreadable):
                        warnings.warn(f"{each}; this entry is dropped", CacheWarning, stacklevel=2)
            except Unreadable as error:
                set_aside(path, str(error))
        mine = entry.identity
        if merge is not None and (earlier := next((each for each in kept if each.identity == mine), None)):
            entry = merge(earlier, entry)
        write_entries(path, [*(each for each in kept if _beside(each.identity, mine)), entry], bundle=True)


def _beside(other: Identity, mine: Identity) -> bool:
    """Whether an entry stays in a bundle when a new one is added."""
    if other.bucket.decode != mine.bucket.decode:
        return True
    same = (other.kernels, other.space, other.measurement) == (mine.kernels, mine.space, mine.measurement)
    return same and other.bucket != mine.bucket


def merged(program: Plan, earlier: Entry, entry: Entry) -> Entry:
    """Combine entries: tuning only the forward keeps the backward's kernels and times of an earlier entry.

    Values that the package refuses are not kept.
    """
    check = check_of(program)
    before = {name: values for name, values in earlier.configs.items() if not check(name, values)}
    passes = entry.result["passes"]
    others = [name for name in earlier.result.get("passes", ()) if name not in passes]
    if not others:
        return entry
    kept = {kernel.name for kernel in program.kernels if kernel.direction in others}
    decided = {kernel.choice[0] for kernel in program.kernels if kernel.choice and kernel.direction in passes}
    configs = {name: values for name, values in before.items() if name in kept} | entry.configs
    for decision in program.decisions:
        # The new tuning chooses who runs the tuned kernels. The other values of a decision serve other passes too.
        default = program.defaults[entry.identity.architecture][decision.name].mapping()
        old = before.get(decision.name, default)
        new = entry.configs.get(decision.name, default)
        configs[decision.name] = {name: new[name] if name in decided else old[name] for name in default}
        if configs[decision.name] == default:
            del configs[decision.name]
    then, now = earlier.result.get("ms", {}), entry.result["ms"]
    times = {kind: {**then.get(kind, {}), **now.get(kind, {})} for kind in {**then, **now}}
    return replace(entry, configs=configs, result={**entry.result, "passes": [*passes, *others], "ms": times})
