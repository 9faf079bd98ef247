"""Specs and shapes of the calls whose tensors have more than 2^31 elements; the plan sets the dtype in for DTYPE."""

from __future__ import annotations

from dataclasses import dataclass

COMPUTED = """\
version: 1
name: far_computed
heads: {query: 6, kv: 3}
head_dim: {qk: 32, v: 16}
dtype: DTYPE
compression: {block: 8, stride: 4, phi: {key: linear, value: weighted}}
selection: {block: 16, count: 3, initial: 1, local: 1}
window: {size: 24}
"""
"""Learned compression, blocks chosen by the operator."""

POOLED = """\
version: 1
name: far_pooled
heads: {query: 48, kv: 3}
head_dim: {qk: 16, v: 16}
dtype: DTYPE
compression: {block: 8, stride: 4, phi: mean}
selection: {block: 16, count: 3, initial: 1, local: 1}
window: {size: 24}
combine: {gate: none}
"""
"""Groups of 16, mean compression, no gates."""

GIVEN = """\
version: 1
name: far_given
heads: {query: 6, kv: 3}
head_dim: {qk: 16, v: 32}
dtype: DTYPE
kv: per_branch
compression: {block: 4, stride: 4, phi: external}
selection: {block: 16, count: 3, indices: input}
window: {size: 24}
combine: {gate: given}
"""
"""Compressed keys and blocks from the caller, keys and values of each branch."""

INDEXED = """\
version: 2
name: far_indexed
heads: {query: 6, kv: 3}
head_dim: 16
dtype: DTYPE
selection: {block: 16, count: 3, initial: 0, local: 1, scores: {indexer: {dim: 32}}}
combine: {gate: none}
"""
"""Blocks that an indexer chooses, with its alignment loss."""

APART = {"computed": COMPUTED, "pooled": POOLED, "given": GIVEN, "indexed": INDEXED}
"""Specs whose arguments are spread out one by one."""
APART_TOKENS = {"cuda": 75, "cpu": 9}
"""Tokens of each of three batch entries."""

_BRANCHES = """\
dtype: DTYPE
compression: {block: 32, stride: 16, phi: mean}
selection: {block: 64, count: 4, initial: 1, local: 1}
window: {size: 128}
"""

WIDE_KEYS = "version: 1\nname: wide_keys\nheads: {query: 1, kv: 1}\nhead_dim: {qk: 256, v: 16}\n" + _BRANCHES
WIDE_VALUES = "version: 1\nname: wide_values\nheads: {query: 1, kv: 1}\nhead_dim: {qk: 16, v: 256}\n" + _BRANCHES
MANY_QUERIES = "version: 1\nname: many_queries\nheads: {query: 16, kv: 1}\nhead_dim: {qk: 128, v: 128}\n" + _BRANCHES


@dataclass(frozen=True)
class Along:
    """Sequences that are repeated until a tensor is far: in a batch, where all are as long as the first, or packed.

    `few` are the lengths for the interpreter. The lengths of packed sequences add up to a multiple of the stride, so
    that repetitions have their compressed rows at the same places. Neither 2^31 nor 2^32 is a multiple of what one
    repetition takes: an offset that wrapped around would read, or write, another token.
    """

    spec: str
    lengths: tuple[int, ...]
    few: tuple[int, ...]
    packed: bool


ALONG = {
    "keys": Along(WIDE_KEYS, (1021,) * 7, (33,), packed=False),
    "values": Along(WIDE_VALUES, (1021, 0, 1, 509, 1301), (9, 0, 1, 6), packed=True),
    "queries": Along(MANY_QUERIES, (1021,) * 7, (9,) * 2, packed=False),
}
"""q, k and their gradients; v, the outputs and their gradients, packed; q, the outputs and dq of a group of 16."""
