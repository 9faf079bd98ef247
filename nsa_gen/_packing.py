"""Rows of a model that hold several documents: checks of a call's arguments, done once for all layers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Packing:
    """What the model's layers, which get the same tensors one after the other, found in them.

    Reading values from a GPU waits, once per forward of the model. The first layer's checks are valid for the others,
    as long as the tensors are the same and were not written to. Compiled code and CUDA graphs check on the GPU instead.
    """

    def __init__(self) -> None:
        self._last: tuple[int, list[Any], Tensor | None] | None = None

    def __reduce__(self) -> tuple[type[Packing], tuple[()]]:
        return Packing, ()

    def bounds(
        self,
        hidden: Tensor,
        position_ids: Tensor | None,
        mask: Tensor | None,
        cu_seq_lens_q: Tensor | None,
        cu_seq_lens_k: Tensor | None,
        lengths: tuple[Any, Any],
    ) -> Tensor | None:
        """Bounds of documents as `nsa_attention` takes them, int32 (N + 1,); None for rows of one document.

        Raises:
            TypeError, ValueError: the message names the argument.
        """
        given = {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        for name, value in given.items():
            if value is not None:
                _check_integers(name, value, hidden)
        if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
            missing, other = sorted(given, key=lambda name: given[name] is not None)
            raise ValueError(f"{missing}: expected the bounds of {other}, got None")
        if cu_seq_lens_q is None:
            for name, value in zip(("max_length_q", "max_length_k"), lengths, strict=True):
                if value is not None:
                    raise ValueError(f"{name}: expected cu_seq_lens_q and cu_seq_lens_k with it, got None")
            if mask is not None:
                raise ValueError(
                    'attention_mask: expected None; load the model with attn_implementation="sdpa", no padding, and '
                    "give rows of several documents cu_seq_lens_q and cu_seq_lens_k"
                )
        elif hidden.shape[0] != 1:
            raise ValueError(f"hidden_states: expected a batch of 1 with cu_seq_lens_q, got {hidden.shape[0]}")
        batch, tokens = hidden.shape[:2]
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (1, 1, tokens, tokens)):
            shown = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: expected None or (1, 1, T, T) with T={tokens}, got {shown}")
        shapes = ((1, tokens), (batch, tokens))
        if position_ids is not None and (not isinstance(position_ids, Tensor) or position_ids.shape not in shapes):
            shown = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else type(position_ids).__name__
            raise ValueError(f"position_ids: expected (1 or B, T) for B={batch}, T={tokens}, got {shown}")
        if hidden.is_meta:
            return None if cu_seq_lens_q is None else cu_seq_lens_q.int()
        tensors = (position_ids, mask, cu_seq_lens_q, cu_seq_lens_k)
        if _without_host(hidden) or any(x is not None and x.is_inference() for x in tensors):
            return _checked(tokens, *tensors)
        last = self._last
        if last is None or not _same(last, tokens, tensors):
            found = _checked(tokens, *tensors)
            last = tokens, [x if x is None else (weakref.ref(x), x._version) for x in tensors], found
            self._last = last
        return last[2]

    @staticmethod
    def counted(tokens: int, bounds: Tensor | None, device: torch.device) -> Tensor:
        """Positions (1, T) of tokens within their documents."""
        rows = torch.arange(tokens, device=device)
        return (rows if bounds is None else rows - bounds.long()[_documents(rows, bounds)])[None]


def _same(last: tuple[int, list[Any], Tensor | None], tokens: int, tensors: Sequence[Tensor | None]) -> bool:
    """Whether these tensors were checked last, and have not changed since."""
    if last[0] != tokens:
        return False
    for x, seen in zip(tensors, last[1], strict=True):
        if (x is None) != (seen is None) or (x is not None and (seen[0]() is not x or seen[1] != x._version)):
            return False
    return True


def _check_integers(name: str, value: Any, hidden: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an integer tensor (N + 1,), got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected an integer tensor (N + 1,), got dtype {value.dtype}")
    if value.is_nested or value.dim() != 1 or not value.shape[0]:
        shown = "a nested tensor" if value.is_nested else f"shape {tuple(value.shape)}"
        raise ValueError(f"{name}: expected (N + 1,), beginning with 0, got {shown}")
    if value.device != hidden.device:
        raise ValueError(f"{name}: expected device {hidden.device}, as hidden_states, got {value.device}")


def _checked(
    tokens: int, position_ids: Tensor | None, mask: Tensor | None, bounds: Tensor | None, others: Tensor | None
) -> Tensor | None:
    starts = None
    if bounds is not None and others is not None:
        same = bounds.shape == others.shape
        if not same:
            raise ValueError(
                f"cu_seq_lens_k: expected as many bounds as cu_seq_lens_q, {len(bounds)}, got {len(others)}"
            )
        _require((bounds == others).all(), "cu_seq_lens_k: expected the bounds of cu_seq_lens_q, got others")
        rising = (bounds.diff() >= 0).all() & (bounds[0] == 0) & (bounds[-1] == tokens)
        _require(rising, f"cu_seq_lens_q: expected bounds rising from 0 to T={tokens}, got others")
        starts = torch.zeros(tokens + 1, dtype=torch.bool, device=bounds.device)
        starts = starts.index_fill(0, bounds.long().clamp(0, tokens), True)[1:tokens]
    if position_ids is not None and tokens > 1:
        steps = position_ids.diff(dim=-1) == 1
        if starts is not None:
            steps = steps | starts.to(steps.device)
        _require(
            steps.all(),
            "position_ids: expected positions that rise by one, and begin anew only at the bounds of cu_seq_lens_q and "
            "cu_seq_lens_k, which rows of several documents need, got others",
        )
    if mask is not None and bounds is not None:
        rows = torch.arange(tokens, device=mask.device)
        documents = _documents(rows, bounds)
        seen = (documents[:, None] == documents) & (rows[:, None] >= rows)
        found = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
        _require((found == seen).all(), "attention_mask: expected None, or what cu_seq_lens_q says, got another mask")
    return None if bounds is None else bounds.int()


def _documents(rows: Tensor, bounds: Tensor) -> Tensor:
    return torch.searchsorted(bounds.long(), rows, right=True) - 1


def _require(holds: Tensor, message: str) -> None:
    if _without_host(holds):
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


def _without_host(x: Tensor) -> bool:
    """Whether waiting for values is impossible now."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
