# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
"""Where a cache keeps its tokens and compressed blocks, and how a kernel finds them.

Laid flat, every tensor of a cache is (rows, KV heads, D). Contiguous, sequence b owns `capacity` rows of tokens; paged,
it owns pages of PAGE_SIZE rows that a table names. A compressed block lies in the page of its last token: what a full
page holds depends on no later token, so sequences with a common beginning share whole pages.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .sizes import cdiv


@triton.jit
def token_rows(table_ptr, table_width, capacity, batch, positions, valid, PAGE_SIZE: tl.constexpr):
    """Rows (int64) of the tokens at `positions` of one sequence; PAGE_SIZE is 0 for a contiguous cache."""
    if PAGE_SIZE == 0:
        return tl.cast(batch, tl.int64) * capacity + positions
    else:
        entries = table_ptr + tl.cast(batch, tl.int64) * table_width
        pages = tl.load(entries + positions // PAGE_SIZE, mask=valid, other=0)
        return pages.to(tl.int64) * PAGE_SIZE + positions % PAGE_SIZE


@triton.jit
def locate_new_tokens(starts_ptr, lengths_ptr, batch, tokens):
    """Position of the first of `tokens` queries of a sequence, and how many there are: those of its new tokens.

    Where more tokens are new than there are queries, the queries are the last of them.
    """
    length = tl.load(lengths_ptr + batch)
    first_position = tl.maximum(tl.load(starts_ptr + batch), length - tokens)
    return first_position, length - first_position


class Kept(NamedTuple):
    """A tensor of a layer: what its head dim is called, Dk or Dv, and whether its rows are compressed blocks."""

    dim: str
    compressed: bool = False


class Layout(NamedTuple):
    """How rows are addressed: tokens a sequence may have, the table of pages (B, width) int32 or None, a page's tokens.

    `page_size` is 0 for a contiguous cache. A compressed block is `block` tokens, and begins every `stride` tokens.
    """

    batch: int
    capacity: int
    page_size: int
    table: torch.Tensor | None
    block: int = 1
    stride: int = 1

    @property
    def compressed_capacity(self) -> int:
        """Compressed blocks that a sequence of `capacity` tokens has; at least one row is kept."""
        return max(1, self.blocks_of(self.capacity))

    @property
    def blocks_per_page(self) -> int:
        """Compressed blocks that may end in one page."""
        return cdiv(self.page_size, self.stride)

    @property
    def table_width(self) -> int:
        """Pages that a sequence may have."""
        return 0 if self.table is None else self.table.shape[1]

    def blocks_of(self, tokens: int) -> int:
        """Complete compressed blocks of so many tokens."""
        return max(0, (tokens - self.block) // self.stride + 1)

    def token_index(self, first: int, end: int, tokens: int) -> torch.Tensor:
        """Rows (sequences, tokens) int64 of the first tokens of sequences first .. end, as `token_rows` finds them."""
        assert self.table is not None
        positions = torch.arange(tokens, device=self.table.device)
        pages = self.table[first:end].long()[:, positions // self.page_size]
        return pages * self.page_size + positions % self.page_size

    def compressed_index(self, first: int, end: int, blocks: int) -> torch.Tensor:
        """Rows (sequences, blocks) int64 of compressed blocks, which lie with their last tokens."""
        assert self.table is not None
        last = torch.arange(blocks, device=self.table.device) * self.stride + self.block - 1
        pages = self.table[first:end].long()[:, last // self.page_size]
        return pages * self.blocks_per_page + last % self.page_size // self.stride
