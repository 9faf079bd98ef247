"""phi of keys and of values: the properties of the two that other modules need."""

from __future__ import annotations

from dataclasses import dataclass

from nsa_gen.spec import Spec


@dataclass(frozen=True)
class CompressedSide:
    """How phi compresses keys or values: its kind, whether it adds a learned position, and the head dim."""

    name: str
    raw: str
    kind: str
    position: bool
    dim: int

    @property
    def pooled(self) -> bool:
        """The compressed row of a block is a weighted sum of its tokens."""
        return self.kind in ("mean", "weighted")

    @property
    def multiplied(self) -> bool:
        """phi flattens a block and multiplies it by a matrix."""
        return self.kind in ("linear", "mlp")


def compressed_sides(spec: Spec) -> tuple[CompressedSide, ...]:
    """Keys, then values if compressed keys have an output; empty if the package does not compress."""
    compression = spec.compression
    if compression is None or spec.external:
        return ()
    phi, position = compression.phi, compression.position
    key = CompressedSide("key", "k", phi.key, position.key == "learned", spec.head_dim.qk)
    value = CompressedSide("value", "v", phi.value, position.value == "learned", spec.head_dim.v)
    return (key, value) if compression.output else (key,)
