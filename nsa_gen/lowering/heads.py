"""How a head dim is covered by tiles, whose widths are powers of two."""

from __future__ import annotations

from dataclasses import dataclass

#: The matrix units need at least 16 elements along a product's inner dimension.
SMALLEST_TILE = 16


@dataclass(frozen=True)
class HeadDim:
    """One head dim, of q and k or of v: its size, and the widths of the tiles that cover it, falling."""

    size: int
    widths: tuple[int, ...]

    @property
    def padded(self) -> int:
        """Columns that the matrix units process."""
        return sum(self.widths)


def power_of_two(size: int) -> int:
    """The least power of two that is no less than a positive size."""
    return 1 << (size - 1).bit_length()


def split_head_dim(size: int) -> HeadDim:
    """One tile of the next power of two, but 128 + 64 for what lies above 128 and does not need 256.

    80 and 96 would fit 64 + 16 and 64 + 32 with less padding. But a tile narrower than 64 columns beside a wider one
    is what the ptxas of CUDA 12.8 gets wrong: it drops the copy of a shared memory address that both tiles' wgmma
    descriptors are made of, where these stay the same over a loop, and the narrow product reads anywhere.
    """
    padded = max(power_of_two(size), SMALLEST_TILE)
    return HeadDim(size, (128, 64) if 128 < size <= 192 else (padded,))
