"""What every GPU check uses, of torch alone: progress, results so far, memory given back, and equality of bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_tell: Callable[[dict[str, Any]], None] | None = None


def use(tell: Callable[[dict[str, Any]], None]) -> None:
    """Report to the process that runs the tests from now on; until then `say` prints and `save` does nothing."""
    global _tell
    _tell = tell


def say(line: str) -> None:
    """A line of progress: a sign of life."""
    print(line, flush=True) if _tell is None else _tell({"at": line})


def save(result: Mapping[str, Any]) -> None:
    """Report what a check has found so far, so that being killed loses nothing."""
    if _tell is not None:
        _tell({"found": finite(result)})


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def release(device: str) -> None:
    """Give cached memory back to the GPU, which other processes share."""
    if device == "cuda":
        torch.cuda.empty_cache()


def other_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, int]:
    """How many elements of each tensor have other bits: NaN equals NaN of the same bits, and 0 is not -0."""
    found = {}
    for name, x in first.items():
        y = second[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            found[name] = max(x.numel(), y.numel(), 1)
            continue
        integer = INTEGERS[x.element_size()]
        differing = int((x.contiguous().view(integer) != y.contiguous().view(integer)).sum())
        if differing:
            found[name] = differing
    return found


def expect_ok(check: Callable[..., None], *arguments: Any, **request: Any) -> dict[str, Any]:
    """The result that a check fills, which says whether all is "ok"; AssertionError if it is not."""
    result: dict[str, Any] = {"ok": False}
    try:
        check(result, *arguments, **request)
    finally:
        save(result)
    assert result["ok"], result.get("error") or "the check did not come to an end"
    return result
