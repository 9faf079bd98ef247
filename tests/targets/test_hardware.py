"""The table of GPU facts and its look-ups."""

import subprocess
import sys

import pytest

from nsa_gen.hardware import GPUS, TARGETS, UnknownGpuError, find_gpu, gpu, gpu_for_device, gpu_for_target


def test_the_targets_are_the_five_architectures() -> None:
    assert TARGETS == ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.mark.parametrize(
    ("target", "shared"),
    [("sm_80", 166_912), ("sm_90", 232_448), ("sm_100", 232_448), ("sm_120", 101_376), ("gfx942", 65_536)],
)
def test_each_target_has_the_shared_memory_its_programming_guide_states(target: str, shared: int) -> None:
    assert gpu_for_target(target).shared_memory_per_block == shared


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
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_drivers_device_name_is_recognised(device: str, key: str) -> None:
    found = gpu_for_device(device)
    assert found is not None and found.key == key


def test_a_device_not_in_the_table_is_none_and_not_a_guess() -> None:
    assert gpu_for_device("Tesla T4") is None


def test_only_amd_has_warps_of_64() -> None:
    assert {one.target for one in GPUS if one.warp_size == 64} == {"gfx942"}
    assert all((one.backend == "hip") == (one.warp_size == 64) for one in GPUS)


@pytest.mark.parametrize("look_up", [gpu_for_target, find_gpu])
def test_an_unknown_target_is_refused_with_the_known_ones(look_up) -> None:
    with pytest.raises(UnknownGpuError, match=r"sm_80, sm_90, sm_100, sm_120, gfx942.*'sm_75'"):
        look_up("sm_75")


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownGpuError, match=r"a100, h100, h200, b200, rtx5090, mi300x.*'v100'"):
        gpu("v100")


def test_importing_the_room_imports_neither_torch_nor_triton() -> None:
    code = "import sys, nsa_gen.targets; print(*[name for name in ('torch', 'triton') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
