"""phi of keys and of values: what every other room asks of the two."""

from __future__ import annotations

from dataclasses import dataclass

from nsa_gen.spec import Spec


@dataclass(frozen=True)
class CompressedSide:
    """Keys or values as phi compresses them: its kind, whether it adds a learned position, and the head dim."""

    name: str
    raw: str
    kind: str
    position: bool
    dim: int

    @property
    def pooled(self) -> bool:
        """A block's row is a weighted sum of its tokens."""
        return self.kind in ("mean", "weighted")

    @property
    def multiplied(self) -> bool:
        """A block, laid flat, is multiplied by a matrix."""
        return self.kind in ("linear", "mlp")


def compressed_sides(spec: Spec) -> tuple[CompressedSide, ...]:
    """Keys and, where they have an output, values, in this order; empty where the package does not compress."""
    compression = spec.compression
    if compression is None or spec.external:
        return ()
    phi, position = compression.phi, compression.position
    key = CompressedSide("key", "k", phi.key, position.key == "learned", spec.head_dim.qk)
    value = CompressedSide("value", "v", phi.value, position.value == "learned", spec.head_dim.v)
    return (key, value) if compression.output else (key,)
