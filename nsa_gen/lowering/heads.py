"""How tiles cover a head dim. Their widths are powers of two."""

from __future__ import annotations

from dataclasses import dataclass

#: The matrix units need at least 16 elements along the inner dimension of a product.
SMALLEST_TILE = 16


@dataclass(frozen=True)
class HeadDim:
    """A head dim (of q and k, or of v): its size, and the widths of the tiles that cover it, in descending order."""

    size: int
    widths: tuple[int, ...]

    @property
    def padded(self) -> int:
        """Columns that the matrix units process."""
        return sum(self.widths)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not less than `size`, a positive number."""
    return 1 << (size - 1).bit_length()


def split_head_dim(size: int) -> HeadDim:
    """One tile whose width is the next power of two; sizes from 129 to 192 have tiles of 128 and 64 instead.

    Head dims of 80 and 96 would need less padding with 64 + 16 and 64 + 32. But the ptxas of CUDA 12.8 miscompiles a
    tile narrower than 64 columns beside a wider one. Both tiles' wgmma descriptors are made from one shared memory
    address. If the descriptors are loop-invariant, ptxas drops the copy of that address, and the narrow product reads
    from an arbitrary place.
    """
    padded = max(power_of_two(size), SMALLEST_TILE)
    return HeadDim(size, (128, 64) if 128 < size <= 192 else (padded,))
