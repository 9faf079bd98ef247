"""Guard bands around every tensor that an operator allocates, and calls in which the host may not wait for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BAND = 4096
"""Elements before and behind a tensor: a tile of 128 rows written past the end of a small head dim lands inside."""

_aten = torch.ops.aten
_FACTORIES = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
        _aten.zeros.default,
        _aten.zeros_like.default,
        _aten.new_zeros.default,
        _aten.full.default,
        _aten.full_like.default,
        _aten.new_full.default,
    }
)


def _pattern(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


class GuardBands(TorchDispatchMode):
    """Inside, tensors made by torch's factories lie between two bands of NaN (integers: the largest value).

    A kernel that reads a band carries NaN into its result; one that writes there is found by `damage`. A band's NaN
    overwritten by another NaN is not noticed. Tensors that operations return (sums, sorts) have no bands.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[tuple[Tensor, int, tuple[int, ...]]] = []

    @property
    def guarded(self) -> int:
        """How many tensors were given bands."""
        return len(self._held)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        plain = func in _FACTORIES and isinstance(result, Tensor) and result.layout == torch.strided
        if not plain or result.numel() == 0 or result.dtype == torch.bool or result.is_complex():
            return result
        elements = result.untyped_storage().nbytes() // result.element_size()
        pattern = _pattern(result.dtype)
        flat = torch.full((elements + 2 * BAND,), pattern, dtype=result.dtype, device=result.device)
        guarded = flat.as_strided(result.shape, result.stride(), BAND)
        if "empty" not in func.name():
            guarded.copy_(result)
        self._held.append((flat, elements, tuple(result.shape)))
        return guarded

    def damage(self) -> list[str]:
        """A line for each tensor beside which something was written."""
        found = []
        for flat, elements, shape in self._held:
            for side, band in (("before", flat[:BAND]), ("behind", flat[BAND + elements :])):
                intact = torch.isnan(band) if flat.is_floating_point() else band == _pattern(flat.dtype)
                if not bool(intact.all()):
                    written = int((~intact).sum())
                    found.append(f"{written} elements written {side} a {flat.dtype} tensor of shape {shape}")
        return found


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside, an operation by which the host waits for a CUDA device is a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def synchronises(call: Callable[[], object]) -> str:
    """Call once to warm up (compiling may wait), once watched: what waited, or ""."""
    call()
    torch.cuda.synchronize()
    try:
        with no_synchronisation():
            call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    return ""
