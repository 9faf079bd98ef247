"""Gradients of several branches: added in float32, and rounded once by the kernel that adds the last part."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_gen.lowering import lower
from nsa_gen.verification import Inputs
from tests.support import GPU, Operator, call_with_gradients, inputs_of, operator_of

STEPS = ("compressed_backward", "window_backward", "selected_backward", "compress_backward")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "three branches": ("cmp slc win", {"count": 2, "initial": 0}),
    "heads in two parts": ("cmp win", {"dims": (144, 16), "group": 3}),
    "no window": ("cmp slc", {"count": 2, "gate": "none", "phi": "weighted"}),
    "no selection": ("cmp win", {"phi": "mlp", "gate": "given"}),
    "compressed keys given": ("cmp slc win", {"phi": "external", "indices": "input", "count": 2}),
    "keys of each branch": ("cmp slc win", {"kv": "per_branch", "count": 2}),
    "compressed alone": ("cmp", {"gate": "none"}),
    "selected alone": ("slc", {"gate": "none", "indices": "input", "count": 2}),
}
every_case = pytest.mark.parametrize("case", CASES)


def problem(case: str, dtype: str = "float16") -> tuple[Operator, Inputs]:
    branches, changes = CASES[case]
    op = operator_of(branches, dtype=dtype, **changes)
    return op, inputs_of(op, 3, tokens_kv=37, seed=11)


def float32_sums(attention: Any, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Sums of the parts of each gradient, filled in by the next backward.

    Every step is made to compute its parts of dq, and compression its of dk and dv, a first time on their own.
    """
    sums: dict[str, Tensor] = {}

    def spy(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(step)
        written = ("dk", "dv") if name == "compress_backward" else ("dq",)

        def both(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            alone = {name: x.clone() if name in ("dk", "dv") else x for name, x in given.items()}
            parts = {name: torch.full_like(given[name], torch.nan, dtype=torch.float32) for name in written}
            step(**{**alone, **parts, **{f"{name}_before": None for name in written}})
            for each, part in parts.items():
                before = sums.get("dq") if each == "dq" else given.get(f"{each}_before")
                sums[each] = part if before is None else before + part
            return step(*args, **kwargs)

        return both

    for name in STEPS:
        if hasattr(attention, name):
            patch.setattr(attention, name, spy(name, getattr(attention, name)))
    return sums


@pytest.mark.parametrize("key_major", [0, 1], ids=["query-major", "key-major"])
@every_case
def test_a_gradient_is_the_float32_sum_of_its_parts_rounded_once(
    case: str, key_major: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, inputs = problem(case)
    if key_major and op.spec.selection is None:
        pytest.skip("the schedules are those of selected attention")
    sums = float32_sums(op.module.operator, monkeypatch)
    with ExitStack() as stack:
        if op.spec.selection is not None:
            stack.enter_context(op.module.configs.override("selected_attention", KEY_MAJOR_DQ=key_major))
        found = call_with_gradients(op, inputs)
    assert "dq" in sums and ("dk" in sums) == lower(op.spec).compresses
    for name, total in sums.items():
        assert found[name].dtype == torch.float16 and torch.equal(found[name], total.half()), name
        assert total.any() and not torch.equal(total.half().float(), total), name


class Conversions(TorchDispatchMode):
    """Sizes of every tensor that torch makes in half precision of a float32 one."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = [x.dtype for x in args if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float16 and torch.float32 in before:
            self.sizes.append(result.shape)
        return result


@pytest.mark.skipif(GPU, reason="watches what torch does between the interpreter's launches")
@every_case
def test_torch_converts_no_gradient_but_keys_and_values_to_which_selection_adds_last(case: str) -> None:
    op, inputs = problem(case)
    program, attention, operator = lower(op.spec), op.module.operator, op.module.ops.ATTENTION
    named = inputs.arguments()
    named |= named.pop("compression", None) or {}
    constants = (None, *((64,) if op.spec.selection else ()), "")
    arguments = [named[argument.name] for argument in program.arguments] + [*constants]
    outputs = dict(zip(operator.outputs, attention.attention_forward(*arguments), strict=True))
    with Conversions() as conversions:
        attention.attention_backward([inputs.do, *arguments, *(outputs[name] for name in operator.saved)])
    last_of_selection = {"compressed keys given": ("k", "v"), "selected alone": ("k", "v")}
    last_of_selection["keys of each branch"] = ("k_slc", "v_slc")
    gradients = [x for x in conversions.sizes if len(x) == 4]
    assert gradients == [named[name].shape for name in last_of_selection.get(case, ())]
