"""The length at which candidates are checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

LONGEST_CHECK = 2048
"""The oracle is dense: its time grows with the square of the length."""


def check_tokens(spec: Spec) -> int:
    """A length that ends inside tiles of every size and has more blocks than a token selects.

    It is a multiple of 16, as lengths of buckets are, so that what is checked is the very code that is timed.
    """
    if spec.selection is None:
        return 976
    blocks = -(-(spec.selection.count + 1) // 16) * 16
    return min(blocks * spec.selection.block, LONGEST_CHECK) - 48
