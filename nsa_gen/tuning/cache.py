"""Answers of `nsa-gen cache`: which entries exist, why one serves a call or does not, and their export and import."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_gen.lowering import lower
from nsa_gen.rendering import render
from nsa_gen.rendering.identity import ATTENTION, DECODE, space_digest
from nsa_gen.rendering.legality import Check, check_of, problems
from nsa_gen.spec import Spec, load_spec, shipped_specs
from nsa_gen.tuning.space import is_legal
from nsa_gen.tuning.store import (
    Device,
    Entry,
    Identity,
    Provenance,
    Store,
    Unreadable,
    kernels_of,
    read_each,
    write_entries,
)

if TYPE_CHECKING:
    from nsa_gen.tuning.space import Bucket

LEVELS = ("NSA_GEN_TUNED", "user's cache", "shipped")
"""Where entries come from, in lookup order."""


@dataclass(frozen=True)
class Difference:
    """A field in which an entry differs from what is wanted. A `fatal` difference means that it cannot be used."""

    field: str
    wanted: str
    found: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.field}: wanted {self.wanted}, the entry has {self.found}"


MEANING = {
    "kernels": "the code of the kernels has changed since",
    "space": "the tunables or their constraints have changed since",
    "dtype": "tuned for tensors of another type",
    "measurement": "times were taken in another way",
    "gpu": "another GPU",
    "multiprocessors": "another model of the GPU",
    "architecture": "another architecture, whose configurations may not even compile",
    "bucket": "too far from the call: more than two steps",
}
"""What a difference in each field means."""


def differences(wanted: Identity, found: Identity, near: int = 2) -> list[Difference]:
    """The fields that keep an entry from serving a call, or make it a worse fit.

    An entry of another GPU of the same architecture serves if no better one is known, and so does a bucket at most
    `near` steps away. These differences are not fatal.
    """
    result = []
    for name in ("kernels", "space", "dtype", "measurement", "gpu", "multiprocessors", "architecture"):
        expected, actual = getattr(wanted, name), getattr(found, name)
        if expected != actual:
            result.append(Difference(name, str(expected), str(actual), name not in ("gpu", "multiprocessors")))
    if (steps := wanted.bucket.steps(found.bucket)) > 0:
        result.append(Difference("bucket", wanted.bucket.name, found.bucket.name, steps > near))
    return result


def drifted(now: Device, made_with: Provenance) -> list[Difference]:
    """Versions that differ from today's, if both are known."""
    return [
        Difference(name, getattr(now, name), getattr(made_with, name), fatal=False)
        for name in ("driver", "torch", "triton")
        if getattr(now, name) and getattr(made_with, name) and getattr(now, name) != getattr(made_with, name)
    ]


