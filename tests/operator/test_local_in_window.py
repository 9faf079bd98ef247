"""The schedule in which the window's kernels do the selected branch's local blocks: the same operator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.lowering import lower
from nsa_gen.verification.inference import Scenario, Step, run_scenario
from tests.support import (
    DEVICE,
    Operator,
    assert_matches_oracle,
    call_with_gradients,
    inputs_of,
    operator_of,
    small_spec,
)

# Windows that end anywhere in a block; local blocks that are all that is selected, or one of many.
SPECS: dict[str, dict[str, Any]] = {
    "two of four": {"count": 4, "local": 2, "window": 40},
    "all that is selected": {"count": 2, "initial": 0, "local": 2, "window": 32},
    "heads in two parts": {"dims": (144, 16), "group": 3, "window": 23},
    "no gates": {"gate": "none", "window": 16, "compression": (16, 16)},
}
PREFILL = Scenario(2, 120, None, (Step("fill", (70, 9)), Step("prefill", (3, 3))))
every_spec = pytest.mark.parametrize("name", SPECS)


def operator(name: str) -> Operator:
    op = operator_of(**SPECS[name])
    assert lower(op.spec).local_in_window
    return op


def schedule(op: Operator, local: int, key_major: int = 1) -> Any:
    values = {"LOCAL_IN_WINDOW": local, "KEY_MAJOR_FORWARD": key_major, "KEY_MAJOR_DQ": key_major}
    return op.configs.override("selected_attention", **values)


@pytest.mark.parametrize("key_major", [0, 1], ids=["query-major", "key-major"])
@every_spec
def test_every_output_and_gradient_agrees_with_the_oracle(name: str, key_major: int) -> None:
    op = operator(name)
    with schedule(op, 1, key_major):
        assert_matches_oracle(op, 5, tokens_kv=69)
        assert_matches_oracle(op, (3, 0, 18))


@pytest.mark.parametrize("kind", ["hot", "nan"])
def test_hard_inputs_agree_with_the_oracle(kind: str) -> None:
    op = operator("two of four")
    for key_major in (0, 1):
        with schedule(op, 1, key_major):
            assert_matches_oracle(op, 6, tokens_kv=70, kind=kind, gradients=kind != "nan")


def test_the_window_leaves_the_part_of_the_local_blocks_and_the_selected_branch_does_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op = operator("two of four")
    inputs = inputs_of(op, 3, tokens_kv=70)
    parts: list[Any] = []
    original = op.module.operator.window_forward

    def window_forward(*args: Any) -> Any:
        parts.append(args[-1])
        return original(*args)

    monkeypatch.setattr(op.module.operator, "window_forward", window_forward)
    found = {}
    for local in (0, 1):
        with schedule(op, local):
            found[local] = call_with_gradients(op, inputs)
    without, part = parts
    assert without is None and part.o.shape == found[1]["o"].shape
    # Of three tokens at 67 to 69, keys 48 on are local: less than what they select, more than nothing.
    lse = (part.row_max + part.row_sum.log2()) * math.log(2.0)
    assert lse.isfinite().all() and (lse < found[1]["lse_slc"]).all()
    for quantity, value in found[0].items():
        torch.testing.assert_close(found[1][quantity], value, rtol=2e-5, atol=2e-6, msg=quantity)


@pytest.mark.parametrize("recompute", [("slc",), ("win",), ("slc", "win")], ids=str)
def test_branches_computed_anew_give_the_same_bits(recompute: tuple[str, ...]) -> None:
    op = operator("all that is selected")
    inputs = inputs_of(op, 3, tokens_kv=37)

    def gradients(**more: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs.differentiable().values()]
        return list(torch.autograd.grad(op.nsa_attention(*leaves, **more), leaves, inputs.do))

    with schedule(op, 1):
        expected, found = gradients(), gradients(recompute=recompute)
    assert all(map(torch.equal, expected, found))


def test_a_backward_follows_its_own_forward_whatever_the_schedule_has_become() -> None:
    op = operator("two of four")
    inputs = inputs_of(op, 4, tokens_kv=70)
    with schedule(op, 1):
        expected = call_with_gradients(op, inputs)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
    with schedule(op, 1):
        o = op.nsa_attention(*leaves.values())
    with schedule(op, 0):
        found = torch.autograd.grad(o, list(leaves.values()), inputs.do)
    assert all(torch.equal(x, expected[f"d{name}"]) for name, x in zip(leaves, found, strict=True))


def test_prefill_of_a_cache_agrees_with_the_oracle() -> None:
    op = operator_of(count=4, local=2, window=40, passes=("forward", "decode"))
    for key_major in (0, 1):
        values = {"LOCAL_IN_WINDOW": 1, "KEY_MAJOR_FORWARD": key_major}
        with op.configs.override("selected_attention", **values):
            rows = run_scenario(op.spec, op.module, PREFILL, DEVICE.type)
        assert rows and all(row.ok for row in rows), [row for row in rows if not row.ok]


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 15},
        {"local": 0, "initial": 0},
        {"indices": "input", "window": 64},
        {"kv": "per_branch", "window": 64},
        {"branches": "cmp slc"},
    ],
    ids=str,
)
def test_it_is_offered_only_where_the_window_has_every_local_block(changes: dict[str, Any]) -> None:
    program = lower(small_spec(**changes))
    assert not program.local_in_window
    assert all("LOCAL_IN_WINDOW" not in decision.choices for decision in program.decisions)
