"""Buckets: calls that share their configurations, because they share what makes one quicker than another.

A generated package has the same rule in its `lookup.py`, which imports nothing of nsa_gen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

FEWEST_TOKENS, MOST_TOKENS = 512, 2**21
MOST_BATCH = 4**6
FAR = 99
"""Steps between decode and all else: neither ever serves the other."""
PACKED_SHARES = (0.4, 0.3, 0.15, 0.1, 0.05)
"""Lengths of the sequences that a packed bucket is measured with, as shares of its tokens."""

KINDS = ("independent", "correlated")
"""Kinds of input that a winner must be good at: neighbouring queries select different blocks, or nearly the same."""

_NAME = re.compile(r"t(\d+)_b(\d+)(_packed|_decode)?")


@dataclass(frozen=True, order=True)
class Bucket:
    """Calls of up to `tokens` key tokens (the sum over packed sequences) and `batch` sequences, packed or not.

    With `decode`, steps of decode on caches of up to `tokens` tokens a sequence: a captured graph serves lengths that
    grow, so it is the capacity that counts. A bucket is measured at its upper ends.
    """

    tokens: int
    batch: int = 1
    packed: bool = False
    decode: bool = False

    @classmethod
    def of(cls, tokens: int, batch: int = 1, packed: bool = False, decode: bool = False) -> Bucket:
        """The bucket of a call: tokens rounded up to a power of two of at least 512, the batch to a power of four.

        Batches of decode are rounded up to a power of two.

        Raises:
            ValueError: tokens or batch is not positive, or a packed call has a batch or is one of decode.
        """
        if tokens < 1 or batch < 1:
            raise ValueError(f"tokens and batch: expected positive numbers, got tokens={tokens}, batch={batch}")
        if packed and batch != 1:
            raise ValueError(f"batch: expected 1 for packed sequences, whose tokens lie end to end, got {batch}")
        if packed and decode:
            raise ValueError("packed: decode has no packed sequences; its cache holds lengths of any kind")
        rows, entries, step = FEWEST_TOKENS, 1, 2 if decode else 4
        while rows < tokens and rows < MOST_TOKENS:
            rows *= 2
        while entries < batch and entries < MOST_BATCH:
            entries *= step
        return cls(rows, entries, packed, decode)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Bucket:
        """The bucket that `to_json` wrote."""
        return cls(int(fields["tokens"]), int(fields["batch"]), bool(fields["packed"]), bool(fields["decode"]))

    @classmethod
    def named(cls, name: str) -> Bucket:
        """The bucket of a `name`; ValueError if it is none's."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"bucket: expected a name like t8192_b1, t8192_b1_packed or t8192_b1_decode, got {name!r}")
        return cls(int(found[1]), int(found[2]), found[3] == "_packed", found[3] == "_decode")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"tokens": self.tokens, "batch": self.batch, "packed": self.packed, "decode": self.decode}

    @property
    def name(self) -> str:
        """A short name that may stand in a file's name."""
        return f"t{self.tokens}_b{self.batch}{'_packed' if self.packed else '_decode' if self.decode else ''}"

    @property
    def label(self) -> str:
        """What to call it in a report."""
        batch = f" x {self.batch}" if self.batch > 1 else ""
        return f"{self.tokens} tokens{batch}{', packed' if self.packed else ', decode' if self.decode else ''}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of input that it is measured with; what decode reads does not depend on them."""
        return KINDS[:1] if self.decode else KINDS

    def steps(self, other: Bucket) -> int:
        """How far apart two buckets are: doublings of the tokens, sizes of batches, and packed or not."""
        if self.decode != other.decode:
            return FAR
        tokens = abs(self.tokens.bit_length() - other.tokens.bit_length())
        batch = abs(self.batch.bit_length() - other.batch.bit_length()) // (1 if self.decode else 2)
        return tokens + batch + (self.packed != other.packed)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the packed sequences it is measured with, which sum to `tokens`."""
        rest = [int(self.tokens * share) for share in PACKED_SHARES[1:]]
        return (self.tokens - sum(rest), *rest)
