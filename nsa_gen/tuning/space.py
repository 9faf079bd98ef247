"""Buckets of calls that share their configurations, and the configurations of a kernel that are worth compiling.

A generated package also has the rule of buckets, in its `runtime/lookup.py`, which imports nothing of nsa_gen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from nsa_gen.hardware import Gpu
from nsa_gen.lowering import Plan, space
from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.parts import Kernel
from nsa_gen.rendering.legality import check_of

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

FEWEST_TOKENS, MOST_TOKENS = 512, 2**21
MOST_BATCH = 4**6
FAR = 99
"""Steps between buckets of decode and all others: neither ever serves the other."""
PACKED_SHARES = (0.4, 0.3, 0.15, 0.1, 0.05)
"""Lengths of the sequences with which a packed bucket is measured, as shares of its tokens."""

KINDS = ("independent", "correlated")
"""Kinds of input on which a winner must be fast: neighbouring queries select different blocks, or nearly the same."""


@dataclass(frozen=True, order=True)
class Bucket:
    """Calls of up to `tokens` key tokens (the sum over packed sequences) and `batch` sequences, packed or not.

    With `decode`, steps of decode on caches with a capacity of up to `tokens` tokens per sequence: the capacity counts,
    because a captured graph serves growing lengths. A bucket is measured at its upper ends.
    """

    tokens: int
    batch: int = 1
    packed: bool = False
    decode: bool = False

    @classmethod
    def of(cls, tokens: int, batch: int = 1, packed: bool = False, decode: bool = False) -> Bucket:
        """The bucket of a call: tokens are rounded up to a power of two of at least 512, the batch to a power of four.

        For decode, the batch is rounded up to a power of two.

        Raises:
            ValueError: tokens or batch is not positive, or a packed call has a batch or is a decode call.
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

    @property
    def name(self) -> str:
        """A short name that can be part of a file name."""
        return f"t{self.tokens}_b{self.batch}{'_packed' if self.packed else '_decode' if self.decode else ''}"

    @property
    def label(self) -> str:
        """The name in a report."""
        batch = f" x {self.batch}" if self.batch > 1 else ""
        return f"{self.tokens} tokens{batch}{', packed' if self.packed else ', decode' if self.decode else ''}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of input to measure with; decode reads the same with all of them."""
        return KINDS[:1] if self.decode else KINDS

    def steps(self, other: Bucket) -> int:
        """The distance of two buckets: doublings of the tokens, steps of the batch size, and packed or not."""
        if self.decode != other.decode:
            return FAR
        tokens = abs(self.tokens.bit_length() - other.tokens.bit_length())
        batch = abs(self.batch.bit_length() - other.batch.bit_length()) // (1 if self.decode else 2)
        return tokens + batch + (self.packed != other.packed)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the packed sequences to measure with, which sum to `tokens`."""
        rest = [int(self.tokens * share) for share in PACKED_SHARES[1:]]
        return (self.tokens - sum(rest), *rest)


@dataclass(frozen=True)
class KernelSpace:
    """A kernel with its candidates for a bucket: the default first, then by rising modelled time.

    `total` counts all combinations of tunables, `legal` those that satisfy the constraints and are expected to fit.
    """

    kernel: Kernel
    candidates: tuple[dict[str, int], ...]
    seconds: tuple[float, ...]
    total: int
    legal: int


def kernel_space(program: Plan, kernel: Kernel, gpu: Gpu, bucket: Bucket, most: int) -> KernelSpace:
    """At most `most` candidates of a kernel, including the cost model's default. Illegal ones are never included.

    Half of them are the best by the model. The others are the best with some value that none of these has, such as
    eight warps or a lower tile, so that an error of the model about one tunable can be discovered.
    """
    sizes: dict[sympy.Symbol, int] = {**program.sizes_on(gpu.target), s.T: bucket.tokens, s.B: bucket.batch}
    default = program.defaults[gpu.target][kernel.name].mapping()
    test = space.fits(kernel, sizes, gpu)
    every = list(space.candidates(kernel))
    legal = [config for config in every if test(config)]
    seconds = space.modelled_seconds(kernel, sizes, gpu)
    ranked = sorted((config for config in legal if config != default), key=lambda each: (seconds(each), _order(each)))
    # The default is always tried, even if nothing is expected to fit.
    chosen = [default, *_varied(ranked, most - 1)]
    return KernelSpace(kernel, tuple(chosen), tuple(seconds(each) for each in chosen), len(every), len(legal))


def _varied(ranked: list[dict[str, int]], most: int) -> list[dict[str, int]]:
    """The best half by rank, then the best with a value that none has yet, then more by rank; in order of rank."""
    chosen = list(range(min(len(ranked), (most + 1) // 2)))
    seen = {item for index in chosen for item in ranked[index].items()}
    for index in range(len(chosen), len(ranked)):
        new = ranked[index].items() - seen
        if len(chosen) < most and new:
            chosen.append(index)
            seen |= new
    rest = (index for index in range(len(ranked)) if index not in chosen)
    chosen += [index for index, _ in zip(rest, range(most - len(chosen)), strict=False)]
    return [ranked[index] for index in sorted(chosen)]


def _order(config: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(config.values())


def is_legal(program: Plan, kernel: str, config: Mapping[str, int], gpu: Gpu) -> bool:
    """Whether a package accepts a configuration of a kernel or a schedule, and it is expected to fit a device.

    The cost model's default counts as legal everywhere.
    """
    if check_of(program)(kernel, config):
        return False
    found = next((each for each in program.kernels if each.name == kernel), None)
    if found is None or dict(config) == program.defaults[gpu.target][kernel].mapping():
        return True
    return space.fits(found, program.sizes_on(gpu.target), gpu)(dict(config))


LONGEST_CHECK = 2048
"""The oracle is dense: its time grows with the square of the length."""


def check_tokens(spec: Spec) -> int:
    """A length that ends inside tiles of every size and has more blocks than a token selects.

    It is a multiple of 16, like the lengths of buckets, so that the check runs the same code that is timed.
    """
    if spec.selection is None:
        return 976
    blocks = -(-(spec.selection.count + 1) // 16) * 16
    return min(blocks * spec.selection.block, LONGEST_CHECK) - 48
