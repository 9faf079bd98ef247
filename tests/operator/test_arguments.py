"""Every wrong argument raises an error that names it, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import DEVICE, Operator, inputs_of, operator_of

WHOLE = {"count": 2, "phi": "weighted", "position": ("learned", "none")}
GIVEN = {"indices": "input", "phi": "external", "kv": "per_branch", "count": 2}
T, KEYS = 5, 20


def arguments_of(op: Operator, tokens: Any = T, tokens_kv: int | None = KEYS) -> dict[str, Any]:
    """Keyword arguments of a right call."""
    inputs = inputs_of(op, tokens, tokens_kv=tokens_kv, seed=1)
    arguments = {name: x for name, x in inputs.arguments().items() if x is not None}
    if "compression" in arguments:
        arguments["compression"] = op.CompressionParameters(**arguments["compression"])
    return arguments


def wrong_layout(x: Tensor) -> Tensor:
    """The same numbers, the last dim not contiguous."""
    return x.repeat_interleave(2, -1)[..., ::2]


Change = Callable[[Tensor], Any]
EACH: dict[str, tuple[Change, type[Exception], str]] = {
    "a dim too few": (lambda x: x[0], ValueError, "shape"),
    "a head too many": (lambda x: torch.cat([x, x[:, :, :1]], 2), ValueError, "shape .*got"),
    "a batch entry too many": (lambda x: torch.cat([x, x]), ValueError, r"shape .*got \(2, "),
    "half the head dim": (lambda x: x[..., :8].contiguous(), ValueError, "8"),
    "another dtype": (lambda x: x.to(torch.float64), TypeError, "float64"),
    "no tensor": (lambda x: x.tolist(), TypeError, "list"),
    "None": (lambda x: None, TypeError, "None"),
    "another device": (lambda x: x.to("meta"), ValueError, "device"),
    "a strided last dim": (wrong_layout, ValueError, "contiguous"),
}


@pytest.mark.parametrize("problem", EACH)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_wrong_queries_keys_and_values_are_named(name: str, problem: str) -> None:
    if name == "q" and problem in ("a batch entry too many", "another device"):
        pytest.skip("q fixes the batch and the device")
    change, kind, shown = EACH[problem]
    op = operator_of(**WHOLE)
    arguments = arguments_of(op)
    arguments[name] = change(arguments[name])
    with pytest.raises(kind, match=rf"^{name}: expected.*{shown}"):
        op.nsa_attention(**arguments)


@pytest.mark.parametrize("problem", [name for name in EACH if name not in ("half the head dim", "a strided last dim")])
@pytest.mark.parametrize("name", ["k_slc", "v_slc", "k_win", "v_win", "k_cmp", "v_cmp", "indices", "gates"])
def test_wrong_further_arguments_are_named(name: str, problem: str) -> None:
    change, kind, shown = EACH[problem]
    op = operator_of(**GIVEN)
    arguments = arguments_of(op)
    name = (
        name.replace("_slc", "") if name.endswith("_slc") else name
    )  # k, v are those of the first branch that reads any
    arguments[name] = change(arguments[name])
    with pytest.raises(kind, match=rf"^{name}: expected.*{shown}"):
        op.nsa_attention(**arguments)


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Operator]:
    """Operators whose checks are run and whose kernels are not, and of which no call was accepted yet."""

    def operator(**changes: Any) -> Operator:
        op = operator_of(**changes)
        monkeypatch.setattr(op.module.operator, "call", lambda name, q, *_: (q,))
        monkeypatch.setattr(op.module.arguments.CHECKS, "_accepted", set())
        return op

    return operator


def test_a_call_like_an_accepted_one_is_not_checked_again(
    unlaunched: Callable[..., Operator], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = unlaunched(**WHOLE)
    checked: list[str] = []
    check = op.module.operator.check_query
    monkeypatch.setattr(
        op.module.operator, "check_query", lambda name, *given: checked.append(name) or check(name, *given)
    )
    for _ in range(3):
        op.nsa_attention(**arguments_of(op))
    assert checked == ["q"]
    op.nsa_attention(**arguments_of(op, tokens=T + 1))
    assert checked == ["q", "q"], "another length is another call"


@pytest.mark.parametrize("problem", EACH)
@pytest.mark.parametrize("name", ["q", "k", "v", "gates"])
def test_wrong_arguments_are_refused_after_right_ones(
    name: str, problem: str, unlaunched: Callable[..., Operator]
) -> None:
    if (name, problem) in (("q", "another device"), ("gates", "half the head dim")):
        pytest.skip("the other arguments would be to blame")
    change, kind, _ = EACH[problem]
    op = unlaunched(**WHOLE)
    arguments = arguments_of(op)
    op.nsa_attention(**arguments)
    for _ in range(2):
        with pytest.raises(kind, match=r"expected"):
            op.nsa_attention(**{**arguments, name: change(arguments[name])})


def test_an_argument_that_the_spec_has_no_use_for_is_refused_after_a_right_call(
    unlaunched: Callable[..., Operator],
) -> None:
    op = unlaunched(**WHOLE)
    arguments = arguments_of(op)
    op.nsa_attention(**arguments)
    with pytest.raises(TypeError, match=r"^k_slc: expected None"):
        op.nsa_attention(**arguments, k_slc=arguments["k"])


def test_what_autocast_let_through_is_refused_without_it(unlaunched: Callable[..., Operator]) -> None:
    op = unlaunched(dtype="float16")
    arguments = {name: x.float() for name, x in arguments_of(op).items()}
    with torch.autocast("cpu", dtype=torch.float16):
        op.nsa_attention(**arguments)
    with pytest.raises(TypeError, match=r"^q: expected dtype torch.float16"):
        op.nsa_attention(**arguments)


def test_accepted_calls_are_forgotten_when_they_are_many(
    unlaunched: Callable[..., Operator], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = unlaunched(**WHOLE)
    monkeypatch.setattr(op.module.runtime.arguments, "_MOST_ACCEPTED", 3)
    for tokens in range(1, 9):
        op.nsa_attention(**arguments_of(op, tokens=tokens))
        assert 1 <= len(op.module.arguments.CHECKS._accepted) <= 3


@pytest.mark.parametrize("name", ["k", "v", "k_win", "v_win", "k_cmp", "v_cmp", "gates", "indices"])
def test_a_wrong_number_of_tokens_is_named(name: str) -> None:
    op = operator_of(**GIVEN)
    arguments = arguments_of(op)
    arguments[name] = arguments[name][:, :-1]
    with pytest.raises(ValueError, match=r"^(k|v|k_win|v_win|k_cmp|v_cmp|gates|indices): expected") as caught:
        op.nsa_attention(**arguments)
    # A shorter k is a right k of fewer tokens: then v is too long.
    assert str(caught.value).split(":")[0] == ("v" if name == "k" else name)


def test_more_queries_than_keys_are_refused_with_both_numbers() -> None:
    op = operator_of(**WHOLE)
    arguments = arguments_of(op, 7, None)
    arguments["k"], arguments["v"] = arguments["k"][:, :4], arguments["v"][:, :4]
    with pytest.raises(ValueError, match=r"^k: expected at least .*7.*got 4"):
        op.nsa_attention(**arguments)


def test_wrong_counts_are_named() -> None:
    op = operator_of(**GIVEN)
    arguments = arguments_of(op)
    right = torch.ones(1, T, 1, dtype=torch.int32, device=DEVICE)
    op.nsa_attention(**arguments, counts=right)
    for wrong, kind in ((right.long(), TypeError), (right[:, 1:], ValueError), (right[0], ValueError), (3, TypeError)):
        with pytest.raises(kind, match=r"^counts: expected"):
            op.nsa_attention(**arguments, counts=wrong)


def test_indices_of_another_dtype_or_length_are_named() -> None:
    op = operator_of(**GIVEN)
    arguments = arguments_of(op)
    right = arguments["indices"]
    with pytest.raises(TypeError, match=r"^indices: expected dtype torch.int32.*int64"):
        op.nsa_attention(**arguments | {"indices": right.long()})
    with pytest.raises(ValueError, match=r"^indices: expected shape .*n=2.*got \(1, 5, 1, 3\)"):
        op.nsa_attention(**arguments | {"indices": torch.cat([right, right[..., :1]], -1)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k_slc", "k"), ("v_win", "v"), ("k_cmp", "k"), ("v_cmp", "v"), ("indices", "q"), ("counts", "q"),
    ],
)  # fmt: skip
def test_arguments_the_spec_has_no_use_for_are_refused(name: str, value: str) -> None:
    # A choice of blocks may be given wherever there is selection.
    op = operator_of("win") if name in ("indices", "counts") else operator_of(**WHOLE)
    arguments = arguments_of(op)
    with pytest.raises(TypeError, match=rf"^{name}: expected None.*got"):
        op.nsa_attention(**arguments, **{name: arguments[value]})


def test_gates_and_parameters_without_use_are_refused() -> None:
    op = operator_of("win", gate="none")
    arguments = arguments_of(op)
    with pytest.raises(TypeError, match=r"^gates: expected None"):
        op.nsa_attention(**arguments, gates=arguments["q"])
    with pytest.raises(TypeError, match=r"^compression: expected None"):
        op.nsa_attention(**arguments, compression=(arguments["q"],))
    with pytest.raises(TypeError, match=r"^gates: expected None"):
        op.combine([arguments["q"]], arguments["q"])
    alone = operator_of("cmp", phi="external", gate="none")
    arguments = arguments_of(alone, tokens_kv=None)
    with pytest.raises(TypeError, match=r"^k: expected None"):
        alone.nsa_attention(**arguments, k=arguments["q"], v=None)


def test_missing_gates_and_parameters_are_named_with_what_they_should_be() -> None:
    op = operator_of(**WHOLE)
    arguments = arguments_of(op)
    with pytest.raises(TypeError, match=r"^gates: expected .*cmp, slc, win.*got None"):
        op.nsa_attention(**arguments | {"gates": None})
    names = "key_weight, key_position, value_weight"
    with pytest.raises(TypeError, match=rf"^compression: expected CompressionParameters\({names}\), got None"):
        op.nsa_attention(**arguments | {"compression": None})
    with pytest.raises(TypeError, match=r"^compression: expected CompressionParameters"):
        op.nsa_attention(**arguments | {"compression": arguments["compression"][:2]})
    with pytest.raises(TypeError, match=r"^compression: expected CompressionParameters.*dict"):
        op.nsa_attention(**arguments | {"compression": arguments["compression"]._asdict()})


@pytest.mark.parametrize("problem", ["shape", "dtype", "type"])
@pytest.mark.parametrize("name", ["key_weight", "key_position", "value_weight"])
def test_wrong_parameters_are_named(name: str, problem: str) -> None:
    op = operator_of(**WHOLE)
    arguments = arguments_of(op)
    right = getattr(arguments["compression"], name)
    wrong = {"shape": right[:, :-1], "dtype": right.half(), "type": 1.0}[problem]
    with pytest.raises(ValueError if problem == "shape" else TypeError, match=rf"^compression\.{name}: expected"):
        op.nsa_attention(**arguments | {"compression": arguments["compression"]._replace(**{name: wrong})})


CU_SEQLENS: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ([0, 4], TypeError, "int32 tensor"),
    "of 64 bits": (torch.tensor([0, 4]), TypeError, "int64"),
    "of two dims": (torch.zeros(1, 2, dtype=torch.int32), ValueError, r"\(1, 2\)"),
    "without an entry": (torch.zeros(0, dtype=torch.int32), ValueError, r"\(0,\)"),
    "strided": (torch.zeros(4, dtype=torch.int32)[::2], ValueError, "contiguous"),
    "elsewhere": (torch.zeros(2, dtype=torch.int32, device="meta"), ValueError, "meta"),
}


@pytest.mark.parametrize("problem", CU_SEQLENS)
def test_wrong_cu_seqlens_are_named(problem: str) -> None:
    value, kind, shown = CU_SEQLENS[problem]
    op = operator_of(**WHOLE)
    arguments = arguments_of(op, (4,), None)
    if isinstance(value, Tensor) and value.device.type == "cpu":
        value = torch.as_strided(value.to(DEVICE), value.shape, value.stride()) if value.is_contiguous() else value
    with pytest.raises(kind, match=rf"^cu_seqlens: expected.*{shown}"):
        op.nsa_attention(**arguments | {"cu_seqlens": value})


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the bounds are not read by the host")
@pytest.mark.parametrize("bounds", [(1, 4), (0, 5), (0, 5, 4), (0, 3, 2, 4), (0, -1, 4)], ids=str)
def test_bounds_that_do_not_rise_from_0_to_a_token_at_most_are_refused_on_the_cpu(bounds: tuple[int, ...]) -> None:
    op = operator_of(**WHOLE)
    arguments = arguments_of(op, (4,), None)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected bounds rising from 0 to at most T_total=4, got \["):
        op.nsa_attention(**arguments | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)})


@pytest.mark.parametrize("recompute", [None, 3, "win", ("wni",), [[]]], ids=str)
def test_branches_to_recompute_that_are_none_are_refused(recompute: Any) -> None:
    op = operator_of("win", gate="none")
    with pytest.raises(ValueError, match=r"^recompute: expected some of win"):
        op.nsa_attention(**arguments_of(op), recompute=recompute)


def test_packed_and_batched_layouts_are_not_confused() -> None:
    op = operator_of(**WHOLE)
    packed, batched = arguments_of(op, (4, 2), None), arguments_of(op, 6, None)
    with pytest.raises(ValueError, match=r"^q: expected \(T_total, H, D\).*cu_seqlens.*got shape \(1, 6, 2, 16\)"):
        op.nsa_attention(**batched, cu_seqlens=packed["cu_seqlens"])
    del packed["cu_seqlens"]
    with pytest.raises(ValueError, match=r"^q: expected \(B, T, H, D\).*got shape \(6, 2, 16\)"):
        op.nsa_attention(**packed)


def test_packed_keys_of_another_length_are_refused() -> None:
    op = operator_of("win", gate="none")
    arguments = arguments_of(op, (4, 2), None)
    with pytest.raises(ValueError, match=r"^k: expected T_total=6 tokens.*got 7"):
        op.nsa_attention(**arguments | {"k": torch.cat([arguments["k"], arguments["k"][:1]])})


def test_the_steps_check_their_arguments_too() -> None:
    op = operator_of(**WHOLE)
    a = arguments_of(op)
    q, k, v, parameters = a["q"], a["k"], a["v"], a["compression"]
    k_cmp, v_cmp = op.compress(k, v, parameters)
    o, lse = op.compressed_attention(q, k_cmp, v_cmp, tokens=KEYS)
    indices, counts = op.select_blocks(q, k_cmp, lse, tokens=KEYS)
    wrong: list[tuple[str, type[Exception], Callable[[], Any]]] = [
        ("k", TypeError, lambda: op.compress(None, v, parameters)),
        ("v", ValueError, lambda: op.compress(k, v[:, 1:], parameters)),
        ("compression", TypeError, lambda: op.compress(k, v)),
        ("k_cmp", ValueError, lambda: op.compressed_attention(q, k_cmp, v_cmp)),  # tokens is Tq
        ("v_cmp", ValueError, lambda: op.compressed_attention(q, k_cmp, v_cmp[:, 1:], tokens=KEYS)),
        ("tokens", ValueError, lambda: op.compressed_attention(q, k_cmp, v_cmp, tokens=T - 1)),
        ("tokens", TypeError, lambda: op.compressed_attention(q, k_cmp, v_cmp, tokens=20.0)),
        ("tokens", TypeError, lambda: op.select_blocks(q, k_cmp, lse, tokens=True)),
        ("lse_cmp", TypeError, lambda: op.select_blocks(q, k_cmp, lse.double(), tokens=KEYS)),
        ("lse_cmp", ValueError, lambda: op.select_blocks(q, k_cmp, lse[:, :-1], tokens=KEYS)),
        ("lse_cmp", TypeError, lambda: op.select_blocks(q, k_cmp, None, tokens=KEYS)),
        ("indices", TypeError, lambda: op.selected_attention(q, k, v, None)),
        ("indices", TypeError, lambda: op.selected_attention(q, k, v, indices.long())),
        ("counts", ValueError, lambda: op.selected_attention(q, k, v, indices, counts[:, :1])),
        ("k", ValueError, lambda: op.window_attention(q, k[:, :2], v[:, :2])),
        ("v", TypeError, lambda: op.window_attention(q, k, "v")),
        ("q", TypeError, lambda: op.window_attention(None, k, v)),
        ("outputs", ValueError, lambda: op.combine([o, o], a["gates"])),
        ("outputs", TypeError, lambda: op.combine(None, a["gates"])),
        ("outputs", TypeError, lambda: op.combine((x for x in [o, o, o]), a["gates"])),
        (r"outputs\[1\]", ValueError, lambda: op.combine([o, o[:, 1:], o], a["gates"])),
        (r"outputs\[2\]", TypeError, lambda: op.combine([o, o, None], a["gates"])),
        ("gates", TypeError, lambda: op.combine([o, o, o])),
        ("gates", ValueError, lambda: op.combine([o, o, o], a["gates"][..., :2])),
    ]
    for name, kind, attempt in wrong:
        with pytest.raises(kind, match=rf"^{name}: expected"):
            attempt()
    with pytest.raises(ValueError, match=r"^v_cmp: expected shape \(B=1, Nc=\d+, "):
        op.compressed_attention(q, k_cmp, v_cmp[:, 1:], tokens=KEYS)


def test_combine_of_one_branch_checks_its_output() -> None:
    op = operator_of("win", gate="none")
    o = torch.randn(1, 3, 2, 16, device=DEVICE)
    assert torch.equal(op.combine([o]), o)
    for wrong, kind in ((o[..., :8], ValueError), (o.half(), TypeError), ("o", TypeError)):
        with pytest.raises(kind, match=r"^outputs\[0\]: expected"):
            op.combine([wrong])


def test_a_right_call_of_every_kind_used_here_works() -> None:
    for changes in (WHOLE, GIVEN):
        op = operator_of(**changes)
        assert op.nsa_attention(**arguments_of(op)).shape == (1, T, 2, 16)
