"""Tensors whose rows lie more than 2^31 elements apart, in no memory to speak of: views of a sparse file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BEFORE = 2**31
"""Elements before a view: an offset that wraps at 32 bits reads a hole there, a wrong number, rather than faulting."""


@contextmanager
def far_apart(tensors: Mapping[str, Tensor], dim: int = 1, stride: int = 2**27) -> Iterator[dict[str, Tensor]]:
    """Inside, copies of `tensors` whose steps along `dim` are `stride` elements.

    Triton's interpreter copies each storage onto itself after a launch, which here is gigabytes of holes: not inside.
    """
    original = torch.UntypedStorage.copy_

    def copy(self: Any, source: Any, *rest: Any) -> Any:
        return self if self.data_ptr() == source.data_ptr() else original(self, source, *rest)

    with (
        tempfile.TemporaryDirectory(prefix="nsa_gen_far_") as folder,
        mock.patch.object(torch.UntypedStorage, "copy_", copy),
    ):
        yield {name: _spread(x, dim, stride, Path(folder) / name) for name, x in tensors.items()}


def _spread(x: Tensor, dim: int, stride: int, path: Path) -> Tensor:
    near = x.select(dim, 0)
    strides = list(near.contiguous().stride())
    strides.insert(dim, stride)
    last = stride * (x.shape[dim] - 1)
    assert near.numel() <= stride and last > 2**31
    storage = torch.from_file(str(path), shared=True, size=BEFORE + last + near.numel(), dtype=x.dtype)
    view = storage.as_strided(x.shape, strides, BEFORE)
    view.copy_(x)
    assert path.stat().st_blocks * 512 < 2**24, "expected a sparse file; this file system writes out the holes"
    return view
