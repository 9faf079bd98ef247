"""How a head dim is split into power-of-two parts, so that no product is padded further than it must be."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

#: The matrix units need at least 16 elements along a product's inner dimension.
SMALLEST_PART = 16
_WIDTHS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class HeadPart:
    """Columns ``offset .. offset + width`` of a head dim, of which the first ``valid`` exist."""

    offset: int
    width: int
    valid: int


@dataclass(frozen=True)
class HeadDim:
    """One head dim (of q and k, or of v) in parts of falling width.

    ``constant`` is the name of its size in generated code, such as ``HEAD_DIM_QK``.
    """

    size: int
    constant: str
    parts: tuple[HeadPart, ...]

    def name(self, prefix: str, part: HeadPart) -> str:
        """Variable that holds one part of a tile: ``q``, or ``q_128`` where there are several parts."""
        return prefix if len(self.parts) == 1 else f"{prefix}_{part.width}"

    def names(self, prefix: str) -> str:
        """Variables of all parts, separated by commas, as they stand in a call or an assignment."""
        return ", ".join(self.name(prefix, part) for part in self.parts)

    def listing(self, prefix: str, indent: int) -> str:
        """Variables of all parts, one a line, as they stand in a list that is laid out so."""
        return f",\n{' ' * indent}".join(self.name(prefix, part) for part in self.parts)

    @property
    def padded(self) -> int:
        """Columns that the matrix units process."""
        return sum(part.width for part in self.parts)


def split_head_dim(size: int, constant: str) -> HeadDim:
    """Split into at most three different powers of two with the least padding, then the fewest parts.

    192 = 128 + 64 and 80 = 64 + 16 exactly; 72 becomes 64 + 16 with 8 columns masked; 240 is padded to 256, because
    a fourth part would cost more than 6% of padding.
    """
    choices = (widths for count in (1, 2, 3) for widths in combinations(_WIDTHS, count) if sum(widths) >= size)
    widths = min(choices, key=lambda widths: (sum(widths), len(widths)))
    parts, offset = [], 0
    for width in widths:
        parts.append(HeadPart(offset=offset, width=width, valid=min(width, size - offset)))
        offset += width
    return HeadDim(size=size, constant=constant, parts=tuple(parts))
