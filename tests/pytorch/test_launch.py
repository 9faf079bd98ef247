"""Launches past Triton's dispatcher: the same machine code as by it, and only where nothing else wants to see them."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

from nsa_gen.targets.launches import record_launches
from tests.pytorch.fake_machine import FakeMachine, fake_machine
from tests.support import operator_of

MEMORY = torch.empty(64, dtype=torch.float32)
ALIGNED = MEMORY[(-MEMORY.data_ptr() // 4) % 16 :]
CONSTANTS = {"SIZE": 8, "FLAG": False, "num_warps": 4}
WORDS = (1, 2, 16, 17, -16, -1, 0, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63, 2**64 - 16)


def copy_kernel(x_ptr, y_ptr, bounds, stride, tokens, SIZE: tl.constexpr, FLAG: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, SIZE) * stride, tl.load(x_ptr + tl.arange(0, SIZE)))


@pytest.fixture
def machine() -> Iterator[FakeMachine]:
    with fake_machine() as machine:
        yield machine


@functools.cache
def launches() -> ModuleType:
    return operator_of().module.runtime.launch


def fresh() -> tuple[Any, JITFunction]:
    kernel = JITFunction(copy_kernel, do_not_specialize=["tokens"])
    return launches().lean(kernel), kernel


def variants() -> dict[str, tuple[int, tuple[Any, ...], dict[str, Any]]]:
    """Launches by what is special about them: the device, arguments and constants."""
    x, plain = ALIGNED, (ALIGNED, ALIGNED, None, 5, 7)
    found: dict[str, tuple[int, tuple[Any, ...], dict[str, Any]]] = {
        "plain": (0, plain, CONSTANTS),
        "other device": (1, plain, CONSTANTS),
        "misaligned": (0, (x[1:], *plain[1:]), CONSTANTS),
        "the other misaligned": (0, (x, x[2:], *plain[2:]), CONSTANTS),
        "other dtype": (0, (x.half(), *plain[1:]), CONSTANTS),
        "integers": (0, (x.int(), *plain[1:]), CONSTANTS),
        "parameter": (0, (torch.nn.Parameter(x), *plain[1:]), CONSTANTS),
        "bounds": (0, (x, x, x.int(), 5, 7), CONSTANTS),
        "no output": (0, (x, None, *plain[2:]), CONSTANTS),
        "other constant": (0, plain, {**CONSTANTS, "SIZE": 16}),
        "constants swapped": (0, plain, {"SIZE": 4, "FLAG": False, "num_warps": 8}),
        "flag": (0, plain, {**CONSTANTS, "FLAG": True}),
        "warps": (0, plain, {**CONSTANTS, "num_warps": 8}),
        "stages": (0, plain, {**CONSTANTS, "num_stages": 2}),
        "another order": (0, plain, dict(reversed(CONSTANTS.items()))),
    }
    for word in WORDS:
        found[f"stride {word}"] = (0, (x, x, None, word, 7), CONSTANTS)
        found[f"tokens {word}"] = (0, (x, x, None, 5, word), CONSTANTS)
    return found


@functools.cache
def prepared_launch(lean: Any, grid: tuple[int, ...], *numbers: int, constants: tuple) -> Callable[..., None]:
    return launches().prepare(lean, grid, *numbers, **dict(constants))


def launch(
    lean: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], prepared: bool
) -> None:
    """Launch as it is, or as one that was prepared for its numbers and constants."""
    if prepared:
        prepared_launch(lean, grid, *arguments[3:], constants=tuple(constants.items()))(*arguments[:3])
    else:
        lean[grid](*arguments, **constants)


@pytest.mark.parametrize("prepared", [False, True])
def test_every_launch_runs_the_machine_code_that_triton_would_run(machine: FakeMachine, prepared: bool) -> None:
    lean, kernel = fresh()
    for _ in range(3):
        for name, (machine.device, arguments, constants) in variants().items():
            launch(lean, (3,), arguments, constants, prepared)
            direct = machine.sent[-1]
            kernel[(3,)](*arguments, **constants)
            expected = machine.sent[-1]
            assert direct.compiled is expected.compiled, name
            assert (
                (direct.grid, direct.stream) == (expected.grid, expected.stream) == ((3, 1, 1), 1000 + machine.device)
            )
            addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in expected.arguments]
            given = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in direct.arguments]
            assert given == addresses, name
    assert len(machine.compiled) >= 20
    direct = [sent for sent in machine.sent[-2 * len(variants()) :: 2]]
    assert not any(sent.by_triton for sent in direct), "the third time nothing is left to Triton's dispatcher"


@pytest.mark.parametrize("prepared", [False, True])
def test_grids_of_one_two_and_three_dimensions_are_launched(machine: FakeMachine, prepared: bool) -> None:
    lean, _ = fresh()
    for _ in range(2):
        for grid in ((2,), (2, 3), (2, 3, 4)):
            launch(lean, grid, (ALIGNED, ALIGNED, None, 5, 7), CONSTANTS, prepared)
    assert [sent.grid for sent in machine.sent] == 2 * [(2, 1, 1), (2, 3, 1), (2, 3, 4)]
    assert [sent.by_triton for sent in machine.sent] == [True, *5 * [False]]


@given(st.lists(st.one_of(st.sampled_from(WORDS), st.integers(-(2**63), 2**64 - 1)), min_size=2, max_size=2))
def test_numbers_of_equal_classes_specialise_alike(numbers: list[int]) -> None:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    of_triton = [native_specialize_impl(type(backend), number, False, True, True) for number in numbers]
    classes = [launches().classes_of(number) for number in numbers]
    assert classes[0] != classes[1] or of_triton[0] == of_triton[1]


def test_equal_configurations_that_are_not_the_same_have_launches_of_their_own() -> None:
    prepared: list[Any] = []
    one, other = launches().Constants(CONSTANTS), launches().Constants(CONSTANTS)
    remember = launches().kept(prepared.append)
    for config in (one, other, one):
        remember(config)
    assert one == other == CONSTANTS and [id(config) for config in prepared] == [id(one), id(other)]


def test_numbers_that_are_no_ints_and_tensors_of_other_classes_are_left_to_triton(machine: FakeMachine) -> None:
    class Other(torch.Tensor):
        pass

    lean, _ = fresh()
    other = ALIGNED.as_subclass(Other)
    for arguments in (
        (ALIGNED, ALIGNED, None, True, 7),
        (ALIGNED, ALIGNED, None, 5, 1.0),
        (other, ALIGNED, None, 5, 7),
    ):
        for _ in range(3):
            lean[(1,)](*arguments, **CONSTANTS)
    assert len(machine.sent) == 9 and all(sent.by_triton for sent in machine.sent)


def test_constants_by_position_or_left_to_their_defaults_are_left_to_triton(machine: FakeMachine) -> None:
    lean, _ = fresh()
    for size in (1, 1, 16, 16, 32, 32):  # as numbers, 16 and 32 would be alike
        lean[(1,)](ALIGNED, ALIGNED, None, 5, 7, size, FLAG=True)
    assert all(sent.by_triton for sent in machine.sent) and len(machine.compiled) == 3


@pytest.mark.parametrize("prepared", [False, True])
def test_hooks_see_launches_that_would_go_past_them(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, prepared: bool
) -> None:
    lean, kernel = fresh()
    arguments = (ALIGNED, ALIGNED, None, 5, 7)

    def by_triton() -> bool:
        launch(lean, (1,), arguments, CONSTANTS, prepared)
        return machine.sent[-1].by_triton

    assert [by_triton(), by_triton()] == [True, False]
    runtime = triton.knobs.runtime
    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        chain.add(print)
        assert by_triton()
        chain.remove(print)
    for name, value in (("launch_enter_hook", print), ("launch_exit_hook", print), ("debug", True)):
        with monkeypatch.context() as patch:
            patch.setattr(runtime, name, value)
            assert by_triton(), name
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.compilation, "instrumentation_mode", "some")
        assert by_triton()
    seen: list[Any] = []
    kernel.add_pre_run_hook(lambda *given, **named: seen.append(given))
    assert by_triton() and len(seen) == 1
    kernel.pre_run_hooks.clear()
    assert not by_triton()


@pytest.mark.parametrize("prepared", [False, True])
def test_launches_on_tensors_without_storage_are_recorded_though_their_like_was_launched(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, prepared: bool
) -> None:
    lean, kernel = fresh()
    for _ in range(2):
        launch(lean, (9,), (ALIGNED, ALIGNED, None, 5, 7), CONSTANTS, prepared)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    meta = ALIGNED.to("meta")
    with record_launches() as recorded:
        launch(lean, (9,), (meta, meta, None, 5, 7), CONSTANTS, prepared)
    assert [(launch.kernel, launch.grid) for launch in recorded] == [(kernel, (9,))] and len(machine.sent) == 2


def test_other_backends_and_other_versions_launch_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fake_machine("hip") as machine:
        lean, kernel = fresh()
        for prepared in (False, True) * 3:
            launch(lean, (1,), (ALIGNED, ALIGNED, None, 5, 7), CONSTANTS, prepared)
        monkeypatch.setattr(launches(), "KNOWN", False)
        assert launches().lean(kernel) is kernel
        launch(kernel, (1,), (ALIGNED, ALIGNED, None, 5, 7), CONSTANTS, prepared=True)
        assert len(machine.sent) == 7 and all(sent.by_triton for sent in machine.sent)


SECOND_TRACE = """
import importlib, json, sys
import torch
from nsa_gen.targets.tracing import trace
from tests.pytorch.fake_machine import fake_machine
found = {}
with fake_machine() as machine:
    for name in sys.argv[1:]:
        package = importlib.import_module(f"generated.{name}")
        with package.configs.use_target("sm_90"):
            for packed in (False, True):
                for _ in range(2):
                    machine.sent.clear()
                    trace(package, 192, 2, "meta", packed, tuple(package.SPEC["passes"]))
                left = sorted({sent.compiled.name for sent in machine.sent if sent.by_triton})
                found[f"{name} {packed}"] = len(machine.sent), left
print(json.dumps(found))
"""


def test_no_kernel_of_the_shipped_packages_is_left_to_triton_when_it_is_launched_again(
    compiling: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    names = ["llama3_8b", "nsa_paper", "tiny"]
    found = json.loads(compiling(SECOND_TRACE, *names).stdout)
    assert len(found) == 2 * len(names)
    assert all(count > 20 and left == [] for count, left in found.values()), found
