"""Gradients to which several programs contribute shares, and the sum of the shares in a fixed order."""

import torch

from .sequences import Sequences


def new_shares(splits: int, total: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Allocate `splits` shares of `total`: float32 (splits, *total.shape), or `total` itself if `splits` is 1."""
    if splits == 1:
        return total
    # No program writes the rows between packed sequences, so the shares are initialized to zero.
    allocate = total.new_zeros if sequences.packed else total.new_empty
    return allocate(splits, *total.shape, dtype=torch.float32)


def add_up(shares: torch.Tensor, total: torch.Tensor) -> None:
    """Write the sum of the shares, which `new_shares` allocated, to `total`, which may have any float dtype."""
    if shares is total:
        return
    if total.dtype == shares.dtype:
        torch.sum(shares, 0, out=total)
    else:
        total.copy_(shares.sum(0))
