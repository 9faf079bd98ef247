"""dk and dv of compressed blocks by shares of the group's heads: the same gradients however many shares there are."""

from __future__ import annotations

import pytest

from tests.support import assert_matches_oracle, operator_of


@pytest.mark.parametrize("phi", ["mean", "external"])
@pytest.mark.parametrize(("group", "splits"), [(2, 2), (5, 2), (6, 4)])
def test_shares_of_the_groups_heads_add_up_whether_or_not_they_divide_it(group: int, splits: int, phi: str) -> None:
    op = operator_of("cmp", gate="none", group=group, phi=phi)
    with op.module.configs.override("compressed_backward_dkdv", HEAD_SPLITS=splits):
        rows = assert_matches_oracle(op, 29)
    assert {"dk", "dv"} <= rows.keys() or {"dk_cmp", "dv_cmp"} <= rows.keys()


def test_shares_leave_the_rows_between_packed_sequences_at_zero() -> None:
    op = operator_of("cmp", gate="none", group=2, phi="external")
    with op.module.configs.override("compressed_backward_dkdv", HEAD_SPLITS=2):
        assert_matches_oracle(op, (13, 0, 1, 22))
