"""Lookup of tuned configurations: where they are searched, and which one serves a call. Nothing is measured here.

`nsa-gen tune` writes the configurations, each for one GPU and one bucket of calls. Only entries with this package's
identity are used. They are searched in this order:

1. the file named by NSA_GEN_TUNED,
2. the user's cache, then the tables shipped in the package's tuned/, for exactly this GPU model,
3. the same two for another model of the same architecture.

Within a step, the nearest bucket wins if it is near enough. Without a near entry, the cost model's choice is used (see
tiles). An entry with illegal values (see space) is refused with a warning. NSA_GEN_TUNED=off disables the search, and
NSA_GEN_QUIET=1 disables the log messages.
"""

import functools
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .space import Space

# Buckets of key tokens are powers of two in this range. Buckets of batches are powers of four, or of two for decode.
FEWEST_TOKENS, MOST_TOKENS = 512, 2**21
MOST_BATCH = 4**6
# A bucket at most NEAR steps away still serves. A step is a factor of two in tokens, one bucket of batches, or packed
# against batched. Decode never serves other calls, nor the reverse: they are FAR apart.
NEAR, FAR = 2, 99
# Most bytes of a tuned file; an entry has a few kilobytes.
MOST_BYTES = 2**26
# Errors that may occur in reading a file that is not a tuned file.
_MISREAD = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

_LOG = logging.getLogger(__name__)


class Bucket(NamedTuple):
    """Calls that share their configurations: up to `tokens` key tokens and `batch` sequences, packed or not.

    With `decode`, these are decode steps on caches with a capacity of up to `tokens` tokens per sequence.
    """

    tokens: int
    batch: int
    packed: bool
    decode: bool = False

    def steps(self, other: "Bucket") -> int:
        """Distance between two buckets, in steps."""
        if self.decode != other.decode:
            return FAR
        tokens = abs(self.tokens.bit_length() - other.tokens.bit_length())
        batch = abs(self.batch.bit_length() - other.batch.bit_length()) // (1 if self.decode else 2)
        return tokens + batch + (self.packed != other.packed)


def bucket_of(tokens: int, batch: int, packed: bool) -> Bucket:
    """The bucket of a call. It only compares sizes, so that they can stay symbolic when a compiler traces."""
    rows, entries = FEWEST_TOKENS, 1
    while rows < tokens and rows < MOST_TOKENS:
        rows *= 2
    while entries < batch and entries < MOST_BATCH:
        entries *= 4
    return Bucket(rows, entries, packed)


def decode_bucket(capacity: int, batch: int) -> Bucket:
    """The bucket of decode on a cache, by capacity rather than length: a captured graph serves growing lengths."""
    rows, entries = FEWEST_TOKENS, 1
    while rows < capacity and rows < MOST_TOKENS:
        rows *= 2
    while entries < batch and entries < MOST_BATCH:
        entries *= 2
    return Bucket(rows, entries, packed=False, decode=True)


class Gpu(NamedTuple):
    """Properties that identify a GPU model; entries are made for one."""

    name: str
    multiprocessors: int
    architecture: str


class Identity(NamedTuple):
    """What a tuned entry must match: the spec's name and dtype, the schema and the method of measurement.

    `kernels` is the digest of the code of the kernels and their launches, without comments, docstrings and blank lines.
    `space` is the digest of the legal values that were searched. Decode is tuned separately and has its own digests,
    which are None in a package without decode.
    """

    name: str
    dtype: str
    schema: int
    measurement: str
    kernels: str
    space: str
    decode_kernels: str | None = None
    decode_space: str | None = None


