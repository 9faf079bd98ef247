"""Helpers of `NativeSparseAttention` that do not depend on the spec."""

from collections.abc import Callable

import torch

from .arguments import check_cu_seqlens

# A position encoding. It takes q or k, (B, T, H, Dk) or packed (T_total, H, Dk), and the tokens' positions, int64 with
# the same leading dims or (1, T). It returns a tensor of the same shape and dtype.
Rotary = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def check_hidden(
    hidden: torch.Tensor, projection: torch.nn.Module, hidden_size: int, cu_seqlens: torch.Tensor | None
) -> None:
    """Check hidden states (B, T, hidden_size), packed (T_total, hidden_size), against the layer that projects them."""
    layout = f"(B, T, {hidden_size})" if cu_seqlens is None else f"(T_total, {hidden_size})"
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"hidden: expected a torch.Tensor {layout}, got {type(hidden).__name__}")
    if hidden.is_nested or hidden.layout != torch.strided or not hidden.is_floating_point():
        kind = "a nested tensor" if hidden.is_nested else f"{hidden.dtype}, {hidden.layout}"
        raise TypeError(f"hidden: expected a dense floating tensor {layout}, got {kind}")
    if hidden.dim() != (3 if cu_seqlens is None else 2) or hidden.shape[-1] != hidden_size:
        raise ValueError(f"hidden: expected {layout}, got shape {tuple(hidden.shape)}")
    weight = projection.weight if type(projection) is torch.nn.Linear else hidden  # else it was replaced
    if weight.dtype != hidden.dtype and (hidden.is_meta or not torch.is_autocast_enabled(hidden.device.type)):
        raise TypeError(f"hidden: expected dtype {weight.dtype}, as the layer's weights, got {hidden.dtype}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, hidden.shape[0], hidden.device)


def positions_of(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor | None, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Positions of tokens in their sequences, int64: (1, T), or (T_total,) if packed.

    With `starts` (B,), the number of tokens before those in `hidden`, the result is (B, T).
    """
    rows = torch.arange(hidden.shape[-2], device=hidden.device)
    if cu_seqlens is not None:
        first = torch.searchsorted(cu_seqlens.long(), rows, right=True) - 1
        return rows - cu_seqlens[first]
    return rows[None] if starts is None else rows + starts.long()[:, None]


def fill_with_mean(weight: torch.Tensor, block: int) -> None:
    """Set a (Hkv, block * D, D) matrix so that it computes the mean of a block's tokens."""
    identity = torch.eye(weight.shape[-1], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        weight.copy_(identity.repeat(block, 1) / block)
