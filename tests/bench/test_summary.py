"""Speed-ups over the best dense attention, and the length where they cross 1."""

from __future__ import annotations

import math

import pytest

from nsa_gen.bench.records import KernelRow
from nsa_gen.bench.summary import BOTH, Key, best_dense, branch_times, crossing, entries, speed_up
from tests.bench.fakes import pair, row


def one_sequence(*rows):
    found = entries(each for many in rows for each in many)
    assert list(found) == [Key("A", "independent", 8192)]
    return found[Key("A", "independent", 8192)]


def test_the_best_dense_is_chosen_for_each_pass_apart_and_for_both_together():
    found = one_sequence(pair("nsa_gen", 1, 2), pair("cudnn", 4, 5), pair("fa2", 3, 9))
    assert best_dense(found, "forward").contender == "fa2"
    assert best_dense(found, "backward").contender == "cudnn"
    assert best_dense(found, BOTH).contender == "cudnn"
    assert speed_up(found, "nsa_gen", "forward") == 3
    assert speed_up(found, "nsa_gen", BOTH) == 3
    assert speed_up(found, "cudnn", "forward") == 0.75


def test_a_contender_without_a_backward_has_no_time_for_both():
    found = one_sequence(pair("nsa_gen", 1, 2), pair("fa4", 3, None, error="NotImplementedError: no"))
    assert best_dense(found, BOTH) is None and speed_up(found, "nsa_gen", BOTH) is None
    assert speed_up(found, "nsa_gen", "forward") == 3
    assert [each.problem for each in found] == ["", "NotImplementedError: no"]


def test_a_sparse_contender_is_never_the_best_dense():
    found = one_sequence(pair("nsa_gen", 5, 5), pair("fla", 1, 1), pair("cudnn", 10, 10))
    assert best_dense(found, BOTH).contender == "cudnn"


def test_the_spread_is_the_widest_quartile_distance_and_the_peak_the_highest():
    wide = row("nsa_gen", "backward", 10.0, low_ms=9.0, high_ms=11.0, peak_bytes=7)
    (entry,) = one_sequence([row("nsa_gen", "forward", 10.0, peak_bytes=5), wide])
    assert entry.spread == pytest.approx(0.2) and entry.peak_bytes == 7


def test_the_crossing_lies_on_a_line_of_the_logarithms():
    found = crossing({2048: 0.5, 8192: 2.0})
    assert found.tokens == pytest.approx(4096)
    assert found.text == "4,096 tokens"
    # Time that grows as T and dense time that grows as T^2 cross exactly where they are equal.
    assert crossing({1000: 1000 / 3000, 5000: 5000 / 3000}).tokens == pytest.approx(3000)


def test_the_last_crossing_counts_where_there_are_several():
    found = crossing({1024: 1.1, 2048: 0.9, 4096: 0.9, 8192: 1.1})
    assert 4096 < found.tokens < 8192


@pytest.mark.parametrize(
    ("ratios", "text"),
    [({2048: 1.2, 4096: 1.5}, "below 2,048 tokens"), ({2048: 0.2, 4096: 0.5}, "above 4,096 tokens")],
)
def test_a_crossing_that_the_lengths_do_not_hold_is_said_to_lie_beyond_them(ratios, text):
    found = crossing(ratios)
    assert found.tokens is None and found.text == text


def test_a_speed_up_of_exactly_one_is_no_loss():
    assert crossing({2048: 1.0}).text == "below 2,048 tokens"
    assert math.isclose(crossing({2048: 0.5, 4096: 1.0}).tokens, 4096)


def test_without_speed_ups_there_is_no_crossing():
    assert crossing({}) is None


def test_kernels_of_a_branch_are_added_up_pass_by_pass():
    def kernel(name, branch, direction, ms, floor):
        return KernelRow("A", "independent", 1, name, branch, direction, ms, 1, 1e9, 2.0, floor, "memory")

    found = branch_times(
        [
            kernel("a", "slc", "forward", 1.0, 0.5),
            kernel("b", "slc", "forward", 2.0, 0.25),
            kernel("c", "slc", "backward", 4.0, None),
        ]
    )
    assert [(one.direction, one.ms, one.flops, one.floor_ms) for one in found] == [
        ("forward", 3.0, 2e9, 0.75),
        ("backward", 4.0, 1e9, None),
    ]