class Tuned:
    """The tuned entries of the package in a folder. Files are read once, and again after `forget`."""

    def __init__(self, folder: Path, identity: Identity, space: Space) -> None:
        self._folder, self._identity, self._space = folder, identity, space
        self._entries: dict[str, tuple[tuple[int, dict[str, Any]], ...]] = {}

    def forget(self) -> None:
        """Read the files again at the next call."""
        self._entries.clear()

    def find(self, gpu: Gpu, bucket: Bucket) -> dict[str, dict[str, int]]:
        """Tuned configurations by kernel for a call on a GPU; empty if none is near enough."""
        found = self._choose(gpu, bucket)
        if found is None:
            _say_once(
                f"nothing is tuned for {gpu.name} near {bucket.tokens} tokens: the cost model's tile sizes are used. "
                f"To tune: nsa-gen tune {self._folder / 'spec.yaml'} {' '.join(_options(bucket))}"
            )
            return {}
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        made_with = found.get("provenance", {})
        others = [
            f"{name} {made_with[name]}" for name in versions if made_with.get(name, versions[name]) != versions[name]
        ]
        if others:
            _say_once(f"configurations were tuned with {' and '.join(others)}; nsa-gen tune measures anew")
        return found["configs"]

    def _choose(self, gpu: Gpu, bucket: Bucket) -> dict[str, Any] | None:
        """The entry that serves a call: first an explicit one, then one for this GPU, then one for this architecture.

        Among these, the nearest bucket wins, then the user's cache.
        """
        best: tuple[tuple[int, int, int], dict[str, Any]] | None = None
        for level, entry in self.entries(os.environ.get("NSA_GEN_TUNED", "")):
            made_for, measured = _measured_on(entry)
            steps = bucket.steps(measured)
            if steps > NEAR or made_for.architecture != gpu.architecture:
                continue
            rank = (0 if level == 0 else 1 if made_for == gpu else 2, steps, level)
            if best is None or rank < best[0]:
                best = rank, entry
        return None if best is None else best[1]

    def entries(self, explicit: str) -> tuple[tuple[int, dict[str, Any]], ...]:
        """All entries made for this package, each with its level: 0 explicit, 1 the user's cache, 2 shipped."""
        if explicit not in self._entries:
            places = () if explicit == "off" else self._places(explicit)
            self._entries[explicit] = tuple(
                (level, entry) for level, paths in enumerate(places) for path in paths for entry in self._read(path)
            )
        return self._entries[explicit]

    def _places(self, explicit: str) -> tuple[list[Path], list[Path], list[Path]]:
        ours = self._identity
        digests = [digest for digest in (ours.kernels, ours.decode_kernels) if digest is not None]
        return (
            [Path(explicit)] if explicit else [],
            [path for digest in digests for path in _cached(f"{ours.name}-{ours.dtype}-{digest}")],
            sorted((self._folder / "tuned").glob("*.json")),
        )

    def _read(self, path: Path) -> Iterator[dict[str, Any]]:
        """The entries of a file that belong to this package. Entries that cannot be parsed are skipped and logged."""
        try:
            found = _entries_of(path, self._identity.schema)
        except _MISREAD as error:
            _say_once(f"{path} is passed over: {type(error).__name__}: {error}")
            return
        for entry in found:
            try:
                ours = self._is_ours(entry)
                problems = [self._space.problem(*each) for each in entry["configs"].items()] if ours else []
            except _MISREAD as error:
                _say_once(f"an entry of {path} is passed over: {type(error).__name__}: {error}")
                continue
            if wrong := "; ".join(filter(None, problems)):
                _warn_once(f"{path}: the entry for {_measured_on(entry)[1]} is refused: {wrong}")
            elif ours:
                yield entry

    def _is_ours(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry matches this package's identity; ValueError if it is malformed."""
        found, ours = entry["identity"], self._identity
        decode = _measured_on(entry)[1].decode
        if not isinstance(entry.get("provenance", {}), dict):
            raise ValueError(f"provenance: expected versions by name, got {entry['provenance']!r}")
        kernels, space = (ours.decode_kernels, ours.decode_space) if decode else (ours.kernels, ours.space)
        wanted = {"kernels": kernels, "space": space, "dtype": ours.dtype, "measurement": ours.measurement}
        return all(found[name] == value for name, value in wanted.items())


def _cached(folder: str) -> list[Path]:
    """Files of a folder of the user's cache, one per GPU and bucket."""
    try:
        return sorted((cache_folder() / "tuned" / folder).glob("*/*.json"))
    except OSError as error:  # such as a name that is too long
        _say_once(f"the cache is passed over: {error}")
        return []


def cache_folder() -> Path:
    """The cache folder of nsa_gen: $NSA_GEN_CACHE_DIR, or else nsa_gen in the user's cache folder."""
    explicit = os.environ.get("NSA_GEN_CACHE_DIR", "").strip()
    if explicit:
        return Path(os.path.expanduser(explicit)).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return Path(base or os.path.expanduser("~/.cache")) / "nsa_gen"


def _entries_of(path: Path, schema: int) -> list[Any]:
    if not path.is_file():  # reading a pipe would block
        raise ValueError("expected a regular file")
    with path.open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"expected at most {MOST_BYTES} bytes")
    document = json.loads(text.decode("utf-8-sig"))
    if document["schema"] != schema:
        raise ValueError(f"schema: expected {schema}, got {document['schema']!r}")
    return list(document.get("entries", [document]))


def _measured_on(entry: Mapping[str, Any]) -> tuple[Gpu, Bucket]:
    identity = entry["identity"]
    bucket = identity["bucket"]
    return (
        Gpu(identity["gpu"], identity["multiprocessors"], identity["architecture"]),
        Bucket(int(bucket["tokens"]), int(bucket["batch"]), bool(bucket["packed"]), bool(bucket["decode"])),
    )


def _options(bucket: Bucket) -> list[str]:
    """Options of `nsa-gen tune` that tune a bucket."""
    batch = ["--batch", str(bucket.batch)] if bucket.batch > 1 else []
    kind = ["--packed"] if bucket.packed else ["--passes", "decode"] if bucket.decode else []
    return ["--shapes", str(bucket.tokens), *batch, *kind]


@functools.cache
def _say_once(message: str) -> None:
    """Log a message once per process, unless NSA_GEN_QUIET=1. Not a Python warning, because nothing is wrong."""
    if os.environ.get("NSA_GEN_QUIET") != "1":
        _LOG.warning(message)


@functools.cache
def _warn_once(message: str) -> None:
    """Warn once per process: values in a file could crash a kernel or make it read out of bounds."""
    warnings.warn(message, stacklevel=2)
