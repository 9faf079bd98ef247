"""Lists of blocks of other packages, and the signature of one of them, against a plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.compat import parallel_nsa_of, sorted_lists
from tests.support import DEVICE, Operator, operator_of

BLOCK, COUNT, WINDOW, TOKENS = 16, 3, 10, 70


def chosen() -> Operator:
    return operator_of(gate="given", compression=(BLOCK, BLOCK), block=BLOCK, count=COUNT, window=WINDOW)


def handed() -> Operator:
    return operator_of("slc win", gate="given", indices="input", block=BLOCK, count=COUNT, window=WINDOW)


def drawn(tokens: int = TOKENS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"q": (2, 16), "k": (1, 16), "v": (1, 16), "g_cmp": (2,), "g_slc": (2,), "g_swa": (2,)}
    return {name: torch.randn(1, tokens, *size, generator=generator).to(DEVICE) for name, size in sizes.items()}


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of one query (H, D) to the rows seen of k and v, and its weights; zero where there are none."""
    if not seen.any():
        return torch.zeros(q.shape[0], v.shape[-1], dtype=q.dtype), torch.zeros(q.shape[0], len(k), dtype=q.dtype)
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v, scores.softmax(-1)


def reference(x: dict[str, Tensor], lists: Tensor | None = None) -> Tensor:
    """Token by token, in float64: one KV head, blocks compressed by their means, the first and the last are forced."""
    q, k, v, g_cmp, g_slc, g_swa = (x[name][0].double().cpu() for name in ("q", "k", "v", "g_cmp", "g_slc", "g_swa"))
    k, v, tokens = k[:, 0], v[:, 0], len(q)
    whole = tokens // BLOCK
    k_cmp, v_cmp = (y[: whole * BLOCK].unflatten(0, (whole, BLOCK)).mean(1) for y in (k, v))
    rows = torch.arange(tokens)
    o = torch.zeros(tokens, 2, 16, dtype=torch.float64)
    for t in range(tokens):
        own = t // BLOCK
        o_cmp, weights = attend(q[t], k_cmp, v_cmp, (torch.arange(whole) + 1) * BLOCK - 1 <= t)
        if lists is None:
            importance = weights.sum(0)[1:own]
            best = (1 + importance.argsort(descending=True))[: max(0, COUNT - 2)].tolist()
            blocks = {0, own, *best}
            o[t] += g_cmp[t, :, None] * o_cmp
        else:
            blocks = set(lists[t].tolist())
        mine = torch.tensor([int(row) // BLOCK in blocks for row in rows]) & (rows <= t)
        o[t] += g_slc[t, :, None] * attend(q[t], k, v, mine)[0]
        o[t] += g_swa[t, :, None] * attend(q[t], k, v, (rows <= t) & (rows > t - WINDOW))[0]
    return o[None]


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-4, atol=1e-5)


def test_lists_are_sorted_cleaned_of_padding_and_of_blocks_named_twice() -> None:
    messy = torch.tensor([[5, 2, -1, 2], [9, 7, 1, 0], [8, 8, 8, 8], [3, 2, 1, 0]])
    indices, counts = sorted_lists(messy, torch.tensor([4, 3, 4, 2]), blocks=8, count=5)
    assert indices.tolist() == [[2, 5, -1, -1, -1], [1, 7, -1, -1, -1], [-1] * 5, [2, 3, -1, -1, -1]]
    assert counts.tolist() == [2, 2, 0, 2] and {indices.dtype, counts.dtype} == {torch.int32}
    assert sorted_lists(messy, 2, blocks=8)[0].tolist() == [[2, 5], [7, -1], [-1, -1], [2, 3]]
    assert sorted_lists(messy[:0], blocks=8)[0].shape == (0, 4)


def test_lists_that_cannot_be_taken_are_refused() -> None:
    lists = torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^block_indices: expected a tensor of integers .*got torch.float32"):
        sorted_lists(lists.float(), blocks=4)
    with pytest.raises(ValueError, match=r"^block_indices: expected at most 3 slots, got 4"):
        sorted_lists(lists, blocks=4, count=3)
    with pytest.raises(ValueError, match=r"^block_counts: expected shape \(3,\), got \(2,\)"):
        sorted_lists(lists, torch.ones(2).int(), blocks=4)


def test_blocks_chosen_by_compression_agree_with_the_reference() -> None:
    x = drawn()
    o = parallel_nsa_of(chosen())(**x, block_counts=COUNT, block_size=BLOCK, window_size=WINDOW)
    assert_near(o, reference(x))


def test_blocks_handed_over_in_any_order_agree_with_the_reference_batched_and_packed() -> None:
    x, attention = drawn(), parallel_nsa_of(handed())
    del (arguments := dict(x))["g_cmp"]
    own = torch.arange(TOKENS, device=DEVICE)[None, :, None] // BLOCK
    lists = torch.stack([own, (own - 1).where(own > 0, 77)], dim=-1)
    sizes = {"block_size": BLOCK, "window_size": WINDOW}
    o = attention(**arguments, block_indices=lists, block_counts=2, **sizes)
    assert_near(o, reference(x, lists[0, :, 0]))
    some = {name: y[:, :20] for name, y in arguments.items()}
    bounds = torch.tensor([0, 20], device=DEVICE)
    packed = attention(**some, block_indices=lists[:, :20], block_counts=2, cu_seqlens=bounds, **sizes)
    assert_near(packed, reference({name: y[:, :20] for name, y in x.items()}, lists[0, :20, 0]))


def test_what_the_spec_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^combine.gate: expected 'given', got 'sigmoid'"):
        parallel_nsa_of(operator_of())
    with pytest.raises(ValueError, match=r"^window.sink: expected 'none', got 'learned'"):
        parallel_nsa_of(operator_of(gate="given", sink="learned"))
    with pytest.raises(ValueError, match=r"^compression.block: expected 16, got 8"):
        parallel_nsa_of(operator_of(gate="given"))
    with pytest.raises(ValueError, match=r"^selection.scores: expected 'compression', got 'mean'"):
        parallel_nsa_of(operator_of(gate="given", compression=(16, 16), scores="mean"))
    with pytest.raises(ValueError, match=r"^selection.scores: expected 'compression', got \{'indexer'"):
        parallel_nsa_of(operator_of(gate="given", compression=(16, 16), index=16))
    for field, value, other in (("pool", "sum", "max"), ("scope", "group", "head")):
        with pytest.raises(ValueError, match=f"^selection.{field}: expected '{value}', got '{other}'"):
            parallel_nsa_of(operator_of(gate="given", compression=(16, 16), **{field: other}))
    attention, x = parallel_nsa_of(chosen()), drawn(4)
    sizes = {"block_counts": COUNT, "block_size": BLOCK, "window_size": WINDOW}
    for changes, message in (
        ({"block_size": 64}, r"^block_size: expected 16, got 64"),
        ({"window_size": 0}, r"^window_size: expected 10, got 0"),
        ({"block_counts": 16}, r"^block_counts: expected 3, got 16"),
        ({"scale": 1.0}, r"^scale: expected 0.25, as in the spec, got 1.0"),
        ({"g_swa": None}, r"^g_swa: expected a tensor"),
        ({"block_indices": torch.zeros(1, 4, 1, 3).int()}, r"^block_indices: expected None, as compression chooses"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(**{**x, **sizes, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_indices": [[0, 1]]}, "block_indices: expected a tensor of integers .*got list"),
        ({"block_indices": torch.zeros(3, 4, dtype=torch.bool)}, "block_indices: .*got torch.bool"),
        ({"block_indices": torch.zeros(3, 4, dtype=torch.complex64)}, "block_indices: .*got torch.complex64"),
        ({"block_indices": torch.zeros(3, 4).long().to_sparse()}, "block_indices: .*got a sparse one"),
        ({"block_indices": torch.tensor(3)}, r"block_indices: expected \(..., S\), got shape \(\)"),
        ({"block_counts": torch.ones(3)}, "block_counts: .*got torch.float32"),
        ({"block_counts": [1, 2, 3]}, "block_counts: expected a whole number, got list"),
        ({"block_counts": True}, "block_counts: expected a whole number, got bool"),
        ({"block_counts": -1}, "block_counts: expected at least 0, got -1"),
        ({"blocks": 4.0}, "blocks: expected a whole number, got float"),
        ({"blocks": -1}, "blocks: expected at least 0"),
        ({"count": torch.tensor(4)}, "count: expected a whole number, got Tensor"),
    ],
)
def test_lists_of_a_wrong_kind_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{said}"):
        sorted_lists(**{"block_indices": torch.zeros(3, 4, dtype=torch.int64), "blocks": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": [1.0]}, "q: expected a tensor .*got list"),
        ({"q": torch.zeros(4, 2, 16)}, r"q: expected a tensor \(B, T, H, D\), got shape"),
        ({"k": torch.zeros(1, 4, 1, 16).to_sparse()}, "k: expected a tensor .*got a sparse one"),
        ({"v": torch.zeros(1, 4, 1, 16).long()}, "v: expected a tensor .*got torch.int64"),
        ({"k": torch.nested.nested_tensor([torch.zeros(4, 1, 16)], layout=torch.jagged)}, "k: .*got a nested one"),
        ({"g_slc": 1.0}, "g_slc: expected a tensor of gates .*got float"),
        ({"g_swa": torch.zeros(1, 4, 1)}, r"g_swa: expected shape \(1, 4, 2\), as q, got \(1, 4, 1\)"),
        ({"g_swa": torch.zeros(1, 4, 2, 1)}, "g_swa: expected a tensor of gates"),
        ({"scale": torch.tensor(0.25)}, "scale: expected 0.25, as in the spec, got Tensor"),
        ({"scale": "auto"}, "scale: expected 0.25, as in the spec, got str"),
        ({"block_size": 16.0}, "block_size: expected 16, got 16.0"),
        ({"block_counts": torch.tensor(3)}, "block_counts: expected 3, got a tensor"),
        ({"cu_seqlens": (0, 4)}, "cu_seqlens: expected an int32 or int64 tensor .*got tuple"),
        ({"cu_seqlens": [0, 4]}, "cu_seqlens: expected an int32 or int64 tensor .*got list"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens: .*got torch.float32"),
        ({"cu_seqlens": torch.tensor([False, True])}, "cu_seqlens: .*got torch.bool"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int16)}, "cu_seqlens: .*got torch.int16"),
        ({"cu_seqlens": torch.tensor([[0, 4]])}, "cu_seqlens: .*got shape"),
        ({"cu_seqlens": torch.tensor([0, 4], device="meta")}, "cu_seqlens: expected device"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: expected bounds rising"),
        ({"cu_seqlens": torch.tensor([0, 2**32 + 4])}, "cu_seqlens: expected bounds rising"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "cu_seqlens: expected bounds rising"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, "cu_seqlens: expected"),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    if DEVICE.type == "cuda" and "rising" in said:
        pytest.skip("values on a GPU are the caller's to get right")
    sizes = {"block_counts": COUNT, "block_size": BLOCK, "window_size": WINDOW}
    given = {
        name: x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta and name != "scale" else x
        for name, x in changes.items()
    }
    with pytest.raises((TypeError, ValueError), match=f"^{said}"):
        parallel_nsa_of(chosen())(**{**drawn(4), **sizes, **given})


def test_bounds_of_either_width_and_no_tokens_at_all_are_taken() -> None:
    attention, sizes = parallel_nsa_of(chosen()), {"block_counts": COUNT, "block_size": BLOCK, "window_size": WINDOW}
    results = [
        attention(**drawn(8), **sizes, cu_seqlens=torch.tensor([0, 3, 8], dtype=dtype, device=DEVICE))
        for dtype in (torch.int32, torch.int64)
    ]
    assert torch.equal(*results)
    assert attention(**drawn(0), **sizes).shape == (1, 0, 2, 16)
