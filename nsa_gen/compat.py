"""Calling generated operators as other packages' are called: their lists of blocks, and one of their signatures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sorted_lists(
    block_indices: Tensor, block_counts: Tensor | int | None = None, *, blocks: int, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """Convert lists of blocks, in any order and with any padding, to the form that generated operators take.

    Block numbers that are negative or not less than ``blocks`` are padding. Duplicates are removed. Nothing is read on
    the host. Blocks in the future are kept, because the operators ignore them.

    Args:
        block_indices: block numbers (..., S), of any integer dtype.
        block_counts: number of leading slots in use: one number, or (...) integers; all slots if None.
        blocks: number of selection blocks of the sequence, ceil(Tkv / l').
        count: number of slots in the result, the spec's ``selection.count``; S if None.

    Returns:
        indices (..., count) int32, ascending and padded with -1, and counts (...) int32.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, what was expected and what it got.
    """
    _check_tensor("block_indices", block_indices, "a tensor of integers (..., S)", integers=True)
    if block_indices.dim() < 1:
        raise ValueError("block_indices: expected (..., S), got shape ()")
    _check_number("blocks", blocks)
    if count is not None:
        _check_number("count", count)
    if isinstance(block_counts, Tensor):
        _check_tensor("block_counts", block_counts, "a number or a tensor of integers (...)", integers=True)
    elif block_counts is not None:
        _check_number("block_counts", block_counts)
        block_indices, block_counts = block_indices[..., :block_counts], None
    slots = block_indices.shape[-1]
    count = slots if count is None else count
    if slots > count:
        raise ValueError(f"block_indices: expected at most {count} slots, got {slots}")
    found = block_indices.long()
    used = (found >= 0) & (found < blocks)
    if block_counts is not None:
        if block_counts.shape != block_indices.shape[:-1]:
            wanted = tuple(block_indices.shape[:-1])
            raise ValueError(f"block_counts: expected shape {wanted}, got {tuple(block_counts.shape)}")
        _check_device("block_counts", block_counts, block_indices, "block_indices")
        used &= torch.arange(slots, device=found.device) < block_counts[..., None]
    ordered = found.where(used, blocks).sort(dim=-1).values
    twice = torch.zeros_like(used)
    twice[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    ordered = ordered.masked_fill(twice, blocks).sort(dim=-1).values
    indices = ordered.masked_fill(ordered == blocks, -1).int()
    indices = torch.nn.functional.pad(indices, (0, count - slots), value=-1)
    return indices, (indices >= 0).sum(dim=-1, dtype=torch.int32)


def parallel_nsa_of(op: Any) -> Callable[..., Tensor]:
    """Make a function with the signature of flash-linear-attention's ``parallel_nsa`` that runs a generated package.

    The package's spec must have ``combine: {gate: given}``, keys shared by all branches, no joint branch and no sink.
    It must have either compression by means over the selection blocks (block = stride = the selection's block), which
    then selects the blocks, or no compression and ``indices: input``. Sizes in a call must be those of the spec. The
    spec's ``initial`` and ``local`` determine the forced blocks.

    Raises:
        ValueError: the spec does not fit this signature; the message names the field.
    """
    spec = op.SPEC
    compression, selection, window = spec["compression"], spec["selection"], spec["window"]
    _expect("combine.gate", spec["combine"]["gate"], "given")
    _expect("combine.joint", spec["combine"].get("joint", []), [])
    _expect("kv", spec["kv"], "shared")
    if window is not None:
        _expect("window.sink", window.get("sink", "none"), "none")
    if selection is None:
        raise ValueError("selection: expected a selection, got none")
    _expect("selection.indices", selection["indices"], "input" if compression is None else "computed")
    for field, value in {"scores": "compression", "pool": "sum", "scope": "group", "sink": "none"}.items():
        _expect(f"selection.{field}", selection.get(field, value), value)
    if compression is not None:
        if not compression.get("output", True):
            raise ValueError(
                "compression.output: expected true, got false: these functions return compressed attention"
            )
        _expect("compression.block", compression["block"], selection["block"])
        _expect("compression.stride", compression["stride"], selection["block"])
        for side in ("key", "value"):
            _expect(f"compression.phi.{side}", compression["phi"][side], "mean")
            _expect(f"compression.position.{side}", compression["position"][side], "none")
    auto = spec["scale"] == "auto"
    own_scale = spec["head_dim"]["qk"] ** -0.5 if auto else float(spec["scale"])

    def parallel_nsa(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g_cmp: Tensor | None = None,
        g_slc: Tensor | None = None,
        g_swa: Tensor | None = None,
        block_indices: Tensor | None = None,
        block_counts: Tensor | int = 16,
        block_size: int = 64,
        window_size: int = 0,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Native sparse attention of q (B, T, Hq, Dk), k (B, T, Hkv, Dk), v (B, T, Hkv, Dv): o (B, T, Hq, Dv).

        Gates are values (B, T, Hq), one for each branch of the spec. block_indices (B, T, Hkv, S) is for a spec without
        compression. With cu_seqlens, int32 or int64 (N + 1,) on q's device, B is 1.

        Raises:
            TypeError, ValueError: an argument is invalid; the message names it, what was expected and what it got.
        """
        for name, x in (("q", q), ("k", k), ("v", v)):
            _check_tensor(name, x, "a tensor (B, T, H, D)", dims=4)
            _check_device(name, x, q, "q")
        _expect("block_size", block_size, selection["block"])
        _expect("window_size", window_size, window["size"] if window else 0)
        wanted = q.shape[-1] ** -0.5 if scale is None else scale
        if isinstance(wanted, bool) or not isinstance(wanted, int | float):
            raise TypeError(f"scale: expected {own_scale}, as in the spec, got {type(wanted).__name__}")
        if not math.isclose(wanted, own_scale, rel_tol=1e-6):
            raise ValueError(f"scale: expected {own_scale}, as in the spec, got {wanted}")
        given = {"g_cmp": g_cmp, "g_slc": g_slc, "g_swa": g_swa}
        present = {"g_cmp": compression is not None, "g_slc": True, "g_swa": window is not None}
        for name, gate in given.items():
            if (gate is not None) != present[name]:
                raise ValueError(f"{name}: expected {'a tensor' if present[name] else 'None'}, as the spec has it")
            if gate is not None:
                _check_tensor(name, gate, "a tensor of gates (B, T, Hq)", dims=3)
                if gate.shape != q.shape[:3]:
                    raise ValueError(f"{name}: expected shape {tuple(q.shape[:3])}, as q, got {tuple(gate.shape)}")
                _check_device(name, gate, q, "q")
        gates = torch.stack([gate for gate in given.values() if gate is not None], dim=-1)
        lists: dict[str, Tensor] = {}
        if compression is None:
            if block_indices is None:
                raise ValueError("block_indices: expected a tensor, as the spec has no compression, got None")
            _check_tensor("block_indices", block_indices, "a tensor of integers (B, T, Hkv, S)", 4, integers=True)
            _check_device("block_indices", block_indices, q, "q")
            blocks = -(-k.shape[1] // block_size)
            found = sorted_lists(block_indices, block_counts, blocks=blocks, count=selection["count"])
            lists = dict(zip(("indices", "counts"), found, strict=True))
        else:
            if block_indices is not None:
                raise ValueError("block_indices: expected None, as compression chooses the blocks, got a tensor")
            _expect("block_counts", block_counts, selection["count"])
        if cu_seqlens is None:
            return op.nsa_attention(q, k, v, gates, **lists)
        _check_tensor("cu_seqlens", cu_seqlens, "an int32 or int64 tensor (N + 1,)", dims=1, integers=True)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens: expected an int32 or int64 tensor (N + 1,), got {cu_seqlens.dtype}")
        _check_device("cu_seqlens", cu_seqlens, q, "q")
        if q.shape[0] != 1:
            raise ValueError(f"q: expected a batch of 1 with cu_seqlens, got {q.shape[0]}")
        lists = {name: x[0] for name, x in lists.items()}
        bounds = cu_seqlens.clamp(-1, 2**31 - 1).int()  # so that none wraps round to one that fits
        return op.nsa_attention(q[0], k[0], v[0], gates[0], cu_seqlens=bounds, **lists)[None]

    return parallel_nsa


def _expect(name: str, found: object, expected: object) -> None:
    if isinstance(found, Tensor | float | bool) or found != expected:
        raise ValueError(
            f"{name}: expected {expected!r}, got {'a tensor' if isinstance(found, Tensor) else repr(found)}"
        )


def _check_tensor(name: str, found: Any, expected: str, dims: int | None = None, *, integers: bool = False) -> None:
    """Raise unless `found` is a dense tensor of integers, or else of floating numbers, with so many dims."""
    if not isinstance(found, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(found).__name__}")
    if found.is_nested or found.layout != torch.strided:
        raise TypeError(f"{name}: expected {expected}, got a {'nested' if found.is_nested else 'sparse'} one")
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not (whole if integers else found.is_floating_point()):
        raise TypeError(f"{name}: expected {expected}, got {found.dtype}")
    if dims is not None and found.dim() != dims:
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(found.shape)}")


def _check_number(name: str, found: Any) -> None:
    if isinstance(found, bool) or not isinstance(found, int | torch.SymInt):
        raise TypeError(f"{name}: expected a whole number, got {type(found).__name__}")
    if found < 0:
        raise ValueError(f"{name}: expected at least 0, got {found}")


def _check_device(name: str, found: Tensor, like: Tensor, of: str) -> None:
    if found.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, as {of}, got {found.device}")
