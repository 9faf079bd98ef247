"""Inputs of a bucket, drawn on the GPU: the operator's own selections follow from them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from nsa_gen.bench.inputs import InputKind, draw_inputs
from nsa_gen.tuning.shapes import Bucket

if TYPE_CHECKING:
    from nsa_gen.spec import Spec
    from nsa_gen.verification.inputs import Inputs


def bucket_inputs(
    spec: Spec, bucket: Bucket, kind: InputKind, *, device: torch.device | str = "cuda", seed: int = 0
) -> Inputs:
    """Inputs at the upper ends of a bucket: (B, T, H, D), or packed (T, H, D) with cu_seqlens; see `draw_inputs`."""
    if not bucket.packed:
        drawn = [draw_inputs(spec, bucket.tokens, device=device, seed=seed + n, kind=kind) for n in range(bucket.batch)]
        return _joined(drawn, dim=0)
    lengths = bucket.lengths
    drawn = [draw_inputs(spec, length, device=device, seed=seed + n, kind=kind) for n, length in enumerate(lengths)]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    whole = _joined(drawn, dim=1)
    changed: dict[str, Any] = {"cu_seqlens": bounds}
    for name in ("k_cmp", "v_cmp"):
        if getattr(whole, name) is not None:
            changed[name] = _laid_out(spec, [getattr(each, name) for each in drawn], bucket)
    whole = replace(whole, **changed)
    flat = {each.name: getattr(whole, each.name) for each in fields(whole)}
    return replace(whole, **{name: x[0] for name, x in flat.items() if isinstance(x, torch.Tensor) and x is not bounds})


def _joined(drawn: list[Inputs], dim: int) -> Inputs:
    """Inputs one after the other; what phi has learned is that of the first."""
    first = drawn[0]
    names = [each.name for each in fields(first) if isinstance(getattr(first, each.name), torch.Tensor)]
    return replace(first, **{name: torch.cat([getattr(each, name) for each in drawn], dim) for name in names})


def _laid_out(spec: Spec, blocks: list[torch.Tensor], bucket: Bucket) -> torch.Tensor:
    """Compressed rows (1, T // stride, H, D), packed: block j of sequence s is row start_s // stride + j."""
    assert spec.compression is not None
    stride = spec.compression.stride
    rows = blocks[0].new_zeros((1, bucket.tokens // stride, *blocks[0].shape[2:]))
    start = 0
    for block, length in zip(blocks, bucket.lengths, strict=True):
        rows[:, start // stride : start // stride + block.shape[1]] = block
        start += length
    return rows
