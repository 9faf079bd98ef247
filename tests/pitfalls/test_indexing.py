"""Addresses and lists: 64-bit offsets, popular blocks, caller-supplied indices with holes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import DEVICE, GPU, assert_matches_oracle, call_with_gradients, inputs_of, operator_of

FAR = 2**27
"""A stride in elements: a few dozen steps of it pass 2^31 elements, and 2^32."""

on_the_cpu = pytest.mark.skipif(GPU, reason="far-apart rows lie in a sparse file, which the CPU alone can map")


@pytest.fixture
def far_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Copies a tensor into rows `stride` elements apart along one dim: a view of a sparse file, which takes no room."""
    original = torch.UntypedStorage.copy_

    def copy(self: Any, source: Any, *rest: Any) -> Any:
        # Triton's interpreter copies each storage onto itself after a launch: gigabytes of holes, here.
        return self if self.data_ptr() == source.data_ptr() else original(self, source, *rest)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy)

    def spread(x: Tensor, dim: int, stride: int = FAR) -> Tensor:
        near = x.select(dim, 0).numel()
        strides = list(x.select(dim, 0).contiguous().stride())
        strides.insert(dim, stride)
        assert stride >= near and stride * (x.shape[dim] - 1) > 2**31
        # Room before the view too: an offset that wraps at 32 bits reads a hole, a wrong number, rather than faulting.
        before = 2**31
        size = before + stride * (x.shape[dim] - 1) + near
        path = tmp_path / f"far_{len(list(tmp_path.iterdir()))}"
        storage = torch.from_file(str(path), shared=True, size=size, dtype=x.dtype)
        view = storage.as_strided(x.shape, strides, before)
        view.copy_(x)
        assert path.stat().st_blocks * 512 < 2**24  # sparse, or this file system cannot run the test
        return view

    return spread


@on_the_cpu
@pytest.mark.parametrize("names", [("q",), ("k", "v")])
def test_token_offsets_beyond_two_to_the_31_elements_are_exact(far_apart: Any, names: tuple[str, ...]) -> None:
    op = operator_of(dtype="float16", count=2, group=1)
    inputs = inputs_of(op, 18, tokens_kv=21, seed=1)
    near = call_with_gradients(op, inputs)
    moved = {name: far_apart(getattr(inputs, name), 1) for name in names}
    far = call_with_gradients(op, inputs.replace_differentiable(inputs.differentiable() | moved))
    for name, x in near.items():
        assert torch.equal(far[name], x), name


STRIDE = 2**30 + 2**29
"""Fits 32 bits, and twice itself does not: three batch entries or heads so far apart are enough."""


@on_the_cpu
@pytest.mark.parametrize("dim", [0, 2], ids=["batch", "heads"])
def test_batch_and_head_offsets_beyond_two_to_the_31_elements_are_exact(far_apart: Any, dim: int) -> None:
    op = operator_of("cmp slc" if dim else "slc win", indices="computed" if dim else "input", dtype="float16", count=1,
                     initial=0, kv_heads=3 if dim else 1, group=1, gate="none")  # fmt: skip
    inputs = inputs_of(op, 2, tokens_kv=13, batch=1 if dim else 3, seed=2)
    near = call_with_gradients(op, inputs)
    moved = {name: far_apart(getattr(inputs, name), dim, STRIDE) for name in ("q", "k", "v")}
    far = call_with_gradients(op, inputs.replace_differentiable(inputs.differentiable() | moved))
    for name, x in near.items():
        assert torch.equal(far[name], x), name


@on_the_cpu
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "tokens", "heads"])
def test_gate_offsets_beyond_two_to_the_31_elements_are_exact(far_apart: Any, dim: int) -> None:
    op = operator_of(dtype="float16", count=1, initial=0, group=3)
    inputs = inputs_of(op, 3 if dim == 1 else 1, tokens_kv=11, batch=3 if dim == 0 else 1, seed=3)
    near = call_with_gradients(op, inputs)
    moved = {"gates": far_apart(inputs.gates, dim, STRIDE)}
    far = call_with_gradients(op, inputs.replace_differentiable(inputs.differentiable() | moved))
    for name, x in near.items():
        assert torch.equal(far[name], x), name


