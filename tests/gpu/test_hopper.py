"""Hopper's kernels of generated packages beside the ordinary ones; needs of Python torch, triton and pytest alone."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.gpu import hopper, hopper_selected
from tests.gpu.common import expect_ok
from tests.gpu.device import DEVICE, SEED

GENERATED = Path(__file__).resolve().parents[2] / "generated"


def having(name: str) -> list[str]:
    """The committed packages that have a module."""
    return sorted(path.name for path in GENERATED.iterdir() if any(path.rglob(f"{name}.py")))


def needs_hopper() -> None:
    """Skip elsewhere than on a GPU of capability 9.0."""
    if DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels are for GPUs of capability 9.0")


def package_in(name: str, dtype: str) -> ModuleType:
    """A committed package, or, in another dtype than its own, one that is generated."""
    module = importlib.import_module(f"generated.{name}")
    if module.SPEC["dtype"] == dtype:
        return module
    if importlib.util.find_spec("pydantic") is None:
        pytest.skip("the generator's requirements are not installed")
    from nsa_gen.rendering import import_package
    from tests.gpu.support import package_of, variant

    return import_package(package_of(variant(name, dtype)))


@pytest.mark.gpu(alone=True, seconds=900)
@pytest.mark.parametrize("branch", ["compressed", "window"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", having("hopper_banded_forward"))
def test_the_banded_kernel_agrees_with_the_ordinary_ones(name: str, dtype: str, branch: str) -> None:
    needs_hopper()
    expect_ok(hopper.hopper_job, package_in(name, dtype), branch, seed=SEED)


@pytest.mark.gpu(alone=True, seconds=900)
@pytest.mark.parametrize("name", having("hopper_selected_forward"))
def test_attention_to_selected_blocks_is_as_near_to_float64_as_the_ordinary_one(name: str) -> None:
    needs_hopper()
    expect_ok(hopper_selected.forward_job, importlib.import_module(f"generated.{name}"))


@pytest.mark.gpu(alone=True, seconds=900)
@pytest.mark.parametrize("name", having("hopper_selected_backward"))
def test_the_backward_of_selected_attention_is_as_near_to_float64_as_the_ordinary_one(name: str) -> None:
    needs_hopper()
    expect_ok(hopper_selected.backward_job, importlib.import_module(f"generated.{name}"))


@pytest.mark.gpu(alone=True, seconds=900)
@pytest.mark.parametrize("branch", ["compressed", "window"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", having("hopper_banded_backward"))
def test_gradients_of_banded_attention_are_as_near_to_float64_as_the_ordinary_ones(
    name: str, dtype: str, branch: str
) -> None:
    needs_hopper()
    module = package_in(name, dtype)
    if not hasattr(importlib.import_module(f"{module.__name__}.kernels.banded_backward"), f"{branch}_backward"):
        pytest.skip(f"{name} has no {branch} attention")
    expect_ok(hopper.gradients_job, module, branch, seed=SEED)
