# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
"""Where a cache stores its tokens and compressed blocks, and how a kernel finds their rows.

Every tensor of a cache, flattened, is (rows, KV heads, D). In a contiguous cache, sequence b owns `capacity` rows of
tokens. In a paged one, it owns pages of PAGE_SIZE rows, whose numbers are in a table. A block is stored in the page of
its last token, so the contents of a full page do not depend on later tokens. Sequences with a common prefix can
therefore share full pages.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .arguments import Arguments
from .sizes import cdiv

# Allowed numbers of tokens per page.
PAGE_SIZES = (16, 32, 64, 128, 256)


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
def block_rows(
    table_ptr,
    table_width,
    capacity,
    batch,
    blocks,
    valid,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Rows (int64) of the `blocks` of one sequence, of BLOCK tokens with stride STRIDE.

    `capacity` is the rows of blocks per sequence in a contiguous cache.
    """
    if PAGE_SIZE == 0:
        return tl.cast(batch, tl.int64) * capacity + blocks
    else:
        BLOCKS_PER_PAGE: tl.constexpr = (PAGE_SIZE + STRIDE - 1) // STRIDE
        last = blocks * STRIDE + BLOCK - 1
        entries = table_ptr + tl.cast(batch, tl.int64) * table_width
        pages = tl.load(entries + last // PAGE_SIZE, mask=valid, other=0)
        return pages.to(tl.int64) * BLOCKS_PER_PAGE + last % PAGE_SIZE // STRIDE


@triton.jit
def locate_new_tokens(starts_ptr, lengths_ptr, batch, tokens):
    """Position of a sequence's first query, and the number of its queries, at most `tokens`.

    The queries are the sequence's new tokens. If there are more than `tokens`, the queries are the last of them.
    """
    length = tl.load(lengths_ptr + batch)
    first_position = tl.maximum(tl.load(starts_ptr + batch), length - tokens)
    return first_position, length - first_position


class Blocks(NamedTuple):
    """Blocks of a sequence's tokens: `size` tokens each, one starting every `stride` tokens."""

    size: int
    stride: int

    def of(self, tokens: int) -> int:
        """Number of complete blocks in `tokens` tokens."""
        return max(0, (tokens - self.size) // self.stride + 1)


class Kept(NamedTuple):
    """Description of one tensor of a layer.

    `dim` and `heads` are names in `Arguments.sizes`. `blocks` is None if a row holds a token rather than a block.
    `dtype` is None for the package's dtype.
    """

    dim: str
    blocks: Blocks | None = None
    dtype: torch.dtype | None = None
    heads: str = "Hkv"

    @property
    def coded(self) -> bool:
        """Whether the tensor holds 8-bit e4m3 codes. The layer then has their scales too."""
        return self.dtype == torch.uint8


def new_scales(kept: Iterable[Kept], heads: int, device: torch.device | str) -> tuple[torch.Tensor, ...]:
    """Initial scales of a layer's codes, and reciprocals, all 1: (coded tensors, 2, Hkv) float32; () without codes."""
    coded = sum(each.coded for each in kept)
    return (torch.ones(coded, 2, heads, dtype=torch.float32, device=device),) if coded else ()


class Layout(NamedTuple):
    """How rows are addressed.

    `capacity` is the most tokens of a sequence. `table` is the page table (B, width) int32, or None for a contiguous
    cache. `page_size` is the tokens per page, or 0 for a contiguous cache.
    """

    batch: int
    capacity: int
    page_size: int
    table: torch.Tensor | None

    def rows(self, kept: Kept, pages: int | None) -> tuple[int, int]:
        """The first two dims of a tensor: (sequences, rows per sequence) or, with `pages`, (pages, rows per page)."""
        if pages is None:
            return self.batch, self.capacity_of(kept.blocks) if kept.blocks else self.capacity
        return pages, cdiv(self.page_size, kept.blocks.stride) if kept.blocks else self.page_size

    def capacity_of(self, blocks: Blocks) -> int:
        """Rows of blocks per sequence in a contiguous cache; at least one."""
        return max(1, blocks.of(self.capacity))

    @property
    def table_width(self) -> int:
        """Most pages of a sequence."""
        return 0 if self.table is None else self.table.shape[1]

    def index(self, blocks: Blocks | None, first: int, end: int, tokens: int) -> torch.Tensor:
        """Rows (sequences, n) int64 of the first `tokens` tokens, or of their blocks, in sequences first .. end.

        These are the rows that `token_rows` and `block_rows` compute on the device.
        """
        assert self.table is not None
        size, stride = blocks or (1, 1)
        last = torch.arange(Blocks(size, stride).of(tokens), device=self.table.device) * stride + size - 1
        pages = self.table[first:end].long()[:, last // self.page_size]
        return pages * cdiv(self.page_size, stride) + last % self.page_size // stride


# Shape and dtype of tensors by name.
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def shapes_of(kept: Mapping[str, Kept], checks: Arguments, layout: Layout, pages: int | None) -> Shapes:
    """Shapes and dtypes of a layer's tensors; `pages` is None for a contiguous cache."""
    sizes = checks.sizes
    return {
        name: ((*layout.rows(each, pages), sizes[each.heads], sizes[each.dim]), each.dtype or checks.dtype)
        for name, each in kept.items()
    }


def check_layer(
    place: str, layer: Mapping[str, torch.Tensor], shapes: Shapes, checks: Arguments, device: torch.device
) -> list[torch.Tensor]:
    """Check the caller's tensors of a layer, whose pages must have these shapes, and return them in order."""
    if not isinstance(layer, Mapping) or set(layer) != set(shapes):
        found = ", ".join(layer) if isinstance(layer, Mapping) else type(layer).__name__
        raise ValueError(f"{place}: expected tensors by name: {', '.join(shapes)}; got {found}")
    tensors = [layer[name] for name in shapes]
    pages = tensors[0].shape[0] if isinstance(tensors[0], torch.Tensor) and tensors[0].dim() == 4 else 0
    dims = ("pages", "rows", "Hkv", "D")
    for tensor, (name, (shape, dtype)) in zip(tensors, shapes.items(), strict=True):
        checks.check_tensor(f"{place}[{name!r}]", tensor, dims, (pages, *shape), device=device, dtype=dtype)
        if not tensor.is_contiguous():
            raise ValueError(f"{place}[{name!r}]: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensors


def check_page_size(page_size: object) -> None:
    """Raise ValueError unless `page_size` is in PAGE_SIZES."""
    if not isinstance(page_size, int) or page_size not in PAGE_SIZES:
        raise ValueError(f"page_size: expected one of {', '.join(map(str, PAGE_SIZES))}, got {page_size!r}")
