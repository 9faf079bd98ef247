"""Tuned configurations: where they are looked for, and which of them serves a call. Nothing is measured here.

`nsa-gen tune` writes them, each for one GPU and one bucket of calls. Those whose identity is this package's are used,
in this order:

1. the file named by NSA_GEN_TUNED,
2. the user's cache, then the tables shipped in the package's tuned/, for this very GPU model,
3. the same two for another model of the same architecture.

Within a step the nearest bucket wins, if it is near enough; what is left gets the cost model's choice (see tiles).
An entry whose values are not legal (see space) is refused with a warning.
NSA_GEN_TUNED=off looks nowhere, NSA_GEN_QUIET=1 silences what is logged.
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

# Buckets of key tokens are powers of two from the first to the last, buckets of batches powers of four, of decode two.
FEWEST_TOKENS, MOST_TOKENS = 512, 2**21
MOST_BATCH = 4**6
# A bucket this many steps away still serves: a step is a doubling of the tokens, one size of batches, packed or not.
# Decode and all else are too far apart to serve each other.
NEAR, FAR = 2, 99
# Bytes of a tuned file, at most; an entry has a few kilobytes.
MOST_BYTES = 2**26
# What reading something else than a tuned file ends with.
_MISREAD = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

_LOG = logging.getLogger(__name__)


class Bucket(NamedTuple):
    """Calls that share their configurations: up to `tokens` key tokens and `batch` sequences, packed or not.

    With `decode`, steps of decode on caches of up to `tokens` tokens a sequence.
    """

    tokens: int
    batch: int
    packed: bool
    decode: bool = False

    def steps(self, other: "Bucket") -> int:
        """How far apart two buckets are."""
        if self.decode != other.decode:
            return FAR
        tokens = abs(self.tokens.bit_length() - other.tokens.bit_length())
        batch = abs(self.batch.bit_length() - other.batch.bit_length()) // (1 if self.decode else 2)
        return tokens + batch + (self.packed != other.packed)


def bucket_of(tokens: int, batch: int, packed: bool) -> Bucket:
    """The bucket of a call. It compares and never computes, so that sizes a compiler traces may stay symbolic."""
    rows, entries = FEWEST_TOKENS, 1
    while rows < tokens and rows < MOST_TOKENS:
        rows *= 2
    while entries < batch and entries < MOST_BATCH:
        entries *= 4
    return Bucket(rows, entries, packed)


def decode_bucket(capacity: int, batch: int) -> Bucket:
    """The bucket of decode on a cache: its capacity counts, since a captured graph serves lengths that grow."""
    rows, entries = FEWEST_TOKENS, 1
    while rows < capacity and rows < MOST_TOKENS:
        rows *= 2
    while entries < batch and entries < MOST_BATCH:
        entries *= 2
    return Bucket(rows, entries, packed=False, decode=True)


class Gpu(NamedTuple):
    """What a device must have in common with the one that an entry was measured on."""

    name: str
    multiprocessors: int
    architecture: str


class Identity(NamedTuple):
    """What a tuned entry must have been made for: the spec's name and dtype, and how was measured.

    `kernels` is the digest of the code of the kernels and of their launches (comments, docstrings and blank lines
    apart), `space` that of the legal values that were searched; those of decode, which is tuned apart, are None in a
    package without it.
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
    """The tuned entries of the package in a folder. Files are read once, until `forget`."""

    def __init__(self, folder: Path, identity: Identity, space: Space) -> None:
        self._folder, self._identity, self._space = folder, identity, space
        self._entries: dict[str, tuple[tuple[int, dict[str, Any]], ...]] = {}

    def forget(self) -> None:
        """Read the files again at the next call."""
        self._entries.clear()

    def find(self, gpu: Gpu, bucket: Bucket) -> dict[str, dict[str, int]]:
        """Tuned configurations by kernel for a call on a GPU; empty where none are near enough."""
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
        """The entry that serves a call: explicit before this GPU's before this architecture's, the nearest of each."""
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
        """Every entry made for this package with its level: 0 explicit, 1 the user's cache, 2 shipped."""
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
        """The entries of a file that are this package's; what cannot be understood is passed over and logged."""
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
        """Whether an entry was made for these kernels, measured as today; ValueError if it holds what no entry does."""
        found, ours = entry["identity"], self._identity
        decode = _measured_on(entry)[1].decode
        if not isinstance(entry.get("provenance", {}), dict):
            raise ValueError(f"provenance: expected versions by name, got {entry['provenance']!r}")
        kernels, space = (ours.decode_kernels, ours.decode_space) if decode else (ours.kernels, ours.space)
        wanted = {"kernels": kernels, "space": space, "dtype": ours.dtype, "measurement": ours.measurement}
        return all(found[name] == value for name, value in wanted.items())


def _cached(folder: str) -> list[Path]:
    """Files of a folder of the user's cache, one a GPU and bucket."""
    try:
        return sorted((cache_folder() / "tuned" / folder).glob("*/*.json"))
    except OSError as error:  # such as a name that is too long
        _say_once(f"the cache is passed over: {error}")
        return []


def cache_folder() -> Path:
    """Where nsa_gen keeps what it finds: $NSA_GEN_CACHE_DIR, else nsa_gen in the user's cache folder."""
    explicit = os.environ.get("NSA_GEN_CACHE_DIR", "").strip()
    if explicit:
        return Path(os.path.expanduser(explicit)).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return Path(base or os.path.expanduser("~/.cache")) / "nsa_gen"


def _entries_of(path: Path, schema: int) -> list[Any]:
    if not path.is_file():  # a pipe would be waited for
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
    """What `nsa-gen tune` must be told to tune a bucket."""
    batch = ["--batch", str(bucket.batch)] if bucket.batch > 1 else []
    kind = ["--packed"] if bucket.packed else ["--passes", "decode"] if bucket.decode else []
    return ["--shapes", str(bucket.tokens), *batch, *kind]


@functools.cache
def _say_once(message: str) -> None:
    """Log a warning once in a process, unless NSA_GEN_QUIET=1. It is no Python warning: nothing has gone wrong."""
    if os.environ.get("NSA_GEN_QUIET") != "1":
        _LOG.warning(message)


@functools.cache
def _warn_once(message: str) -> None:
    """Warn once in a process: a file holds what would crash a kernel, or be read out of bounds."""
    warnings.warn(message, stacklevel=2)
