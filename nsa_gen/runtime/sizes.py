"""Arithmetic of sizes on the host; Triton's functions of the same names take microseconds per call."""

import torch

# By default, a call holds at a time partial results (parts of o or of gradients of the selected branch) of nine times
# the bytes of q, within these limits. With 16 blocks per query, all partial results take 17 or 18 times the bytes of q,
# so there are two chunks. More chunks need less memory, but each chunk reads and writes the sums of dk and dv once
# more.
WORKSPACE_SHARE, LEAST_WORKSPACE, MOST_WORKSPACE = 9, 5 * 2**26, 15 * 2**27


def workspace_of(q: torch.Tensor, asked: int | None = None) -> int:
    """Bytes of partial results that a call may hold at a time: `asked`, or the default for q if None."""
    if asked is not None:
        return asked
    return min(max(WORKSPACE_SHARE * q.numel() * q.element_size(), LEAST_WORKSPACE), MOST_WORKSPACE)


def cdiv(total: int, size: int) -> int:
    """Number of pieces of `size` that cover `total`."""
    return -(-total // size)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()
