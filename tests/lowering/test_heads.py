"""Head dims in tiles of power-of-two widths, none narrow beside another."""

from __future__ import annotations

import pytest

from nsa_gen.lowering.heads import split_head_dim

SIZES = range(16, 257, 8)


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_different_powers_of_two_that_cover_the_head_dim_in_order(size):
    parts = split_head_dim(size, "HEAD_DIM_QK").parts
    widths = [part.width for part in parts]
    assert 1 <= len(parts) <= 2
    assert widths == sorted(set(widths), reverse=True)
    assert all(width in (16, 32, 64, 128, 256) for width in widths)
    assert [part.offset for part in parts] == [sum(widths[:number]) for number in range(len(parts))]
    assert all(0 < part.valid <= part.width for part in parts)
    assert all(part.valid == part.width for part in parts[:-1])
    assert sum(part.valid for part in parts) == size


@pytest.mark.parametrize("size", SIZES)
def test_no_part_beside_another_is_narrower_than_64(size):
    widths = [part.width for part in split_head_dim(size, "HEAD_DIM_V").parts]
    assert len(widths) == 1 or min(widths) >= 64


@pytest.mark.parametrize("size", SIZES)
def test_padding_stays_below_the_next_power_of_two(size):
    padded = split_head_dim(size, "HEAD_DIM_V").padded
    assert size <= padded < max(2 * size, 32)
    assert padded == 192 or padded & (padded - 1) == 0


@pytest.mark.parametrize(
    ("size", "widths"),
    [(192, [128, 64]), (136, [128, 64]), (80, [128]), (96, [128]), (40, [64]), (200, [256]), (16, [16])],
)
def test_head_dims_in_use_are_split_as_documented(size, widths):
    assert [part.width for part in split_head_dim(size, "HEAD_DIM_QK").parts] == widths


def test_variables_are_named_by_width_only_where_there_are_several():
    assert split_head_dim(128, "HEAD_DIM_QK").names("q") == "q"
    assert split_head_dim(192, "HEAD_DIM_QK").names("q") == "q_128, q_64"
