"""Selection and window under one softmax: each token attends to the union of their keys, a key counts once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_gen.lowering import lower
from nsa_gen.rendering import render
from nsa_gen.verification.calls import call_package
from nsa_gen.verification.cases import Case
from nsa_gen.verification.examples import Example, run_example
from nsa_gen.verification.inference import Scenario, Step, run_scenario
from nsa_gen.verification.reference.oracle import reference_attention
from nsa_gen.verification.relations import padded
from tests.support import (
    DEVICE,
    Operator,
    assert_a_step_is_the_operator,
    assert_matches_oracle,
    call,
    call_with_gradients,
    inputs_of,
    operator_of,
    operator_of_spec,
    small_spec,
    uniform_keys,
)

SPECS: dict[str, dict[str, Any]] = {
    "every branch": {"branches": "cmp slc win", "window": 20, "sink_joint": "learned"},
    "without a sink": {"branches": "cmp slc win", "gate": "none", "window": 7, "initial": 0, "local": 0},
    "alone": {"branches": "slc win", "indices": "input", "gate": "none", "kv_heads": 2, "sink_joint": "learned"},
    "half precision": {
        "branches": "slc win", "scores": "mean", "dtype": "float16", "group": 3, "gate": "given",
        "sink_joint": "learned",
    },
    "each head its blocks": {"branches": "slc win", "scores": "mean", "scope": "head", "window": 18, "dims": (24, 40)},
    "compressed keys choose alone": {
        "branches": "cmp slc win", "output": False, "pool": "max", "gate": "none", "kv_heads": 2,
        "sink_joint": "learned",
    },
    "half precision and compression": {"branches": "cmp slc win", "dtype": "float16", "kv_heads": 2, "scope": "all"},
}  # fmt: skip
every_spec = pytest.mark.parametrize("name", SPECS)
both_schedules = pytest.mark.parametrize("key_major", [0, 1])


def operator(name: str, **more: Any) -> Operator:
    changes = {**SPECS[name], **more}
    return operator_of(changes.pop("branches"), joint=True, **changes)


def schedule(op: Operator, key_major: int) -> Any:
    """Run selected attention block by block or token by token."""
    return op.configs.override("selected_attention", KEY_MAJOR_FORWARD=key_major, KEY_MAJOR_DQ=key_major)


def assert_equal_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name, x in first.items() if not torch.equal(x, second[name])]


@every_spec
def test_outputs_and_gradients_agree_with_the_oracle(name: str) -> None:
    op = operator(name)
    found = assert_matches_oracle(op, 5, tokens_kv=67)
    assert {"lse_joint", "dq", "dk", "dv"} <= found.keys()
    assert ("dsink" in found) == ("sink_joint" in SPECS[name]) and not any("slc" in each for each in found)
    assert_matches_oracle(op, (9, 0, 1, 33))


@pytest.mark.parametrize("name", ["every branch", "each head its blocks"])
def test_either_schedule_of_selection_agrees_with_the_oracle(name: str) -> None:
    op = operator(name)
    with schedule(op, 0):
        assert_matches_oracle(op, 5, tokens_kv=67, batch=2)
        assert_matches_oracle(op, (1, 33))


@pytest.mark.parametrize("kind", ["spread", "hot", "rising", "falling"])
def test_hard_inputs_agree_with_the_oracle(kind: str) -> None:
    assert_matches_oracle(operator("alone"), 3, tokens_kv=67, kind=kind)


@both_schedules
@pytest.mark.parametrize("window", [1, 16, 18])
def test_a_key_of_both_branches_counts_once(window: int, key_major: int) -> None:
    """With equal logits exp(lse) is the number of keys, and o the mean of their numbers."""
    op = operator("alone", window=window, count=5, sink_joint="none")
    q, k, v = uniform_keys(op, 69)
    blocks = torch.arange(5, dtype=torch.int32, device=DEVICE)
    chosen = torch.stack([torch.where(blocks % 2 == 0, blocks, -1), torch.where(blocks != 2, blocks, -1)])
    with schedule(op, key_major):
        o, aux = op.nsa_attention(q, k, v, indices=chosen.expand(1, 69, 2, 5).contiguous(), return_aux=True)
    for t in range(69):
        for head, listed in enumerate(([0, 2, 4], [0, 1, 3, 4])):
            seen = {i for i in range(t + 1) if i // 16 in listed} | set(range(max(0, t - window + 1), t + 1))
            rows = slice(head * 2, head * 2 + 2)
            number = torch.full((2,), float(len(seen)), device=DEVICE)
            torch.testing.assert_close(aux.lse_joint[0, t, rows].exp(), number, rtol=1e-5, atol=0.0)
            mean = torch.full((2, 16), sum(seen) / len(seen), device=DEVICE)
            torch.testing.assert_close(o[0, t, rows], mean)


def test_a_window_that_holds_every_key_leaves_nothing_to_selection() -> None:
    op, window = operator("alone", window=64, sink_joint="none"), operator_of("win", gate="none", kv_heads=2, window=64)
    inputs = inputs_of(op, 23)
    with schedule(op, 0):
        found = call_with_gradients(op, inputs)
    alone = call_with_gradients(window, replace(inputs, indices=None))
    for name in ("o", "dq", "dk", "dv"):
        torch.testing.assert_close(found[name], alone[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["lse_joint"], alone["lse_win"], rtol=1e-5, atol=1e-6)


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    op, plain = operator("alone"), operator("alone", sink_joint="none")
    inputs = inputs_of(op, 5, tokens_kv=38)
    inputs = replace(inputs, sink=torch.full_like(inputs.sink, -math.inf))
    found = call_with_gradients(op, inputs)
    assert not found.pop("dsink").any()
    assert_equal_bits(found, call_with_gradients(plain, replace(inputs, sink=None)))


def test_autograd_checks_the_gradient_of_the_oracle() -> None:
    op = operator("alone", kv_heads=1)
    inputs = inputs_of(op, 3, tokens_kv=19).to(torch.float64)

    def o(q: torch.Tensor, k: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        given = replace(inputs, q=q, k=k, sink=sink)
        return reference_attention(op.parameters, **given.arguments()).o

    leaves = tuple(x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.sink))
    assert torch.autograd.gradcheck(o, leaves)


@pytest.mark.parametrize("name", ["every branch", "alone"])
def test_what_is_recomputed_has_the_same_bits(name: str) -> None:
    op = operator(name)
    inputs = inputs_of(op, (9, 0, 12))
    found = [call_package(op.module, inputs, True, recompute=each).tensors() for each in ((), ("joint",), ("joint",))]
    assert_equal_bits(found[0], found[1])
    assert_equal_bits(found[1], found[2])


def test_rows_behind_the_last_sequence_are_zero_and_have_no_part_in_a_gradient() -> None:
    op = operator("every branch")
    inputs = inputs_of(op, (17, 0, 5))
    plain = call_package(op.module, inputs, True).tensors()
    found = call_package(op.module, padded(op.parameters, inputs, 9), True).tensors()
    assert torch.equal(found["dsink"], plain["dsink"])
    assert not found["o"][22:].any() and (found["lse_joint"][22:] == -math.inf).all()
    for name in ("dq", "dk", "dv", "dgates"):
        assert torch.equal(found[name][:22], plain[name]) and not found[name][22:].any(), name


@pytest.mark.parametrize("tokens", [19, (9, 0, 12)])
def test_joint_attention_alone_is_the_operators(tokens: Any) -> None:
    op = operator("alone")
    inputs = inputs_of(op, tokens)
    assert_a_step_is_the_operator(op.joint_attention, op, inputs, "joint", "sink", indices=inputs.indices)


def test_a_choice_made_before_is_followed() -> None:
    op = operator("every branch")
    inputs = inputs_of(op, 37)
    o, aux = call(op, inputs, return_aux=True)
    again = call(op, replace(inputs, indices=aux.indices, counts=aux.counts))
    assert torch.equal(o, again)


@pytest.mark.parametrize("sink", [None, torch.zeros(2), torch.zeros(4, dtype=torch.float64)], ids=str)
def test_a_sink_that_is_wrong_is_refused_by_name(sink: Any) -> None:
    op = operator("alone")
    inputs = inputs_of(op, 3)
    with pytest.raises((TypeError, ValueError), match=r"^sink: expected"):
        op.nsa_attention(inputs.q, inputs.k, inputs.v, indices=inputs.indices, sink=sink)


STEPS = (
    Step("prefill", (5, 0)),
    Step("fill", (60, 41)),
    Step("decode", (1, 1)),
    Step("prefill", (3, 2)),
    Step("decode", (2, 1)),
)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("name", ["every branch", "without a sink", "alone", "each head its blocks"])
def test_prefill_and_decode_have_one_softmax(name: str, page_size: int | None) -> None:
    op = operator(name, passes=("forward", "decode"))
    rows = run_scenario(op.spec, op.module, Scenario(2, 140, page_size, STEPS), DEVICE.type)
    assert {"o", "lse_joint"} <= {row.quantity for row in rows}
    failures = [f"{row.case}: {row.quantity}: {row.problem or (row.error, row.bound)}" for row in rows if not row.ok]
    assert not failures, "\n".join(failures[:8])


@pytest.mark.parametrize(
    ("property", "case", "name"),
    [
        ("future", Case(13, twice=False, batch=1), "alone"),
        ("packed", Case((9, 0, 12), twice=False, batch=1), "half precision"),
        ("padded", Case((9, 0, 12), twice=False, batch=1), "alone"),
        ("chunks", Case(13, twice=False, batch=1), "alone"),
        ("batch", Case(11, twice=False, batch=2), "half precision"),
        ("neighbours", Case(11, twice=False, batch=2), "alone"),
        ("doubled", Case(11, twice=False, batch=1), "half precision"),
        ("guards", Case((9, 0, 12), twice=False, batch=1), "alone"),
    ],
)
def test_an_operator_with_joint_branches_has_the_properties_of_any(property: str, case: Case, name: str) -> None:
    op = operator(name)
    example = Example(property, case, seed=3)
    assert example.applies(op.parameters, "cpu")
    result = run_example(op.spec, op.module, example, DEVICE.type, lambda spec: operator_of_spec(spec).module)
    assert result.ok, [(row.quantity, row.error, row.bound, row.problem) for row in result.rows if not row.ok]


def test_operators_with_joint_branches_keep_pytorchs_rules() -> None:
    op = operator("alone")
    inputs = inputs_of(op, 12)
    leaves = [getattr(inputs, name).detach().requires_grad_() for name in ("q", "k", "v", "sink")]
    every = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    behind = {"attention": (64, ""), "joint_attention": (64,)}
    for name, more in behind.items():
        arguments = (*leaves, inputs.indices, None, None, *more)
        checked = torch.library.opcheck(op.registration.operator(name), arguments, test_utils=every)
        assert set(checked.values()) == {"SUCCESS"}


def test_the_layer_learns_the_sink_and_has_one_gate_for_both_branches() -> None:
    op = operator("every branch", passes=("forward", "backward", "decode"))
    torch.manual_seed(1)
    layer = op.NativeSparseAttention(24, device=DEVICE)
    hidden = torch.randn(1, 17, 24, device=DEVICE)
    out = layer(hidden)
    out.square().sum().backward()
    assert layer.sink.grad is not None and layer.sink.grad.abs().min() > 0
    cache = op.NSACache(1, 20, max_new_tokens=2, device=DEVICE)
    parts = []
    with torch.no_grad():
        for part in (hidden[:, :15], hidden[:, 15:]):
            cache.extend(part.shape[1])
            parts.append(layer(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), out, rtol=1e-4, atol=1e-5)


def test_a_plan_with_joint_branches_has_one_attend_step_for_both() -> None:
    program = lower(small_spec(joint=True, sink_joint="learned"))
    assert program.branches == ("cmp", "joint") and program.sinks == ("sink",)
    assert program.joint is program.selected is program.windowed
    assert not program.local_in_window and not program.decode_shares
    text = render(small_spec(joint=True))["operator.py"]
    assert "o_slc" not in text and "o_win" not in text and "cmp, joint" in text


def test_hoppers_kernels_of_selected_blocks_do_not_leave_the_window_out() -> None:
    wide = {"dims": (64, 64), "dtype": "float16", "block": 64, "group": 16, "gate": "none"}
    apart, joint = (lower(small_spec(joint=joint, **wide)) for joint in (False, True))
    assert apart.hopper_selected_forward and apart.hopper_selected_backward
    assert not joint.hopper_selected_forward and not joint.hopper_selected_backward
    assert joint.hopper and joint.hopper_banded_backward


@pytest.mark.parametrize("name", ["every branch", "alone"])
def test_no_tokens_give_empty_outputs_and_a_sink_without_a_gradient(name: str) -> None:
    op = operator(name)
    found = call_with_gradients(op, inputs_of(op, 0))
    assert found["o"].numel() == found["dq"].numel() == 0 and not found["dsink"].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of rows out of range
def test_a_large_sink_takes_all_the_weight() -> None:
    op = operator("alone")
    inputs = inputs_of(op, 3, tokens_kv=38)
    found = call_with_gradients(op, replace(inputs, sink=torch.full_like(inputs.sink, 1e4)))
    assert not any(found[name].any() for name in ("o", "dq", "dk", "dv", "dsink"))
    lse = found["lse_joint"]
    torch.testing.assert_close(lse, torch.full_like(lse, 1e4), rtol=4 * 2.0**-24, atol=0)
