"""A choice of blocks made before is followed: `indices` and `counts` given to an operator that computes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.verification.reference.inputs import Inputs
from tests.support import DEVICE, Operator, call, call_with_gradients, inputs_of, operator_of

SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "three branches": ("cmp slc win", {"count": 4, "local": 2, "window": 40}),
    "phi with parameters": ("cmp slc", {"phi": "weighted", "position": ("learned", "none"), "kv_heads": 2}),
    "keys of each branch": ("cmp slc win", {"kv": "per_branch", "gate": "given"}),
    "indexer": ("slc", {"gate": "none", "index": 16, "initial": 0, "count": 3}),
    "mean scores": ("slc", {"gate": "none", "scores": "mean", "initial": 0, "count": 3}),
}
CALLS: dict[str, dict[str, Any]] = {
    "batched": {"tokens": 50, "batch": 2},
    "more keys than queries": {"tokens": 7, "tokens_kv": 71},
    "packed": {"tokens": (30, 0, 51)},
}
every_spec = pytest.mark.parametrize("name", SPECS)


def operator(name: str, **changes: Any) -> Operator:
    branches, fields = SPECS[name]
    return operator_of(branches, **(fields | changes))


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


def other_choice(op: Operator, inputs: Inputs, seed: int = 3) -> Tensor:
    """Blocks that no scorer would choose: a random half of those a query sees, out of order, among empty slots."""
    generator = torch.Generator().manual_seed(seed)
    selection = op.spec.selection
    assert selection is not None
    batch, rows = inputs.q.shape[:2]
    tokens = inputs.k.shape[1]
    chosen = torch.full((batch, rows, op.spec.heads.kv, selection.count), -1, dtype=torch.int32)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in chosen.shape[:3])).tolist():
        own = (tokens - rows + place[1]) // selection.block
        blocks = torch.randperm(own + 1, generator=generator)[: max(1, selection.count // 2)]
        slots = torch.randperm(selection.count, generator=generator)[: len(blocks)]
        chosen[tuple(place)][slots] = blocks.int()
    return chosen.to(DEVICE)


@pytest.mark.parametrize("shape", CALLS)
@every_spec
def test_the_operators_own_choice_gives_the_same_bits_again(name: str, shape: str) -> None:
    op = operator(name)
    inputs = inputs_of(op, **CALLS[shape])
    first = call_with_gradients(op, inputs)
    again = call_with_gradients(op, inputs, indices=first["indices"], counts=first["counts"])
    assert_equal_bits(again, first)


@every_spec
def test_another_choice_is_what_a_spec_with_given_indices_makes_of_it(name: str) -> None:
    op = operator(name)
    # Without a scorer, such a spec has no mean keys either.
    indexer = {"index": 0} if op.parameters.index_dim else {}
    given = operator(name, indices="input", scores="compression", initial=0, local=0, **indexer)
    # A choice that is given needs no indexer.
    inputs = replace(inputs_of(op, 53), q_idx=None, k_idx=None)
    indices = other_choice(op, inputs)
    found = call_with_gradients(op, inputs, indices=indices)
    expected = call_with_gradients(given, inputs, indices=indices)
    assert torch.equal(found.pop("indices"), indices)
    assert bool((found.pop("counts") == indices.shape[-1]).all())
    assert_equal_bits(found, expected)


def local_in_window(op: Operator, local: int, key_major: int) -> Any:
    values = {"LOCAL_IN_WINDOW": local, "KEY_MAJOR_FORWARD": key_major, "KEY_MAJOR_DQ": key_major}
    return op.configs.override("selected_attention", **values)


@pytest.mark.parametrize("key_major", [0, 1], ids=["query-major", "key-major"])
@pytest.mark.parametrize("shape", CALLS)
def test_the_same_bits_again_if_the_window_does_the_local_blocks(shape: str, key_major: int) -> None:
    op = operator("three branches")
    inputs = inputs_of(op, **CALLS[shape])
    with local_in_window(op, 1, key_major):
        first = call_with_gradients(op, inputs)
        again = call_with_gradients(op, inputs, indices=first["indices"], counts=first["counts"])
    assert_equal_bits(again, first)


@pytest.mark.parametrize("key_major", [0, 1], ids=["query-major", "key-major"])
@pytest.mark.parametrize("scope", ["group", "all"])
def test_the_window_does_the_local_blocks_of_lists_that_end_with_them_alone(scope: str, key_major: int) -> None:
    op = operator("three branches", scope=scope)
    inputs = inputs_of(op, 53)
    with local_in_window(op, 0, key_major):
        indices = call_with_gradients(op, inputs)["indices"].clone()
        # Of every three tokens' lists, one lacks its own block, and one has the same blocks in another order.
        indices[:, 30::3, :, -1] = -1
        indices[:, 31::3] = indices[:, 31::3].flip(-1)
        expected = call_with_gradients(op, inputs, indices=indices)
    with local_in_window(op, 1, key_major):
        found = call_with_gradients(op, inputs, indices=indices)
        recomputed = call_with_gradients(op, inputs, indices=indices, recompute=("slc", "win"))
    assert_equal_bits(recomputed, found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("key_major", [0, 1], ids=["query-major", "key-major"])
def test_a_nan_in_a_local_block_that_a_list_lacks_stays_out_of_the_selected_branch(key_major: int) -> None:
    op = operator("three branches")
    inputs = inputs_of(op, 53)
    with local_in_window(op, 1, key_major):
        indices = call_with_gradients(op, inputs)["indices"].clone()
        # Token 45 is in block 2, which no list has any more.
        assert op.spec.selection.block == 16
        indices[indices == 2] = -1
        inputs.v[:, 45] = float("nan")
        _, aux = call(op, inputs, indices=indices, return_aux=True)
    assert aux.o_win[:, 45:].isnan().all() and aux.o_slc.isfinite().all()


def test_counts_leave_out_the_slots_behind_them() -> None:
    op = operator("three branches")
    inputs = inputs_of(op, 53)
    first = call_with_gradients(op, inputs)
    behind = torch.arange(first["indices"].shape[-1], device=DEVICE) >= first["counts"][..., None]
    garbage = torch.where(behind, 0, first["indices"])
    assert_equal_bits(
        {**call_with_gradients(op, inputs, indices=garbage, counts=first["counts"]), "indices": first["indices"]}, first
    )


def test_recomputing_follows_the_choice_too() -> None:
    op = operator("three branches")
    inputs = inputs_of(op, 53)
    indices = other_choice(op, inputs)
    expected = call_with_gradients(op, inputs, indices=indices)
    found = call_with_gradients(op, inputs, indices=indices, recompute=("cmp", "slc", "win"))
    assert_equal_bits(found, expected)


@every_spec
def test_nothing_is_chosen_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = operator(name)
    inputs = inputs_of(op, 53)
    indices = other_choice(op, inputs)

    def refuse(*_: object) -> None:
        raise AssertionError("blocks were chosen")

    monkeypatch.setattr(op.operator, "select_blocks", refuse)
    call(op, inputs, indices=indices)
    with pytest.raises(AssertionError, match="blocks were chosen"):
        call(op, inputs)


def test_the_given_lists_are_not_what_is_returned_nor_written_to() -> None:
    op = operator("three branches")
    # Packed, rows behind the last sequence get lists without blocks.
    inputs = inputs_of(op, (40, 30))
    _, first = call(op, inputs, return_aux=True)
    indices, counts = first.indices.clone(), first.counts.clone()
    arguments = {name: x for name, x in inputs.arguments().items() if x is not None}
    arguments["cu_seqlens"] = torch.tensor([0, 40, 60], dtype=torch.int32, device=DEVICE)
    _, aux = op.nsa_attention(**arguments, indices=indices, counts=counts, return_aux=True)
    assert torch.equal(indices, first.indices) and torch.equal(counts, first.counts)
    assert bool((aux.indices[60:] == -1).all()) and not bool(aux.counts[60:].any())


def test_compilers_see_one_operator() -> None:
    op = operator("three branches")
    inputs = inputs_of(op, 53)
    indices = other_choice(op, inputs)
    expected = call_with_gradients(op, inputs, indices=indices)["o"]
    arguments = {name: x for name, x in inputs.arguments().items() if x is not None}

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(indices: Tensor) -> Tensor:
        return op.nsa_attention(**arguments, indices=indices)

    assert torch.equal(compiled(indices), expected)


def test_wrong_lists_are_refused_by_name() -> None:
    op = operator("three branches")
    inputs = inputs_of(op, 20)
    indices = other_choice(op, inputs)
    counts = indices.new_zeros(indices.shape[:-1])
    for wrong, error in (
        ({"counts": counts}, "indices: expected a torch.Tensor, got None"),
        ({"indices": indices.long()}, "indices: expected dtype torch.int32"),
        ({"indices": indices[..., 1:]}, "indices: expected shape"),
        ({"indices": indices, "counts": counts[:, 1:]}, "counts: expected shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            call_with_gradients(op, inputs, **wrong)


def test_a_layer_shares_the_choice_of_another() -> None:
    op = operator_of(count=4, local=2, window=40, passes=("forward", "backward", "decode"))
    layer = op.NativeSparseAttention(32).to(DEVICE)
    hidden = torch.randn(1, 50, 32, device=DEVICE)
    choice = other_choice(op, inputs_of(op, 50))
    seen = []
    attention = op.module.module.nsa_attention

    def watch(*given: Any, **named: Any) -> Any:
        seen.append(named["indices"])
        return attention(*given, **named)

    op.module.module.nsa_attention = watch
    try:
        assert layer(hidden, indices=choice).shape == hidden.shape
        assert not torch.equal(layer(hidden, indices=choice), layer(hidden))
    finally:
        op.module.module.nsa_attention = attention
    assert seen[0] is choice and seen[2] is None
    cache = op.NSACache(1, 64, device=DEVICE)
    with pytest.raises(ValueError, match="indices: expected None with a cache"):
        layer(hidden, indices=choice, cache=cache)
