"""Head dims in tiles of power-of-two widths, none narrow beside another."""

from __future__ import annotations

import pytest

from nsa_gen.lowering.heads import split_head_dim

SIZES = range(16, 257, 8)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_different_powers_of_two_that_cover_the_head_dim(size):
    widths = split_head_dim(size).widths
    assert 1 <= len(widths) <= 2
    assert list(widths) == sorted(set(widths), reverse=True)
    assert all(width in (16, 32, 64, 128, 256) for width in widths)
    assert sum(widths[:-1]) < size <= sum(widths)


@pytest.mark.parametrize("size", SIZES)
def test_no_tile_beside_another_is_narrower_than_64(size):
    widths = split_head_dim(size).widths
    assert len(widths) == 1 or min(widths) >= 64


@pytest.mark.parametrize("size", SIZES)
def test_padding_stays_below_the_next_power_of_two(size):
    padded = split_head_dim(size).padded
    assert size <= padded < max(2 * size, 32)
    assert padded == 192 or padded & (padded - 1) == 0


@pytest.mark.parametrize(
    ("size", "widths"),
    [(192, (128, 64)), (136, (128, 64)), (80, (128,)), (96, (128,)), (40, (64,)), (200, (256,)), (16, (16,))],
)
def test_head_dims_in_use_are_split_as_documented(size, widths):
    assert split_head_dim(size).widths == widths
