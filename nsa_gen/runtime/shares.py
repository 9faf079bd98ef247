"""Gradients that several programs compute a share of: where each writes its own, and their sum in a fixed order."""

import torch

from .sequences import Sequences


def new_shares(splits: int, total: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Where programs write `splits` shares of `total`: float32 (splits, *total.shape), or `total` if there is one."""
    if splits == 1:
        return total
    # Rows of padding between packed sequences belong to no program, so shares begin at zero.
    allocate = total.new_zeros if sequences.packed else total.new_empty
    return allocate(splits, *total.shape, dtype=torch.float32)


def add_up(shares: torch.Tensor, total: torch.Tensor) -> None:
    """Write to `total`, of any float dtype, the sum of its shares, which `new_shares` made."""
    if shares is total:
        return
    if total.dtype == shares.dtype:
        torch.sum(shares, 0, out=total)
    else:
        total.copy_(shares.sum(0))
