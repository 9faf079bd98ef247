"""Recording launches, and the rules by which arguments specialise a kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def run_facts(**environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")} | environment
    variables["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), variables.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(HERE / "launch_facts.py")], capture_output=True, text=True, env=variables
    )


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    done = run_facts()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("case", "type_name"), [("plain", "*bf16"), ("float16", "*fp16"), ("int64", "*i64")])
def test_a_tensor_is_a_pointer_to_its_dtype(facts: dict[str, Any], case: str, type_name: str) -> None:
    assert facts[case]["signature"]["pointer"] == type_name


def test_a_tensor_without_storage_is_as_aligned_as_an_allocated_one(facts: dict[str, Any]) -> None:
    assert facts["plain"]["attributes"]["pointer"] == [["tt.divisibility", 16]]


def test_a_view_that_starts_off_the_alignment_is_not_marked_aligned(facts: dict[str, Any]) -> None:
    assert "pointer" not in facts["unaligned"]["attributes"]


def test_an_integer_is_i32_and_beyond_32_bits_i64(facts: dict[str, Any]) -> None:
    assert facts["plain"]["signature"]["number"] == "i32"
    assert facts["wide"]["signature"]["number"] == "i64"


def test_the_integer_one_becomes_a_constant(facts: dict[str, Any]) -> None:
    assert facts["one"]["signature"]["number"] == "constexpr"
    assert facts["one"]["constants"]["number"] == 1


def test_an_integer_divisible_by_16_is_marked_so_and_another_is_not(facts: dict[str, Any]) -> None:
    assert facts["sixteen"]["attributes"]["number"] == [["tt.divisibility", 16]]
    assert "number" not in facts["plain"]["attributes"]


def test_a_float_is_fp32_and_a_bool_is_one_bit(facts: dict[str, Any]) -> None:
    assert facts["float"]["signature"]["number"] == "fp32"
    assert facts["plain"]["signature"]["flag"] in ("u1", "i1")


def test_none_becomes_a_constant(facts: dict[str, Any]) -> None:
    assert facts["none"]["signature"]["number"] == "constexpr"
    assert facts["none"]["constants"]["number"] is None


def test_a_tuple_is_specialised_element_by_element(facts: dict[str, Any]) -> None:
    assert facts["plain"]["signature"]["pair"] == ["i32", "constexpr"]
    assert facts["plain"]["constants"]["pair.1"] == 1


def test_declared_constants_are_told_from_values_that_happen_to_be_constant(facts: dict[str, Any]) -> None:
    assert facts["one"]["declared"] == {"BLOCK": 16, "MODE": "plain"}
    assert facts["options"]["declared"] == {"BLOCK": 16, "MODE": "fancy"}


def test_launch_options_are_taken_from_the_launch(facts: dict[str, Any]) -> None:
    assert (facts["options"]["num_warps"], facts["options"]["num_stages"]) == (8, 5)


def test_equal_machine_code_has_an_equal_key_and_other_code_another(facts: dict[str, Any]) -> None:
    assert facts["plain"]["key"] == facts["again"]["key"]
    others = ["one", "sixteen", "wide", "float", "none", "unaligned", "float16", "amd", "options"]
    assert len({facts[case]["key"] for case in ["plain", *others]}) == len(others) + 1


def test_a_grid_may_be_a_tuple_a_number_or_a_function_of_the_arguments(facts: dict[str, Any]) -> None:
    assert facts["plain"]["grid"] == [1]
    assert facts["number_grid"]["grid"] == [3]
    assert facts["called_grid"]["grid"] == [7, 16]


def test_a_misspelt_option_is_refused_by_name(facts: dict[str, Any]) -> None:
    assert "num_wraps" in facts["unknown_option"]


def test_launching_is_as_before_when_the_recording_ends(facts: dict[str, Any]) -> None:
    assert facts["restored"] is True


def test_recording_under_the_interpreter_is_refused_with_the_mend() -> None:
    done = run_facts(TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "RuntimeError: TRITON_INTERPRET: expected unset" in done.stderr
