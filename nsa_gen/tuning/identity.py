"""What a tuned entry was made for, and what it was made with.

Identity must match for an entry to be used; provenance is worth a warning where it differs.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nsa_gen.hardware import GPUS, Gpu, gpu_for_device
from nsa_gen.lowering import Plan
from nsa_gen.rendering.identity import ATTENTION, DECODE, MEASUREMENT, space_digest
from nsa_gen.tuning.space import Bucket


def slug(name: str) -> str:
    """A device's name as it may stand in a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "gpu"


@dataclass(frozen=True)
class Device:
    """A GPU as its driver names it.

    `driver`, `torch` and `triton` are versions, "" where unknown; `count` is how many of these the machine has.
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
        """The name as it may stand in a file's name: nvidia_h100_80gb_hbm3."""
        return slug(self.name)

    @property
    def gpu(self) -> Gpu | None:
        """Its entry in the hardware table: the board of that name, else the first of that architecture."""
        named = gpu_for_device(self.name)
        if named is not None and named.target == self.architecture:
            return named
        return next((gpu for gpu in GPUS if gpu.target == self.architecture), None)


@dataclass(frozen=True)
class Identity:
    """Everything that must match.

    Attributes:
        spec: the spec's name; it only names folders.
        kernels, space: digests of the kernels' code and of the space (`nsa_gen.rendering.identity`).
        dtype: of the operator's tensors.
        measurement: version of how times were taken.
        gpu, multiprocessors, architecture: the device, as its driver names it.
        bucket: the calls it was measured for.
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
        """The GPU, without the versions that it was measured with."""
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

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "bucket": self.bucket.to_json()}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Identity:
        """What `to_json` wrote.

        Raises:
            ValueError: a field is missing or of the wrong type.
        """
        found: dict[str, Any] = {}
        for each in fields(cls):
            if each.name not in document:
                raise ValueError(f"identity.{each.name}: missing")
            value = document[each.name]
            if each.name == "bucket":
                try:
                    value = Bucket.from_json(value)
                except (KeyError, OverflowError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"identity.bucket: expected tokens, batch, packed and decode, got {value!r}"
                    ) from error
            elif not isinstance(value, wanted := int if each.name == "multiprocessors" else str):
                raise ValueError(f"identity.{each.name}: expected {wanted.__name__}, got {value!r}")
            found[each.name] = value
        return cls(**found)


@dataclass(frozen=True)
class Provenance:
    """What an entry was made with: versions, and when (ISO 8601, UTC)."""

    driver: str = ""
    torch: str = ""
    triton: str = ""
    nsa_gen: str = ""
    date: str = ""

    def to_json(self) -> dict[str, str]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Provenance:
        """What `to_json` wrote; what is missing or no text is unknown."""
        known = {each.name: document.get(each.name) for each in fields(cls)}
        return cls(**{name: value for name, value in known.items() if isinstance(value, str)})


@dataclass(frozen=True)
class Difference:
    """A field in which an entry is not what is wanted. `fatal` ones keep it from being used."""

    field: str
    wanted: str
    found: str
    fatal: bool = field(default=True)

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
"""What it says of an entry that a field differs."""


def differences(wanted: Identity, found: Identity, near: int = 2) -> list[Difference]:
    """Field by field, what keeps an entry from serving a call, or only makes it a worse fit.

    Another GPU of the same architecture serves where nothing better is known, and so does a bucket at most `near`
    steps away: these differences are not fatal.
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
    """Versions that differ from those of today, where both are known."""
    return [
        Difference(name, getattr(now, name), getattr(made_with, name), fatal=False)
        for name in ("driver", "torch", "triton")
        if getattr(now, name) and getattr(made_with, name) and getattr(now, name) != getattr(made_with, name)
    ]


def kernels_of(files: dict[str, str], *, decode: bool = False) -> str:
    """The digest of its kernels, or of those of decode, that a rendered package carries.

    Raises:
        ValueError: it has none, as a package without decode has none of decode.
    """
    found = json.loads(files["tiles.json"])["identity"].get("decode_kernels" if decode else "kernels")
    if found is None:
        raise ValueError("files: expected a package that decodes, got one without")
    return found
