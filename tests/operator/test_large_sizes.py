"""Blocks of up to 1024 tokens, and up to 1024 of them a query: more keys, slots and parts than a tile holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

from nsa_gen.lowering import lower
from nsa_gen.lowering.space import legal_space
from nsa_gen.spec import RANGES, SpecError, parse_spec
from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.inference import Scenario, Step, run_scenario
from nsa_gen.verification.schedules import Variation
from tests.support import DEVICE, assert_matches_oracle, inputs_of, operator_of, set_constants, small_spec

#: The one best block, whichever it is.
ONE = {"count": 1, "initial": 0, "local": 0}
#: Specs by name, and how many keys the last two queries of a call see: more blocks than they select.
LARGE: dict[str, tuple[dict[str, Any], int]] = {
    "66 blocks by their mean keys": ({"branches": "slc", "scores": "mean", "count": 66}, 68 * 16 + 3),
    "blocks of 1024 by compressed keys": (
        {"branches": "cmp slc", "block": 1024, "compression": (32, 16), **ONE},
        2 * 1024 + 5,
    ),
    "blocks of 1024 by their largest probability": (
        {"branches": "cmp slc", "block": 1024, "compression": (64, 32), "pool": "max", "output": False, **ONE},
        2 * 1024 + 5,
    ),
}


def failures(changes: dict[str, Any], queries: int, keys: int, key_major: int, gradients: bool) -> list[str]:
    op = operator_of(**{"gate": "none", "group": 1, **changes})
    names = ("KEY_MAJOR_FORWARD", "KEY_MAJOR_DQ")
    values = tuple(("selected_attention", name, key_major) for name in names)
    case = Case(queries, keys, twice=False, variation=Variation(0, values, ()))
    inputs = inputs_of(op, queries, tokens_kv=keys, seed=3)
    rows = check_case(op.module, op.parameters, case, inputs, with_gradients=gradients)
    assert rows
    return [f"{row.quantity}: {row.problem or (row.error, row.bound)}" for row in rows if not row.ok]


@pytest.mark.parametrize("key_major", [0, 1], ids=["query-major", "key-major"])
@pytest.mark.parametrize("name", LARGE)
def test_outputs_gradients_and_choices_are_the_oracles(name: str, key_major: int) -> None:
    changes, keys = LARGE[name]
    assert failures(changes, 2, keys, key_major, gradients=key_major == 1) == []


@pytest.mark.parametrize("key_major", [0, 1], ids=["query-major", "key-major"])
def test_a_query_attends_to_hundreds_of_blocks(key_major: int) -> None:
    """More slots of a token than a program numbers, and more parts of a row than are looked at together."""
    changes = {"branches": "slc", "indices": "input", "count": 520, "kv_heads": 2}
    assert failures(changes, 1, 519 * 16 + 3, key_major, gradients=False) == []


@pytest.mark.parametrize("name", LARGE)
def test_decode_is_one_forward(name: str) -> None:
    changes, keys = LARGE[name]
    op = operator_of(**{"gate": "none", "group": 1, **changes, "passes": ("forward", "decode")})
    steps = (Step("fill", (keys - 2,)), Step("decode", (2,)))
    rows = run_scenario(op.spec, op.module, Scenario(1, keys + 16, None, steps, seed=4), DEVICE.type)
    assert rows and [f"{row.quantity}: {row.problem or (row.error, row.bound)}" for row in rows if not row.ok] == []


@pytest.mark.parametrize("local", [False, True], ids=["", "local blocks in the window"])
def test_slots_and_parts_that_take_several_tiles_are_the_oracles(local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    op = operator_of(group=3, kv_heads=2, count=4, local=2, window=40, block=32, compression=(8, 4))
    for module, name in (("inverted_index", "SLOT_TILE"), ("selected_key_major_forward", "MOST_PARTS")):
        set_constants(monkeypatch, op, module, **{name: 2})
    values = (("selected_attention", "KEY_MAJOR_FORWARD", 1), ("selected_attention", "LOCAL_IN_WINDOW", int(local)))
    case = Case(4, 6 * 32 + 7, twice=False, variation=Variation(0, values, ()))
    rows = check_case(op.module, op.parameters, case, inputs_of(op, 4, tokens_kv=6 * 32 + 7), with_gradients=True)
    assert rows and [row for row in rows if not row.ok] == []


def test_keys_of_a_block_whose_gradients_are_merged_in_several_tiles_are_the_oracles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lists that several pieces share: every query chooses the first block."""
    op = operator_of("slc", gate="none", indices="input", count=2)
    for module in ("selected_key_major_merge", "selected_key_major_backward"):
        set_constants(monkeypatch, op, module, KEY_TILE=tl.constexpr(8))
    assert_matches_oracle(op, 40, kind="hot", seed=7)


@pytest.mark.parametrize("field", ["selection.block", "selection.count"])
def test_the_language_has_1024(field: str) -> None:
    assert RANGES[field].maximum == 1024


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "changes", [{"block": 1024, "count": 1024}, {"block": 16, "count": 1024}, {"block": 1024, "count": 2}], ids=str
)
def test_every_kernel_has_legal_tiles_within_shared_memory(changes: dict[str, int], dtype: str) -> None:
    compression = (16, 16) if changes["block"] == 16 else (32, 16)
    spec = small_spec(
        group=4, kv_heads=2, dims=(128, 128), dtype=dtype, compression=compression, window=512,
        passes=("forward", "backward", "decode"), **changes,
    )  # fmt: skip
    plan = lower(spec)
    space = legal_space(plan)
    for target, table in plan.defaults.items():
        for kernel in plan.kernels:
            values = table[kernel.name].mapping()
            assert all(value in space[kernel.name].values[name] for name, value in values.items()), (
                target,
                kernel.name,
            )
            assert plan.sizes and values.get("KEY_BLOCK", 1) <= 256


def test_a_block_of_more_compressed_keys_than_a_tile_is_refused_by_name() -> None:
    text = small_spec("cmp slc", gate="none").resolved_yaml().replace("block: 16", "block: 1024")
    with pytest.raises(SpecError, match=r"selection.block \(1024\) must be at most 256 times compression.stride \(2\)"):
        parse_spec(text.replace("stride: 4", "stride: 2"))
    assert parse_spec(text).selection.block == 1024


@pytest.mark.parametrize("count", [67, 512, 1023])
def test_many_slots_are_filled_a_tile_at_a_time(count: int) -> None:
    """Counts that are no multiple of a tile: every slot beyond the blocks that exist is -1."""
    op = operator_of("slc", gate="none", scores="mean", count=count, initial=1, local=2)
    q, k = torch.randn(1, 40, 2, 16, device=DEVICE), torch.randn(1, 40, 1, 16, device=DEVICE)
    indices, counts = op.select_blocks(q, k)
    own = torch.arange(40, device=DEVICE) // 16
    slots = torch.arange(count, device=DEVICE)
    assert torch.equal(indices[0, :, 0], torch.where(slots <= own[:, None], slots, -1).int())
    assert torch.equal(counts[0, :, 0], (own + 1).int())
