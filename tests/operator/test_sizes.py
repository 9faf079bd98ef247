"""The host's arithmetic of sizes agrees with Triton's functions of the same names."""

from __future__ import annotations

import triton

from generated.tiny.runtime import sizes


def test_pieces_that_cover_a_total_are_those_of_triton() -> None:
    for total in range(200):
        for size in (1, 2, 3, 16, 64, 199):
            assert sizes.cdiv(total, size) == triton.cdiv(total, size)


def test_the_next_power_of_two_is_tritons() -> None:
    assert [sizes.next_power_of_2(n) for n in range(1, 1030)] == [triton.next_power_of_2(n) for n in range(1, 1030)]
    assert sizes.next_power_of_2(0) == 1
