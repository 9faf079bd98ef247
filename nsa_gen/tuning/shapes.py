"""Buckets: calls that share their configurations, because they share what makes one quicker than another.

A generated package has the same rule in its `lookup.py`, which imports nothing of nsa_gen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

FEWEST_TOKENS, MOST_TOKENS = 512, 2**21
MOST_BATCH = 4**6
PACKED_SHARES = (0.4, 0.3, 0.15, 0.1, 0.05)
"""Lengths of the sequences that a packed bucket is measured with, as shares of its tokens."""

KINDS = ("independent", "correlated")
"""Kinds of input that a winner must be good at: neighbouring queries select different blocks, or nearly the same."""

_NAME = re.compile(r"t(\d+)_b(\d+)(_packed)?")


@dataclass(frozen=True, order=True)
class Bucket:
    """Calls of up to `tokens` key tokens (the sum over packed sequences) and `batch` sequences, packed or not.

    A bucket is measured at its upper ends.
    """

    tokens: int
    batch: int = 1
    packed: bool = False

    @classmethod
    def of(cls, tokens: int, batch: int = 1, packed: bool = False) -> Bucket:
        """The bucket of a call: tokens rounded up to a power of two of at least 512, the batch to a power of four.

        Raises:
            ValueError: tokens or batch is not positive, or a packed call has a batch.
        """
        if tokens < 1 or batch < 1:
            raise ValueError(f"tokens and batch: expected positive numbers, got tokens={tokens}, batch={batch}")
        if packed and batch != 1:
            raise ValueError(f"batch: expected 1 for packed sequences, whose tokens lie end to end, got {batch}")
        rows, entries = FEWEST_TOKENS, 1
        while rows < tokens and rows < MOST_TOKENS:
            rows *= 2
        while entries < batch and entries < MOST_BATCH:
            entries *= 4
        return cls(rows, entries, packed)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Bucket:
        """The bucket that `to_json` wrote."""
        return cls(int(fields["tokens"]), int(fields["batch"]), bool(fields["packed"]))

    @classmethod
    def named(cls, name: str) -> Bucket:
        """The bucket of a `name`; ValueError if it is none's."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"bucket: expected a name like t8192_b1 or t8192_b1_packed, got {name!r}")
        return cls(int(found[1]), int(found[2]), found[3] is not None)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"tokens": self.tokens, "batch": self.batch, "packed": self.packed}

    @property
    def name(self) -> str:
        """A short name that may stand in a file's name."""
        return f"t{self.tokens}_b{self.batch}{'_packed' if self.packed else ''}"

    @property
    def label(self) -> str:
        """What to call it in a report."""
        batch = f" x {self.batch}" if self.batch > 1 else ""
        return f"{self.tokens} tokens{batch}{', packed' if self.packed else ''}"

    def steps(self, other: Bucket) -> int:
        """How far apart two buckets are: doublings of the tokens, sizes of batches, and packed or not."""
        tokens = abs(self.tokens.bit_length() - other.tokens.bit_length())
        batch = abs(self.batch.bit_length() - other.batch.bit_length()) // 2
        return tokens + batch + (self.packed != other.packed)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the packed sequences it is measured with, which sum to `tokens`."""
        rest = [int(self.tokens * share) for share in PACKED_SHARES[1:]]
        return (self.tokens - sum(rest), *rest)
