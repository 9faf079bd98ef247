"""How a head dim is covered by tiles, whose widths are powers of two."""

from __future__ import annotations

from dataclasses import dataclass

#: The matrix units need at least 16 elements along a product's inner dimension.
SMALLEST_PART = 16


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


def power_of_two(size: int) -> int:
    """The least power of two that is no less than a positive size."""
    return 1 << (size - 1).bit_length()


def split_head_dim(size: int, constant: str) -> HeadDim:
    """One tile of the next power of two, but 128 + 64 for what lies above 128 and does not need 256.

    80 and 96 would fit 64 + 16 and 64 + 32 with less padding. But a tile narrower than 64 columns beside a wider one
    is what the ptxas of CUDA 12.8 gets wrong: it drops the copy of a shared memory address that both tiles' wgmma
    descriptors are made of, where these stay the same over a loop, and the narrow product reads anywhere.
    """
    padded = max(power_of_two(size), SMALLEST_PART)
    widths = (128, 64) if 128 < size <= 192 else (padded,)
    parts, offset = [], 0
    for width in widths:
        parts.append(HeadPart(offset=offset, width=width, valid=min(width, size - offset)))
        offset += width
    return HeadDim(size=size, constant=constant, parts=tuple(parts))