@on_the_cpu
def test_raw_offsets_beyond_two_to_the_31_elements_are_exact_in_learned_compression(far_apart: Any) -> None:
    op = operator_of("cmp", dtype="float16", phi="linear", phi_value="mlp", position=("learned", "none"), gate="none")
    inputs = inputs_of(op, 1, tokens_kv=20, seed=6)
    near = call_with_gradients(op, inputs)
    moved = {name: far_apart(getattr(inputs, name), 1) for name in ("k", "v")}
    far = call_with_gradients(op, inputs.replace_differentiable(inputs.differentiable() | moved))
    for name, x in near.items():
        assert torch.equal(far[name], x), name


@on_the_cpu
def test_packed_row_offsets_beyond_two_to_the_31_elements_are_exact(far_apart: Any) -> None:
    op = operator_of(dtype="float16", count=2, group=1)
    inputs = inputs_of(op, (12, 0, 9), seed=4)
    near = call_with_gradients(op, inputs)
    moved = {name: far_apart(getattr(inputs, name), 0) for name in ("q", "k", "v")}
    far = call_with_gradients(op, inputs.replace_differentiable(inputs.differentiable() | moved))
    for name, x in near.items():
        if name not in ("k_cmp", "v_cmp"):
            assert torch.equal(far[name], x), name


@on_the_cpu
def test_compressed_row_offsets_beyond_two_to_the_31_elements_are_exact(far_apart: Any) -> None:
    op = operator_of(
        "cmp slc", dtype="float16", phi="external", count=2, compression=(2, 2), gate="none", kv="per_branch"
    )
    inputs = inputs_of(op, 3, tokens_kv=40, seed=5)
    near = call_with_gradients(op, inputs)
    moved = {name: far_apart(getattr(inputs, name), 1) for name in ("k_cmp", "v_cmp")}
    far = call_with_gradients(op, inputs.replace_differentiable(inputs.differentiable() | moved))
    for name, x in near.items():
        assert torch.equal(far[name], x), name


def test_all_queries_choosing_the_same_blocks_fill_two_lists_of_full_length() -> None:
    op = operator_of("slc", indices="input", gate="none", count=2)
    tokens = 21
    inputs = inputs_of(op, tokens, tokens_kv=53, kind="hot", seed=1)
    assert inputs.indices is not None and (inputs.indices == torch.tensor([0, 1], device=DEVICE)).all()
    assert_matches_oracle(op, tokens, inputs=inputs)


def test_the_list_of_block_zero_may_hold_every_query() -> None:
    op = operator_of("cmp slc", gate="none", count=2, initial=1, local=1)
    inputs = inputs_of(op, 21, seed=2)
    _, aux = op.nsa_attention(inputs.q, inputs.k, inputs.v, return_aux=True)
    assert (aux.indices == 0).any(-1).all()
    assert_matches_oracle(op, 21, inputs=inputs)


def test_holes_future_blocks_and_counts_are_honoured_and_never_read_out_of_range() -> None:
    op = operator_of("slc", indices="input", gate="none", count=4)
    inputs = inputs_of(op, 7, tokens_kv=40, seed=3)
    lists = [
        [-1, 0, -1, 1],
        [2, 0, 1, -1],
        [0, 3, 2**31 - 1, 1],
        [-(2**31), -7, 1, 2],
        [1, 2, 0, -1],
        [0, 1, 2, -1],
        [2, 1, 0, 5],
    ]
    assert inputs.indices is not None
    inputs.indices.copy_(torch.tensor(lists, dtype=torch.int32)[None, :, None])
    assert_matches_oracle(op, 7, inputs=inputs)
    counts = torch.tensor([2, 1, 4, 3, 0, 2, 1], dtype=torch.int32, device=DEVICE)[None, :, None].contiguous()
    assert_matches_oracle(op, 7, inputs=replace(inputs, counts=counts))
