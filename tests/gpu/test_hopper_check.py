"""The comparison of Hopper's kernel with the ordinary ones, with the interpreter in the place of either."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu import hopper, hopper_selected
from tests.support import DEVICE, Operator, operator_of

SHAPES = ((37, None, "fused"), (5, 30, "heads first"), ((20, 0, 9), None, "plain"))


def operator() -> Operator:
    return operator_of("cmp win", dims=(64, 64), dtype="float16")


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> list[str]:
    """Faults found where the window's forward, as Hopper's kernel, gives another o."""
    module = operator().module
    attention = importlib.import_module(f"{module.__name__}.kernels.banded")
    right = attention.window_forward

    def forward(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        o, lse = right(q, *arguments)
        as_hopper = module.configs.get("banded_attention", q.device)["HOPPER_TOKENS"] == 0
        return (change(o) if as_hopper else o), lse

    monkeypatch.setattr(attention, "window_forward", forward)
    return list(hopper.faults(module, "window", 37, None, "plain", "v", DEVICE))


@pytest.mark.parametrize("branch", ["compressed", "window"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_kernels_have_no_fault_whatever_is_poisoned(branch: str, shape: tuple[Any, ...]) -> None:
    for poison in hopper.POISONS:
        assert not list(hopper.faults(operator().module, branch, *shape, poison, DEVICE)), poison


def test_other_values_other_places_of_nan_and_other_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        assert any(fault.startswith("o: off by") for fault in spoil(patch, lambda o: o * 1.01))
    with monkeypatch.context() as patch:
        assert any(fault == "o: isnan elsewhere" for fault in spoil(patch, torch.nan_to_num))
    calls = iter(range(9))
    assert "other bits when called again" in spoil(monkeypatch, lambda o: o * (1 + 2.0**-10 * next(calls)))


@pytest.mark.parametrize("branch", ["compressed", "window"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_gradients_have_no_fault_with_a_gate_or_without(branch: str, shape: tuple[Any, ...]) -> None:
    for gated in (True, False):
        assert not list(hopper.gradient_faults(operator().module, branch, *shape, gated, DEVICE)), gated


def test_other_gradients_and_other_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = operator().module
    gradients = importlib.import_module(f"{module.__name__}.kernels.banded_backward")
    right, calls = gradients.window_backward, iter(range(9))

    def backward(*arguments: Any, **keywords: Any) -> None:
        right(*arguments, **keywords)
        if module.configs.get("banded_backward", arguments[0].device)["HOPPER_BACKWARD_TOKENS"] == 0:
            arguments[-3].mul_(1.01 + 2.0**-10 * next(calls))
            arguments[-4].mul_(1.01)  # dq

    monkeypatch.setattr(gradients, "window_backward", backward)
    found = list(hopper.gradient_faults(module, "window", 37, None, "plain", True, DEVICE))
    assert "other bits when called again" in found
    assert all(any(fault.startswith(f"{name}: off by") for fault in found) for name in ("dq", "dk"))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (torch.nan_to_num, "does not reach every row that sees it"),
        (lambda dq: dq * torch.where(dq.isnan().any(), torch.nan, 1.0), "reaches rows that the ordinary kernel keeps"),
        (lambda dq: dq * torch.where(dq.isnan().any(), 1.01, 1.0), "changes rows that it does not reach"),
    ],
)
def test_other_places_of_nan_in_dq_are_found(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], fault: str
) -> None:
    module = operator().module
    gradients = importlib.import_module(f"{module.__name__}.kernels.banded_backward")
    right = gradients.window_backward

    def backward(*arguments: Any, **keywords: Any) -> None:
        right(*arguments, **keywords)
        if module.configs.get("banded_backward", arguments[0].device)["HOPPER_DQ_TOKENS"] == 0:
            arguments[-4].copy_(change(arguments[-4]))

    monkeypatch.setattr(gradients, "window_backward", backward)
    found = hopper.gradient_faults(module, "window", 37, None, "plain", False, DEVICE)
    assert any(fault in each for each in found)


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> Operator:
    """An operator whose package has Hopper's kernels of selected blocks, and few cases to compare them in."""
    monkeypatch.setattr(hopper_selected, "CASES", {"packed": ({"rows": 40, "tokens": 40, "lengths": (1, 0, 39)}, 32)})
    monkeypatch.setattr(hopper_selected, "TOKENS", 40)
    monkeypatch.setattr(hopper_selected, "BROKEN", (("v", 30, "nan"),))
    return operator_of("slc", dims=(64, 64), dtype="float16", block=64, count=2, indices="input")


@pytest.mark.parametrize("job", [hopper_selected.forward_job, hopper_selected.backward_job])
def test_equal_kernels_of_selected_blocks_have_no_fault(selected: Operator, job: Callable[..., None]) -> None:
    result: dict[str, Any] = {}
    job(result, selected.module, str(DEVICE))
    assert result["ok"], result["error"]
    assert len(result["rows"]) == (2 if job is hopper_selected.forward_job else 4)


def test_other_outputs_of_selected_blocks_are_found(selected: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module(f"{selected.module.__name__}.kernels.selected_key_major_forward")
    right = kernels.forward

    def forward(*arguments: Any) -> None:
        right(*arguments)
        if selected.configs.get("selected_outputs", arguments[0].device)["HOPPER_TOKENS"] == 0:
            arguments[7].nan_to_num_(0.0).mul_(1.01)  # o

    monkeypatch.setattr(kernels, "forward", forward)
    result: dict[str, Any] = {}
    hopper_selected.forward_job(result, selected.module, str(DEVICE))
    assert [row["ok"] for row in result["rows"]] == [False, False]
