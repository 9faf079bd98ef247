"""The table of GPU facts and its look-ups."""

import subprocess
import sys

import pytest

from nsa_gen.hardware import (
    GPUS,
    SHARED_TABLES,
    TABLES,
    TARGETS,
    UnknownGpuError,
    find_gpu,
    gpu,
    gpu_for_device,
    gpu_for_target,
)
from nsa_gen.lowering import lower, space
from nsa_gen.spec import load_spec

KIB_A_BLOCK = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_87": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_103": 227,
    "sm_120": 99,
    "sm_121": 99,
    "gfx942": 64,
    "gfx950": 160,
}
"""Shared memory a block of each target may use, as the vendor's programming guide states it."""


def test_the_targets_are_those_whose_limits_are_known() -> None:
    assert tuple(KIB_A_BLOCK) == TARGETS


@pytest.mark.parametrize(("target", "shared"), KIB_A_BLOCK.items())
def test_each_target_has_the_shared_memory_its_programming_guide_states(target: str, shared: int) -> None:
    assert gpu_for_target(target).shared_memory_per_block == shared * 1024


def test_every_figure_has_a_source() -> None:
    assert all(one.source.startswith(("NVIDIA ", "AMD ")) for one in GPUS)


def test_a_target_has_a_table_of_its_own_or_shares_that_of_one_with_the_same_limits() -> None:
    assert set(TABLES) == set(TARGETS) - SHARED_TABLES.keys()
    assert set(SHARED_TABLES.values()) <= set(TABLES)
    for target, table in SHARED_TABLES.items():
        one, other = gpu_for_target(target), gpu_for_target(table)
        assert (one.table, other.table) == (table, table)
        for limit in ("backend", "warp_size", "shared_memory_per_block", "registers_per_sm", "registers_per_thread"):
            assert getattr(one, limit) == getattr(other, limit), (target, limit)


@pytest.mark.parametrize("target", SHARED_TABLES)
def test_by_the_cost_model_little_is_lost_with_a_shared_table(target: str) -> None:
    program, device = lower(load_spec("llama3_8b")), gpu_for_target(target)
    sizes = program.sizes_on(target)
    shared = own = 0.0
    for kernel in program.kernels:
        if program.runs(kernel, target):
            seconds = space.modelled_seconds(kernel, sizes, device)
            shared += seconds(program.defaults[target][kernel.name].mapping())
            own += seconds(space.choose(kernel, sizes, device).mapping())
    assert shared <= (1.15 if target == "sm_121" else 1.01) * own


def test_keys_are_unique_and_every_device_is_found_by_its_key_in_any_case() -> None:
    assert len({one.key for one in GPUS}) == len(GPUS)
    assert all(gpu(one.key.upper()) is one for one in GPUS)


def test_a_target_stands_for_the_first_device_of_its_family() -> None:
    assert gpu_for_target("SM_90").key == "h100"
    assert gpu("h200").target == "sm_90"


def test_a_name_may_be_a_device_or_an_architecture() -> None:
    assert find_gpu("h200").key == "h200"
    assert find_gpu("gfx942").key == "mi300x"


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "b200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA GB300", "b300"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("Orin", "orin"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA GB10", "gb10"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI355X", "mi355x"),
    ],
)
def test_a_drivers_device_name_is_recognised(device: str, key: str) -> None:
    found = gpu_for_device(device)
    assert found is not None and found.key == key


def test_a_device_not_in_the_table_is_none_and_not_a_guess() -> None:
    assert gpu_for_device("Tesla T4") is None


def test_only_amd_has_warps_of_64() -> None:
    assert {one.target for one in GPUS if one.warp_size == 64} == {"gfx942", "gfx950"}
    assert all((one.backend == "hip") == (one.warp_size == 64) for one in GPUS)


@pytest.mark.parametrize("look_up", [gpu_for_target, find_gpu])
def test_an_unknown_target_is_refused_with_the_known_ones(look_up) -> None:
    with pytest.raises(UnknownGpuError, match=rf"{', '.join(TARGETS)}.*'sm_75'"):
        look_up("sm_75")


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownGpuError, match=r"a100, .*rtx4090, h100, h200, .*'v100'"):
        gpu("v100")


def test_importing_the_room_imports_neither_torch_nor_triton() -> None:
    code = "import sys, nsa_gen.targets; print(*[name for name in ('torch', 'triton') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
