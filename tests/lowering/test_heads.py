"""Head dims in power-of-two parts: no more padding than need be."""

from __future__ import annotations

import pytest

from nsa_gen.lowering.heads import split_head_dim

SIZES = range(16, 257, 8)


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_different_powers_of_two_that_cover_the_head_dim_in_order(size):
    parts = split_head_dim(size, "HEAD_DIM_QK").parts
    widths = [part.width for part in parts]
    assert 1 <= len(parts) <= 3
    assert widths == sorted(set(widths), reverse=True)
    assert all(width in (16, 32, 64, 128, 256) for width in widths)
    assert [part.offset for part in parts] == [sum(widths[:number]) for number in range(len(parts))]
    assert all(0 < part.valid <= part.width for part in parts)
    assert all(part.valid == part.width for part in parts[:-1])
    assert sum(part.valid for part in parts) == size


@pytest.mark.parametrize("size", SIZES)
def test_no_choice_of_three_parts_pads_less_or_has_fewer_parts(size):
    found = split_head_dim(size, "HEAD_DIM_V")
    # A sum of different powers of two is a number in binary, and its parts are the ones in it.
    possible = [16 * units for units in range(1, 32) if units.bit_count() <= 3 and 16 * units >= size]
    assert found.padded == min(possible)
    assert len(found.parts) == (found.padded // 16).bit_count()


@pytest.mark.parametrize("size", [size for size in SIZES if size % 16 == 0 and (size // 16).bit_count() <= 3])
def test_a_head_dim_of_three_powers_of_two_or_fewer_is_not_padded(size):
    assert split_head_dim(size, "HEAD_DIM_QK").padded == size


@pytest.mark.parametrize(
    ("size", "widths"), [(192, [128, 64]), (80, [64, 16]), (96, [64, 32]), (72, [64, 16]), (240, [256]), (16, [16])]
)
def test_head_dims_in_use_are_split_as_documented(size, widths):
    assert [part.width for part in split_head_dim(size, "HEAD_DIM_QK").parts] == widths


def test_variables_are_named_by_width_only_where_there_are_several():
    assert split_head_dim(128, "HEAD_DIM_QK").names("q") == "q"
    assert split_head_dim(192, "HEAD_DIM_QK").names("q") == "q_128, q_64"
