"""Arithmetic of sizes on the host, where Triton's functions of these names take microseconds a call."""

import torch

# Bytes of partial results, of o or of gradients of the selected branch, that a call holds at a time by default: nine
# times those of q, and no fewer or more than these. With 16 blocks a query all of them take 17 or 18 times those of q,
# so that there are two chunks. More chunks need less, but each reads and writes the sums of dk and dv once more.
WORKSPACE_SHARE, LEAST_WORKSPACE, MOST_WORKSPACE = 9, 5 * 2**26, 15 * 2**27


def workspace_of(q: torch.Tensor, asked: int | None = None) -> int:
    """Bytes of partial results that a call may hold at a time: what was asked for, else the default for q."""
    if asked is not None:
        return asked
    return min(max(WORKSPACE_SHARE * q.numel() * q.element_size(), LEAST_WORKSPACE), MOST_WORKSPACE)


def cdiv(total: int, size: int) -> int:
    """How many pieces of `size` cover `total`."""
    return -(-total // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number`; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()
