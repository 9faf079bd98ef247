"""Legal values of tunables and the rules between them."""

from __future__ import annotations

import pytest

from nsa_gen.runtime.space import Space

SPACE = Space(
    {"attend": {"KEY_BLOCK": [16, 64], "num_warps": {"from": 1, "to": 8}}},
    {"attend": ["KEY_BLOCK * num_warps <= 256"]},
)


@pytest.mark.parametrize("values", [{"KEY_BLOCK": 16, "num_warps": 8}, {"KEY_BLOCK": 64, "num_warps": 4}], ids=str)
def test_values_that_are_listed_and_fit_each_other_are_legal(values: dict[str, int]) -> None:
    assert SPACE.problem("attend", values) == ""


@pytest.mark.parametrize(
    ("kernel", "values", "problem"),
    [
        ("pool", {}, "kernel: expected one of attend, got 'pool'"),
        ("attend", {}, "attend: expected KEY_BLOCK, num_warps, got nothing"),
        ("attend", {"KEY_BLOCK": 16, "stages": 2}, "attend: expected KEY_BLOCK, num_warps, got KEY_BLOCK, stages"),
        ("attend", {"KEY_BLOCK": 32, "num_warps": 4}, "attend.KEY_BLOCK: expected 16 or 64, got 32"),
        ("attend", {"KEY_BLOCK": 16, "num_warps": 9}, "attend.num_warps: expected 1 to 8, got 9"),
        ("attend", {"KEY_BLOCK": 16, "num_warps": True}, "attend.num_warps: expected 1 to 8, got True"),
        (
            "attend",
            {"KEY_BLOCK": 64, "num_warps": 8},
            "attend: expected KEY_BLOCK * num_warps <= 256, got KEY_BLOCK=64, num_warps=8",
        ),
    ],
)
def test_what_is_wrong_is_said_with_what_is_allowed(kernel: str, values: dict[str, object], problem: str) -> None:
    assert SPACE.problem(kernel, values) == problem


def test_of_some_values_each_is_judged_but_no_rule_that_needs_the_others() -> None:
    assert SPACE.problem("attend", {"num_warps": 8}, some=True) == ""
    assert SPACE.problem("attend", {"num_warps": 16}, some=True) == "attend.num_warps: expected 1 to 8, got 16"
    assert SPACE.problem("attend", {"KEY_BLOCK": 64, "num_warps": 8}, some=True) != ""
