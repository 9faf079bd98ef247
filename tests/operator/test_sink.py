"""Sinks of the window and of selection: a logit per query head in the softmax's denominator, without a value."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.bench.decode import decode_inputs
from nsa_gen.lowering import lower
from nsa_gen.lowering.parts import HOPPER_ROWS
from nsa_gen.rendering import render
from nsa_gen.tuning.space import Bucket
from nsa_gen.tuning.timed import bucket_inputs
from nsa_gen.verification import Inputs
from nsa_gen.verification.calls import call_package
from nsa_gen.verification.cases import Case
from nsa_gen.verification.examples import Example, run_example
from nsa_gen.verification.inference import Scenario, Step, run_scenario
from nsa_gen.verification.reference.dense import attend
from nsa_gen.verification.reference.oracle import SINKS, reference_attention
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
)

SPECS: dict[str, dict[str, Any]] = {
    "window alone": {"branches": "win", "gate": "none", "kv_heads": 2},
    "window alone, gated": {"branches": "win", "gate": "given", "group": 3},
    "every branch": {"window": 20},
    "keys of each branch": {"kv": "per_branch", "gate": "none", "dims": (24, 40)},
    "no local blocks": {"branches": "slc win", "indices": "input", "window": 7},
    "half precision": {"dtype": "float16", "group": 3},
    "selection alone": {"branches": "slc", "indices": "input", "gate": "none", "kv_heads": 2, "sinks": ("slc",)},
    "both sinks": {"window": 20, "sinks": ("slc", "win")},
    "each head its blocks": {
        "branches": "slc win", "scores": "mean", "scope": "head", "dtype": "float16", "sinks": ("slc",)
    },
}  # fmt: skip
PROPERTIES_OF = (("window alone, gated", "float32"), ("window alone, gated", "float16"), ("selection alone", "float32"))
every_spec = pytest.mark.parametrize("name", SPECS)


def sinks_of(name: str) -> list[str]:
    """Names of the arguments that are sinks in a spec of `SPECS`."""
    return [f"sink_{branch}" for branch in SPECS[name].get("sinks", ("win",))]


def operator(name: str, *, sunk: bool = True, **more: Any) -> Operator:
    """The package of a spec of `SPECS`; without its sinks, if it is not to be `sunk`."""
    changes = {**SPECS[name], **more}
    fields = {"slc": "sink_slc", "win": "sink"}
    learned = {fields[branch]: "learned" for branch in changes.pop("sinks", ("win",)) if sunk}
    return operator_of(changes.pop("branches", "cmp slc win"), **learned, **changes)


def schedules(op: Operator, key_major: int) -> Any:
    """Run selected attention block by block or token by token, where the package has it."""
    if lower(op.spec).selected is None:
        return contextlib.nullcontext()
    return op.configs.override("selected_attention", KEY_MAJOR_FORWARD=key_major, KEY_MAJOR_DQ=key_major)


def with_sink(inputs: Inputs, *sinks: float) -> Inputs:
    """The same inputs with these sinks of each branch that has one, the last of them for the heads that are left."""
    heads = inputs.q.shape[-2]
    values = [*sinks, *sinks[-1:] * heads][:heads]
    sink = torch.tensor(values, dtype=torch.float32, device=DEVICE)
    return replace(inputs, **{name: sink for name in SINKS if getattr(inputs, name) is not None})


def without_sinks(inputs: Inputs) -> Inputs:
    return replace(inputs, **dict.fromkeys(SINKS))


def assert_equal_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    differing = [name for name, x in first.items() if not torch.equal(x, second[name])]
    assert not differing


@every_spec
def test_outputs_and_gradients_agree_with_the_oracle(name: str) -> None:
    op = operator(name)
    assert {f"d{sink}" for sink in sinks_of(name)} <= assert_matches_oracle(op, 21).keys()
    assert_matches_oracle(op, 3, tokens_kv=38, batch=2)
    assert_matches_oracle(op, (9, 0, 1, 17))


@pytest.mark.parametrize("name", ["selection alone", "each head its blocks"])
@pytest.mark.parametrize("key_major", [0, 1])
def test_either_schedule_of_selection_has_the_sink_once(name: str, key_major: int) -> None:
    op = operator(name)
    with schedules(op, key_major):
        assert_matches_oracle(op, 5, tokens_kv=67)
        assert_matches_oracle(op, (9, 0, 17))


@pytest.mark.parametrize("key_major", [0, 1])
def test_a_token_without_a_selected_block_has_its_sink_for_its_lse(key_major: int) -> None:
    op = operator("selection alone")
    inputs = inputs_of(op, 5)
    inputs = replace(inputs, indices=torch.full_like(inputs.indices, -1))
    with schedules(op, key_major):
        found = call_with_gradients(op, inputs)
    sink = inputs.sink_slc
    torch.testing.assert_close(found["lse_slc"], sink.expand_as(found["lse_slc"]), rtol=4 * 2.0**-24, atol=2.0**-24)
    assert not any(found[name].any() for name in ("o", "dq", "dk", "dv", "dsink_slc"))


@pytest.mark.parametrize("kind", ["strided", "spread", "hot", "rising", "falling", "late"])
def test_hard_inputs_agree_with_the_oracle(kind: str) -> None:
    assert_matches_oracle(operator("window alone"), 19, kind=kind)


@pytest.mark.parametrize("tokens", [0, 1, 9, 10, 11, 16, 17])
def test_any_length_agrees_with_the_oracle(tokens: int) -> None:
    if tokens:
        assert_matches_oracle(operator("window alone, gated"), tokens, batch=2)
    else:
        found = call_with_gradients(operator("window alone, gated"), inputs_of(operator("window alone, gated"), 0))
        assert found["o"].numel() == 0 and torch.equal(found["dsink_win"], torch.zeros(3, device=DEVICE))


@every_spec
def test_a_sink_of_minus_infinity_is_no_sink_to_the_last_bit(name: str) -> None:
    op, plain = operator(name), operator(name, sunk=False)
    inputs = with_sink(inputs_of(op, 5, tokens_kv=38), -math.inf)
    for key_major in (0, 1):
        with schedules(op, key_major), schedules(plain, key_major):
            found = call_with_gradients(op, inputs)
            for sink in sinks_of(name):
                assert torch.equal(found.pop(f"d{sink}"), torch.zeros_like(getattr(inputs, sink)))
            assert_equal_bits(found, call_with_gradients(plain, without_sinks(inputs)))
        if "slc" not in SPECS[name].get("sinks", ()):
            break


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of rows out of range
@pytest.mark.parametrize("sink", [200.0, 1e4, 1e30])
@pytest.mark.parametrize("name", ["window alone", "selection alone"])
@pytest.mark.parametrize("key_major", [0, 1])
def test_a_large_sink_takes_all_the_weight(name: str, sink: float, key_major: int) -> None:
    op, branch = operator(name), "slc" if name == "selection alone" else "win"
    with schedules(op, key_major):
        found = call_with_gradients(op, with_sink(inputs_of(op, 19), sink))
    assert not any(found[name].any() for name in ("o", "dq", "dk", "dv", f"dsink_{branch}"))
    lse = found[f"lse_{branch}"]
    torch.testing.assert_close(lse, torch.full_like(lse, sink), rtol=4 * 2.0**-24, atol=0)


def test_a_sink_of_nan_reaches_the_outputs_of_its_head_alone() -> None:
    op = operator("every branch", group=2, kv_heads=2)
    inputs = inputs_of(op, 19)
    found = call(op, with_sink(inputs, 0.5, 0.25, math.nan, 0.125), return_aux=True)
    other = call(op, with_sink(inputs, 0.5, 0.25, 0.0, 0.125), return_aux=True)
    for x, y in ((found[0], other[0]), *zip(found[1], other[1], strict=True)):
        if x is found[0] or x is found[1].o_win or x is found[1].lse_win:
            assert torch.isnan(x[:, :, 2]).all()
            x, y = x[:, :, [0, 1, 3]], y[:, :, [0, 1, 3]]
        assert torch.equal(x, y)


def test_the_gradient_is_the_slope_of_the_output() -> None:
    """Central differences of steps h err by h^2 / 6 times the third derivative, and by a rounding of the sum over h."""
    op = operator("window alone, gated")
    inputs = inputs_of(op, 18)
    gradient = call_with_gradients(op, inputs)["dsink_win"]
    step = 0.05
    for head in range(3):
        sums = []
        for sign in (1, -1):
            moved = inputs.sink_win.clone()
            moved[head] += sign * step
            sums.append((call(op, replace(inputs, sink_win=moved)).double() * inputs.do.double()).sum().item())
        slope = (sums[0] - sums[1]) / (2 * step)
        scale = (inputs.do.abs() * call(op, inputs).abs())[:, :, head].sum().item()
        assert abs(gradient[head].item() - slope) <= scale * (step**2 / 6 + 8 * 2.0**-24 / step)


def test_autograd_checks_the_gradient_of_the_oracle() -> None:
    op = operator("window alone, gated")
    inputs = inputs_of(op, 6).to(torch.float64)

    def o(sink: Tensor) -> Tensor:
        return reference_attention(op.parameters, **replace(inputs, sink_win=sink).arguments()).o

    assert inputs.sink_win is not None and inputs.sink_win.dtype == torch.float64
    assert torch.autograd.gradcheck(o, inputs.sink_win.requires_grad_())


def test_a_row_of_the_oracle_that_sees_nothing_has_the_sink_for_its_lse() -> None:
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 5, 5))
    visible = torch.tensor([[[True] * 5, [False] * 5, [True] + [False] * 4]])
    sink = torch.tensor([[0.75, -math.inf]], dtype=torch.float64)
    o, lse, p = attend(q, k[:, 0], v[:, 0], visible, 0.5, sink=sink)
    assert not o[0, :, 1].any() and not p[0, :, 1].any()
    assert lse[0, 0, 1] == 0.75 and lse[0, 1, 1] == -math.inf
    kept = torch.exp(sink[..., None] - lse).nan_to_num(0.0)
    torch.testing.assert_close(p.sum(-1) + kept, torch.tensor([[[1.0, 1, 1], [1, 0, 1]]], dtype=torch.float64))


@pytest.mark.parametrize("name", ["every branch", "both sinks"])
def test_rows_behind_the_last_sequence_have_no_sink_and_no_part_in_its_gradient(name: str) -> None:
    op = operator(name)
    inputs = inputs_of(op, (17, 0, 5))
    plain = call_package(op.module, inputs, True).tensors()
    found = call_package(op.module, padded(op.parameters, inputs, 37), True).tensors()
    for sink in sinks_of(name):
        assert torch.isfinite(found[f"d{sink}"]).all() and torch.equal(found[f"d{sink}"], plain[f"d{sink}"])
        behind = found[sink.replace("sink", "lse")][22:]
        assert torch.equal(behind, torch.full_like(behind, -math.inf))
    assert not found["o"][22:].any()


@pytest.mark.parametrize("tokens", [23, (17, 0, 5)])
def test_two_equal_calls_have_equal_bits(tokens: Any) -> None:
    op = operator("both sinks")
    inputs = inputs_of(op, tokens)
    assert_equal_bits(*(call_package(op.module, inputs, True).tensors() for _ in range(2)))


@every_spec
def test_what_is_recomputed_has_the_same_bits(name: str) -> None:
    op = operator(name)
    inputs = inputs_of(op, 5, tokens_kv=38)
    again = tuple(sink.removeprefix("sink_") for sink in sinks_of(name))
    first, second = (call_package(op.module, inputs, True, recompute=each).tensors() for each in ((), again))
    assert_equal_bits(first, second)


@pytest.mark.parametrize("local", [0, 1])
def test_the_selected_branch_does_not_notice_the_sink(local: int) -> None:
    op, plain = (operator("every branch", count=4, local=2, window=40, sunk=sunk) for sunk in (True, False))
    assert lower(op.spec).local_in_window
    inputs = inputs_of(op, 5, tokens_kv=67)
    found = []
    for each, given in ((op, inputs), (plain, without_sinks(inputs))):
        with each.configs.override("selected_attention", LOCAL_IN_WINDOW=local):
            found.append(call(each, given, return_aux=True)[1])
    assert torch.equal(found[0].o_slc, found[1].o_slc) and torch.equal(found[0].lse_slc, found[1].lse_slc)
    assert not torch.equal(found[0].o_win, found[1].o_win)
    with op.configs.override("selected_attention", LOCAL_IN_WINDOW=local):
        assert_matches_oracle(op, 5, tokens_kv=67)


@pytest.mark.parametrize("tokens", [19, (9, 0, 12)])
def test_the_window_alone_takes_the_sink_too(tokens: Any) -> None:
    op = operator("window alone")
    inputs = inputs_of(op, tokens)
    assert_a_step_is_the_operator(op.window_attention, op, inputs, "win", "sink_win")


@pytest.mark.parametrize("tokens", [19, (9, 0, 12)])
def test_selected_attention_alone_takes_the_sink_too(tokens: Any) -> None:
    op = operator("selection alone")
    inputs = inputs_of(op, tokens)
    assert_a_step_is_the_operator(op.selected_attention, op, inputs, "slc", "sink_slc", indices=inputs.indices)


@pytest.mark.parametrize("key_major", [0, 1])
@pytest.mark.parametrize("local", [0, 1])
def test_local_blocks_that_the_window_does_have_no_sink_of_their_own(key_major: int, local: int) -> None:
    op = operator("both sinks", count=4, local=2, window=40)
    assert lower(op.spec).local_in_window
    with schedules(op, key_major), op.configs.override("selected_attention", LOCAL_IN_WINDOW=local):
        assert_matches_oracle(op, 5, tokens_kv=67)


@pytest.mark.parametrize(
    ("sink", "error", "message"),
    [
        (None, TypeError, r"sink_win: expected a torch.Tensor of shape \(Hq=4"),
        (torch.zeros(4, dtype=torch.float64), TypeError, "sink_win: expected dtype torch.float32"),
        (torch.zeros(2), ValueError, "sink_win: expected shape"),
        (torch.zeros(1, 4), ValueError, "sink_win: expected shape"),
    ],
)
def test_a_sink_that_is_wrong_is_refused_by_name(sink: Tensor | None, error: type[Exception], message: str) -> None:
    op = operator("window alone")
    inputs = inputs_of(op, 3)
    q, k, v = (getattr(inputs, name) for name in ("q", "k", "v"))
    sink = sink if sink is None else sink.to(DEVICE)
    for _ in range(2):  # before and after such a call has passed the other checks
        with pytest.raises(error, match=message):
            op.nsa_attention(q, k, v, sink_win=sink)
        with pytest.raises(error, match=message):
            op.window_attention(q, k, v, sink_win=sink)
        op.nsa_attention(q, k, v, sink_win=inputs.sink_win)


def test_a_package_without_a_sink_knows_no_such_argument() -> None:
    plain = operator("window alone", sunk=False)
    inputs = inputs_of(plain, 3)
    with pytest.raises(TypeError, match="sink_win"):
        plain.nsa_attention(inputs.q, inputs.k, inputs.v, sink_win=torch.zeros(4))
    for branches in ("win", "slc win"):
        texts = render(small_spec(branches, scores="mean"))
        assert not [name for name, text in texts.items() if not name.startswith("runtime/") and "_sink" in text]


STEPS = (
    Step("prefill", (5, 0)),
    Step("fill", (60, 41)),
    Step("decode", (1, 1)),
    Step("prefill", (3, 2)),
    Step("decode", (2, 1)),
)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(
    "name",
    ["window alone", "every branch", "keys of each branch", "no local blocks", "both sinks", "each head its blocks"],
)
def test_prefill_and_decode_have_the_sink(name: str, page_size: int | None) -> None:
    op = operator(name, passes=("forward", "decode"))
    rows = run_scenario(op.spec, op.module, Scenario(2, 140, page_size, STEPS), DEVICE.type)
    assert {"o", *(sink.replace("sink", "lse") for sink in sinks_of(name))} <= {row.quantity for row in rows}
    failures = [f"{row.case}: {row.quantity}: {row.problem or (row.error, row.bound)}" for row in rows if not row.ok]
    assert not failures, "\n".join(failures[:8])


def test_the_layer_learns_its_sinks() -> None:
    op = operator("window alone", passes=("forward", "backward", "decode"))
    torch.manual_seed(1)
    layer = op.NativeSparseAttention(24, device=DEVICE)
    assert layer.sink_win.dtype == torch.float32 and torch.equal(layer.sink_win, torch.zeros(4, device=DEVICE))
    hidden = torch.randn(2, 17, 24, device=DEVICE)
    out = layer(hidden)
    out.square().sum().backward()
    assert layer.sink_win.grad is not None and layer.sink_win.grad.abs().min() > 0
    with torch.no_grad():
        layer.sink_win += 3.0
        changed = layer(hidden)
        assert not torch.allclose(changed, out)
        cache = op.NSACache(2, 20, max_new_tokens=2, device=DEVICE)
        parts = []
        for part in (hidden[:, :15], hidden[:, 15:]):
            cache.extend(part.shape[1])
            parts.append(layer(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), changed, rtol=1e-4, atol=1e-5)


def test_hoppers_kernel_is_no_schedule_of_a_window_with_a_sink() -> None:
    plain, sunk = (small_spec("cmp win", dims=(64, 64), dtype="float16", sink=sink) for sink in ("none", "learned"))
    offered = [[step.branch for step in lower(spec).attends if step.schedule(HOPPER_ROWS)] for spec in (plain, sunk)]
    assert offered == [["cmp", "win"], ["cmp"]]
    alone = small_spec("win", dims=(64, 64), dtype="float16", sink="learned")
    assert not lower(alone).hopper and "kernels/hopper_banded_forward.py" not in render(alone)


def test_selection_with_a_sink_keeps_hoppers_kernels_whose_parts_are_merged_elsewhere() -> None:
    wide = {"dims": (64, 64), "dtype": "float16", "scores": "mean", "block": 64, "group": 16}
    plain, sunk = (lower(small_spec("slc", sink_slc=sink, **wide)) for sink in ("none", "learned"))
    assert plain.hopper_selected_forward and sunk.hopper_selected_forward
    assert plain.hopper_selected_backward == sunk.hopper_selected_backward


def test_a_sink_is_a_read_with_a_gradient_and_a_constant_of_its_step() -> None:
    program = lower(small_spec(sink="learned"))
    window, others = program.windowed, [step for step in program.attends if step.branch != "win"]
    assert window is not None and window.sink == "sink_win" and window.constants["SINK"] == 1
    assert "sink_win" in window.reads and "sink_win" in window.gradients
    assert not any(step.sink or "sink_win" in step.reads for step in others)
    assert program.sinks == ("sink_win",) and lower(small_spec()).sinks == ()


def test_a_row_that_pads_a_batch_in_decode_has_no_sink() -> None:
    op = operator("window alone", passes=("forward", "decode"), branches="slc win", scores="mean", sinks=("slc", "win"))
    inputs = inputs_of(op, 2, batch=2)
    cache = op.NSACache(2, 20, max_new_tokens=2, device=DEVICE)
    cache.extend([2, 1])
    cache.write(inputs.k, inputs.v)
    for infer in (op.nsa_decode, op.nsa_prefill):
        sinks = {name: getattr(inputs, name) for name in ("sink_slc", "sink_win")}
        o, aux = infer(inputs.q, cache, **sinks, return_aux=True)
        for lse in (aux.lse_slc, aux.lse_win):
            assert torch.isfinite(lse[0]).all() and torch.isfinite(lse[1, 0]).all()
            assert (lse[1, 1] == -math.inf).all()
        assert not o[1, 1].any()


@pytest.mark.parametrize(("name", "dtype"), [*PROPERTIES_OF])
@pytest.mark.parametrize(
    ("property", "case"),
    [
        ("future", Case(13, twice=False, batch=1)),
        ("packed", Case((9, 0, 12), twice=False, batch=1)),
        ("padded", Case((9, 0, 12), twice=False, batch=1)),
        ("chunks", Case(13, twice=False, batch=1)),
        ("batch", Case(11, twice=False, batch=2)),
        ("neighbours", Case(11, twice=False, batch=2)),
        ("groups", Case(11, twice=False, batch=1)),
        ("doubled", Case(11, twice=False, batch=1)),
        ("guards", Case((9, 0, 12), twice=False, batch=1)),
    ],
)
def test_an_operator_with_a_sink_has_the_properties_of_any(property: str, case: Case, name: str, dtype: str) -> None:
    op = operator(name, kv_heads=2, dtype=dtype)
    example = Example(property, case, seed=3)
    assert example.applies(op.parameters, "cpu")
    result = run_example(op.spec, op.module, example, DEVICE.type, lambda spec: operator_of_spec(spec).module)
    assert result.ok, [(row.quantity, row.error, row.bound, row.problem) for row in result.rows if not row.ok]


def test_operators_with_a_sink_keep_pytorchs_rules_and_compile_to_the_same_bits() -> None:
    op = operator("window alone", passes=("forward", "backward", "decode"))
    inputs = inputs_of(op, 12)

    def leaves() -> dict[str, Tensor]:
        return {name: getattr(inputs, name).detach().clone().requires_grad_() for name in ("q", "k", "v", "sink_win")}

    q, k, v, sink = leaves().values()
    every = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for name, arguments in (("attention", (q, k, v, sink, None, "")), ("window_attention", (q, k, v, sink, None))):
        checked = torch.library.opcheck(op.registration.operator(name), arguments, test_utils=every)
        assert set(checked.values()) == {"SUCCESS"} and len(checked) == len(every)
    torch._dynamo.reset()
    compiled = torch.compile(op.nsa_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    found = []
    for attend_to in (compiled, op.nsa_attention):
        given = leaves()
        o = attend_to(**given)
        o.backward(inputs.do)
        found.append({"o": o.detach(), **{name: x.grad for name, x in given.items()}})
    assert_equal_bits(*found)


def test_a_layer_of_another_dtype_hands_its_sinks_on_in_float32() -> None:
    op = operator("window alone", dtype="float16")
    layer = op.NativeSparseAttention(24, device=DEVICE)
    assert layer.sink_win.dtype == torch.float32
    hidden = torch.randn(1, 9, 24, dtype=torch.float16, device=DEVICE)
    out = layer(hidden)
    halved = layer.to(torch.float16)
    assert halved.sink_win.dtype == torch.float16
    assert torch.equal(halved(hidden), out)


@pytest.mark.parametrize("packed", [False, True])
def test_the_tuner_measures_an_operator_with_its_sinks(packed: bool) -> None:
    op = operator("window alone", passes=("forward", "backward", "decode"))
    bucket = Bucket(tokens=64, batch=1 if packed else 2, packed=packed)
    inputs = bucket_inputs(op.spec, bucket, "correlated", device=DEVICE)
    assert inputs.sink_win is not None and inputs.sink_win.shape == (4,) and inputs.sink_win.dtype == torch.float32
    assert call(op, inputs).shape == inputs.do.shape
    step = decode_inputs(op.spec, op.module, bucket.tokens, bucket.batch, device=DEVICE)
    step.out.fill_(math.nan)
    step.step()
    assert torch.isfinite(step.out).all()