@dataclass(frozen=True)
class Verdict:
    """The role of one entry for a call.

    Attributes:
        path: its file.
        level: index into LEVELS.
        entry: the entry; None if the file is unreadable.
        used: whether it serves the call.
        reason: why it does, or does not.
        differences: the fields that differ; fatal ones are why it cannot serve.
        drift: versions that differ from today's.
    """

    path: Path
    level: int
    entry: Entry | None
    used: bool
    reason: str
    differences: tuple[Difference, ...] = ()
    drift: tuple[Difference, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = asdict(self)
        entry = plain.pop("entry")
        identity = None if entry is None else entry["identity"]
        return {**plain, "path": str(self.path), "level": LEVELS[self.level], "identity": identity}


@dataclass(frozen=True)
class Explanation:
    """Every entry for a spec of this name, and the one that serves; `note` is about none in particular."""

    wanted: Identity
    verdicts: tuple[Verdict, ...] = ()
    note: str = ""

    @property
    def chosen(self) -> Verdict | None:
        """The entry that serves; None for the cost model's choice."""
        return next((each for each in self.verdicts if each.used), None)


def why(
    spec: Spec,
    device: Device,
    bucket: Bucket,
    *,
    store: Store | None = None,
    shipped: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Explanation:
    """Find the entry that serves a call of a spec's package on a device, and what is wrong with each of the others.

    Args:
        spec: the package's spec.
        device: the GPU.
        bucket: the call's bucket.
        store: the user's cache.
        shipped: the package's `tuned` folder, if there is one.
        environment: where NSA_GEN_TUNED is read.
    """
    program = lower(spec)
    wanted = Identity.of(program, kernels_of(render(spec), decode=bucket.decode), device, bucket)
    explicit = environment.get("NSA_GEN_TUNED", "")
    if explicit == "off":
        return Explanation(wanted, note="NSA_GEN_TUNED=off: nothing is looked up, the cost model's choice is used")
    store = store or Store()
    places = (
        [Path(explicit)] if explicit else [],
        sorted(store.root.glob(f"{spec.name}-*/*/*.json")),
        sorted(shipped.glob("*.json")) if shipped is not None else [],
    )
    check = check_of(program)
    verdicts = [
        verdict
        for level, paths in enumerate(places)
        for path in paths
        for verdict in _judged(path, level, wanted, check, device)
    ]
    serving = [each for each in verdicts if not each.reason]
    best = min(serving, key=lambda each: _rank(each, wanted), default=None)
    final = [_concluded(each, best, wanted) for each in verdicts]
    note = "" if best else "no entry serves: the cost model's choice is used"
    return Explanation(wanted, tuple(final), note if final else f"nothing is tuned for {spec.name} anywhere")


def _judged(path: Path, level: int, wanted: Identity, check: Check, device: Device) -> list[Verdict]:
    """A verdict for each entry of a file. It already has a reason if the entry cannot serve."""
    try:
        entries = read_each(path)
    except (Unreadable, OSError) as error:
        entries = [Unreadable(str(error))]
    found = []
    for entry in entries:
        if isinstance(entry, Unreadable):
            found.append(Verdict(path, level, None, False, f"cannot be understood, so it is passed over: {entry}"))
            continue
        differing = tuple(differences(wanted, entry.identity))
        reason = _fatal(differing)
        if not reason and (wrong := problems(check, entry.configs)):
            reason = f"refused: {wrong}"
        found.append(Verdict(path, level, entry, False, reason, differing, tuple(drifted(device, entry.provenance))))
    return found


def _fatal(differing: Iterable[Difference]) -> str:
    """The differences that keep an entry from being used, with their meaning; "" if there are none."""
    return "; ".join(f"{each} ({MEANING[each.field]})" for each in differing if each.fatal)


def refusals(entries: Sequence[Entry], specs: Mapping[str, Spec]) -> list[str]:
    """What the specs' packages refuse in entries that were tuned in their spaces; "" for all other entries."""
    programs = {name: lower(specs[name]) for name in {each.identity.spec for each in entries} & specs.keys()}
    checks = {name: check_of(program) for name, program in programs.items()}
    return [
        problems(checks[identity.spec], each.configs)
        if (identity := each.identity).spec in programs
        and identity.space == space_digest(programs[identity.spec], DECODE if identity.bucket.decode else ATTENTION)
        else ""
        for each in entries
    ]


def is_stale(entry: Entry) -> bool:
    """Whether a shipped spec's kernels have changed since an entry was made. False for specs that are not shipped."""
    name, decode = entry.identity.spec, entry.identity.bucket.decode
    if name not in shipped_specs():
        return False
    spec = load_spec(name)
    if decode and "decode" not in spec.passes:
        return True
    return kernels_of(render(spec), decode=decode) != entry.identity.kernels


def _rank(verdict: Verdict, wanted: Identity) -> tuple[int, int, int]:
    """As in a package's `lookup`: explicit file, this GPU, this architecture; the nearest of each; then by level."""
    assert verdict.entry is not None
    other = any(each.field in ("gpu", "multiprocessors") for each in verdict.differences)
    origin = 0 if verdict.level == 0 else 2 if other else 1
    return origin, wanted.bucket.steps(verdict.entry.identity.bucket), verdict.level


def _concluded(verdict: Verdict, best: Verdict | None, wanted: Identity) -> Verdict:
    if verdict.reason or best is None:
        return verdict
    if verdict is not best:
        return replace(verdict, reason=f"would serve, but {best.path.name} comes first")
    near = [each for each in verdict.differences if not each.fatal]
    reason = "exactly this call" if not near else "nothing nearer: " + "; ".join(map(str, near))
    return replace(verdict, used=True, reason=reason)


# Travel


@dataclass(frozen=True)
class Imported:
    """The result for the entries of a file: saved in the cache, or refused with a reason (None: not even an entry)."""

    saved: tuple[Entry, ...] = ()
    refused: tuple[tuple[Entry | None, str], ...] = ()


def export(store: Store, path: Path, names: Sequence[str] = ()) -> int:
    """Write the entries of the cache, or those of some specs, to one file. Returns their number."""
    found = [entry for _, entry in store.all() if not names or entry.identity.spec in names]
    if found:
        write_entries(path, found, bundle=True)
    return len(found)


def import_entries(store: Store, path: Path, specs: Mapping[str, Spec]) -> Imported:
    """Save the entries of a file in the cache, except those that were measured with other kernels than today's.

    Args:
        store: the user's cache.
        path: a file that `export` wrote, or a package's tuned/<gpu>.json.
        specs: specs by name, whose kernels are compared.

    Raises:
        Unreadable: it is no such file.
        OSError: it cannot be read, is not a regular file, or the cache cannot be written.
    """
    saved: list[Entry] = []
    refused: list[tuple[Entry | None, str]] = []
    for entry in read_each(path):
        if isinstance(entry, Unreadable):
            refused.append((None, str(entry)))
        elif reason := _refusal(entry, specs.get(entry.identity.spec)):
            refused.append((entry, reason))
        else:
            store.save(entry)
            saved.append(entry)
    return Imported(tuple(saved), tuple(refused))


def _refusal(entry: Entry, spec: Spec | None) -> str:
    """Why an entry is not imported, or ""."""
    identity = entry.identity
    if spec is None:
        return f"no spec named {identity.spec} is known; name its file after the FILE"
    program, bucket = lower(spec), identity.bucket
    if bucket.decode and "decode" not in spec.passes:
        return f"bucket: {spec.name} has no decode pass"
    wanted = Identity.of(program, kernels_of(render(spec), decode=bucket.decode), identity.device, bucket)
    if fatal := _fatal(differences(wanted, identity)):
        return fatal
    gpu = identity.device.gpu
    if gpu is None:
        return f"architecture: {identity.architecture} is not in the hardware table"
    if wrong := problems(check_of(program), entry.configs):
        return wrong
    illegal = [name for name, values in entry.configs.items() if not is_legal(program, name, values, gpu)]
    return f"configs: not expected to fit {gpu.name} with {', '.join(illegal)}" if illegal else ""
