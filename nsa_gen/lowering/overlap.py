"""The weights of compressed blocks in the importance of a selection block (Eq. 9)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Overlap:
    """Selection block j sums over compressed blocks ``j * ratio + first + m`` with ``weights[m]``, m = 0, 1, ...

    The weight is ``|B_i intersect S_j| / stride`` with ``B_i = [i * stride, i * stride + block)`` and
    ``S_j = [j * selection_block, (j + 1) * selection_block)``.
    """

    ratio: int
    first: int
    weights: tuple[int, ...]

    @property
    def description(self) -> str:
        """The weights and their compressed blocks, for a comment: short enough for one line."""
        last = self.first + len(self.weights) - 1
        shown = ", ".join(str(weight) for weight in self.weights)
        if len(self.weights) > 12:
            head = ", ".join(str(weight) for weight in self.weights[:5])
            shown = f"{head}, ... {self.weights[-1]} ({len(self.weights)} of them)"
        return f"{shown} on i = {_index(self.ratio, self.first)} .. {_index(self.ratio, last)}."


def _index(ratio: int, offset: int) -> str:
    base = "j" if ratio == 1 else f"{ratio}j"
    return base if offset == 0 else f"{base} {'+' if offset > 0 else '-'} {abs(offset)}"


def overlap(block: int, stride: int, selection_block: int) -> Overlap:
    """Overlap weights of compressed blocks of ``block`` tokens every ``stride`` tokens and of selection blocks.

    ``stride`` must divide ``block`` and ``selection_block``, so that every weight is an integer.
    """
    if block % stride or selection_block % stride:
        raise ValueError(
            f"compression.stride must divide compression.block and selection.block, got stride {stride}, "
            f"block {block}, selection.block {selection_block}"
        )
    first = -(block // stride) + 1
    count = selection_block // stride - first
    weights = tuple(
        (min(offset * stride + block, selection_block) - max(offset * stride, 0)) // stride
        for offset in range(first, first + count)
    )
    return Overlap(ratio=selection_block // stride, first=first, weights=weights)
