"""Where tuned entries are kept: one readable JSON file for each kernels' digest, GPU and bucket.

    <cache>/tuned/<spec>-<dtype>-<kernels>/<gpu>/<bucket>.json     the user's cache
    <package>/tuned/<gpu>.json                                     shipped: the entries of one GPU in one file

Files are replaced whole, under a lock, so that many processes may write and any number read. A file that cannot be
understood (truncated, of an older schema, no JSON) is set aside under another name with a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_gen._files import json_text, one_at_a_time, parse_json, read_text, write_whole
from nsa_gen._resources import cache_dir
from nsa_gen.rendering.identity import TUNED_SCHEMA
from nsa_gen.rendering.legality import check_of
from nsa_gen.tuning.identity import Identity, Provenance, slug

if TYPE_CHECKING:
    from nsa_gen.lowering import Plan

Configs = dict[str, dict[str, int]]
Merge = Callable[["Entry", "Entry"], "Entry"]
"""Makes one entry of an earlier one and a new one of the same identity."""
LOCK_SECONDS = 60.0


class CacheWarning(UserWarning):
    """A file of the cache was set aside, or could not be."""


@dataclass(frozen=True)
class Entry:
    """One tuned bucket: what it is for, what it was made with, the configurations, and how they did.

    `result` is for readers: "gain" is the default's time over the winner's, "ms" milliseconds by kind of input and
    pass, of the "default" and of what was "tuned".
    """

    identity: Identity
    configs: Configs
    provenance: Provenance = field(default_factory=Provenance)
    result: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The entry as a file holds it."""
        return {
            "identity": self.identity.to_json(),
            "configs": self.configs,
            "result": self.result,
            "provenance": self.provenance.to_json(),
        }

    @classmethod
    def from_json(cls, document: Any) -> Entry:
        """What `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(document, dict):
            raise ValueError(f"entry: expected an object, got {type(document).__name__}")
        if not _is_finite(document):
            raise ValueError("expected finite numbers, got NaN or Infinity, which are no JSON")
        parts = {"provenance": {}, "result": {}, **document}
        for name in ("identity", "configs", "provenance", "result"):
            if not isinstance(parts.get(name), dict):
                raise ValueError(f"{name}: expected an object, got {type(parts.get(name)).__name__}")
        for kernel, values in parts["configs"].items():
            good = isinstance(values, dict) and all(type(value) is int and value >= 0 for value in values.values())
            if not good:
                raise ValueError(f"configs.{kernel}: expected whole numbers by name, got {values!r:.200}")
        _check_result(parts["result"])
        return cls(
            Identity.from_json(parts["identity"]),
            parts["configs"],
            Provenance.from_json(parts["provenance"]),
            parts["result"],
        )


def _check_result(result: dict[str, Any]) -> None:
    """Raise ValueError where what is shown of a result, the gain and the milliseconds, is not what `Entry` says."""
    gain, ms = result.get("gain", 1.0), result.get("ms", {})
    if not _is_positive(gain):
        raise ValueError(f"result.gain: expected a positive number, got {gain!r}")
    try:
        times = [passes[name][side] for passes in ms.values() for name in passes for side in ("default", "tuned")]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"result.ms: expected default and tuned by inputs and pass, got {ms!r:.80}") from None
    if wrong := [time for time in times if not _is_positive(time)]:
        raise ValueError(f"result.ms: expected positive numbers, got {wrong[0]!r}")


def _is_finite(value: Any) -> bool:
    """Whether no number of a JSON value is NaN or infinite."""
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


class Unreadable(ValueError):
    """A file holds no entries of this schema."""


def read_each(path: Path) -> list[Entry | Unreadable]:
    """The entries of a file, one or several; in place of a bad one, what is wrong with it.

    Raises:
        Unreadable: it is not a file of tuned entries of today's schema.
        OSError: it cannot be read, or is no regular file.
    """
    try:
        # NaN and Infinity are no JSON, but concern only the entry that has them.
        document = parse_json(read_text(path), finite=False)
    except ValueError as error:
        raise Unreadable(f"{path}: no JSON, perhaps cut short: {error}") from error
    return each_of(document, path)


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file as `read_each` gives them, which also raises Unreadable where one of them is bad."""
    return _all_good(read_each(path))


def each_of(document: Any, path: Path) -> list[Entry | Unreadable]:
    """The entries of a file's JSON, as `read_each` gives them. Raises Unreadable, naming the path."""
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


def entries_of(document: Any, path: Path) -> list[Entry]:
    """The entries of a file's JSON, as `read_entries` gives them. Raises Unreadable, naming the path."""
    return _all_good(each_of(document, path))


def _all_good(found: Iterable[Entry | Unreadable]) -> list[Entry]:
    good = []
    for each in found:
        if isinstance(each, Unreadable):
            raise each
        good.append(each)
    return good


def write_entries(path: Path, entries: Iterable[Entry], *, bundle: bool) -> None:
    """Write entries as a file, whole or not at all; a bundle holds any number in the order of their buckets."""
    listed = sorted(entries, key=lambda each: each.identity.bucket)
    document: dict[str, Any] = {"schema": TUNED_SCHEMA}
    document |= {"entries": [each.to_json() for each in listed]} if bundle else listed[0].to_json()
    write_whole(path, json_text(document) + "\n")


class Store:
    """The user's cache of tuned entries."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (cache_dir() if root is None else root) / "tuned"

    def path(self, identity: Identity) -> Path:
        """Where an entry of this identity lies, or would."""
        package = f"{identity.spec}-{identity.dtype}-{identity.kernels}"
        return self.root / package / slug(identity.gpu) / f"{identity.bucket.name}.json"

    def save(self, entry: Entry, merge: Merge | None = None) -> Path:
        """Write an entry, in place of one with the same kernels, GPU and bucket. OSError if the cache cannot be.

        `merge`, if given, makes one of the entry of exactly this identity that is there and the new one.
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
        """Every entry with its file; files that cannot be understood are set aside first."""
        for path in sorted(self.root.glob("*/*/*.json")):
            for entry in self._read(path):
                yield path, entry

    def remove(self, paths: Iterable[Path]) -> int:
        """Delete files of the cache; how many were there."""
        count = 0
        with self.locked():
            for path in paths:
                if path.is_file():
                    path.unlink()
                    count += 1
                for folder in (path.parent, path.parent.parent):
                    with suppress(OSError):  # it holds others
                        folder.rmdir()
        return count

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the cache's lock, which is given back by the kernel if this process dies."""
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
    """Rename a file that is in the way to `<name>.bad`, keeping earlier ones, with a warning; None if that fails."""
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
    """Add an entry to a shipped file, in place of one of the same bucket; those of other kernels are dropped.

    Entries of decode and of the other passes have kernels of their own, and leave each other alone. `merge` is as in
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
    """Whether an entry stays in a bundle that gets a new one."""
    if other.bucket.decode != mine.bucket.decode:
        return True
    same = (other.kernels, other.space, other.measurement) == (mine.kernels, mine.space, mine.measurement)
    return same and other.bucket != mine.bucket


def merged(program: Plan, earlier: Entry, entry: Entry) -> Entry:
    """A tuning of the forward alone leaves an earlier one of the backward its kernels, and its times.

    Values that the package refuses are left behind.
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
    for schedule in program.schedules:
        # Who runs the kernels that were tuned is decided anew; the rest of a schedule serves the other passes too.
        default = program.defaults[entry.identity.architecture][schedule.name].mapping()
        old = before.get(schedule.name, default)
        new = entry.configs.get(schedule.name, default)
        configs[schedule.name] = {name: new[name] if name in decided else old[name] for name in default}
        if configs[schedule.name] == default:
            del configs[schedule.name]
    then, now = earlier.result.get("ms", {}), entry.result["ms"]
    times = {kind: {**then.get(kind, {}), **now.get(kind, {})} for kind in {**then, **now}}
    return replace(entry, configs=configs, result={**entry.result, "passes": [*passes, *others], "ms": times})
