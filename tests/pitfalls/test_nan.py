"""A NaN or an infinity reaches the rows that see it, in every branch, and no other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nsa_gen.verification import OracleParameters
from nsa_gen.verification.reference.dense import visible_compressed, visible_selected, visible_window
from tests.support import DEVICE, assert_matches_oracle, operator_of

ROWS, TOKENS = 20, 52
BRANCHES = ("cmp", "slc", "win")


class Branch:
    """One branch alone: its inputs, its call, and the mask of which row sees which key."""

    def __init__(self, name: str) -> None:
        self.op = operator_of(name, indices="input" if name == "slc" else "computed", count=2, gate="none", window=18)
        self.name = name
        p: OracleParameters = self.op.parameters
        generator = torch.Generator().manual_seed(3)
        self.keys = p.compressed_blocks(TOKENS) if name == "cmp" else TOKENS
        self.q = torch.randn(1, ROWS, 2, 16, generator=generator).to(DEVICE)
        self.k = torch.randn(1, self.keys, 1, 16, generator=generator).to(DEVICE)
        self.v = torch.randn(1, self.keys, 1, 16, generator=generator).to(DEVICE)
        t = torch.arange(TOKENS - ROWS, TOKENS)
        # Rows in turn choose two earlier blocks, or their own and an earlier one.
        lists = torch.tensor([[0, 1], [1, 2], [0, 3], [2, 3]], dtype=torch.int32)[torch.arange(ROWS) % 4]
        self.indices = lists[None, :, None].contiguous().to(DEVICE)
        self.visible = {
            "cmp": lambda: visible_compressed(p, t, self.keys),
            "win": lambda: visible_window(p, t, TOKENS),
            "slc": lambda: visible_selected(p, t, TOKENS, lists[:, None], None),
        }[name]()[0, 0]

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.name == "cmp":
            return self.op.compressed_attention(self.q, k, v, tokens=TOKENS)
        if self.name == "slc":
            return self.op.selected_attention(self.q, k, v, self.indices)
        return self.op.window_attention(self.q, k, v)


@pytest.mark.parametrize("name", BRANCHES)
def test_a_nan_in_a_key_reaches_the_rows_that_see_the_key_and_no_other(name: str) -> None:
    branch = Branch(name)
    clean, clean_lse = branch(branch.k, branch.v)
    for place in (branch.keys * 2 // 3, branch.keys - 1):
        k = branch.k.clone()
        k[0, place, 0, 5] = math.nan
        o, lse = branch(k, branch.v)
        sees = branch.visible[:, place].to(DEVICE)
        assert sees.any() and not sees.all()
        assert o[0, sees].isnan().all() and lse[0, sees].isnan().all()
        assert torch.equal(o[0, ~sees], clean[0, ~sees]) and torch.equal(lse[0, ~sees], clean_lse[0, ~sees])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", BRANCHES)
def test_a_value_that_is_not_finite_reaches_the_rows_that_see_it_and_no_other(name: str, value: float) -> None:
    branch = Branch(name)
    clean, clean_lse = branch(branch.k, branch.v)
    for place in (branch.keys * 2 // 3, branch.keys - 1):
        v = branch.v.clone()
        v[0, place, 0, 5] = value
        o, lse = branch(branch.k, v)
        sees = branch.visible[:, place].to(DEVICE)
        assert not o[0, sees][..., 5].isfinite().any()
        assert torch.equal(o[0, ~sees], clean[0, ~sees])
        others = torch.arange(16, device=DEVICE) != 5
        assert torch.equal(o[..., others], clean[..., others]) and torch.equal(lse, clean_lse)


def test_a_nan_in_one_query_stays_in_its_row_and_chooses_legal_blocks() -> None:
    op = operator_of(gate="none", count=2, initial=0)
    q, k, v = (torch.randn(1, n, h, 16, device=DEVICE) for n, h in ((6, 2), (52, 1), (52, 1)))
    clean, before = op.nsa_attention(q, k, v, return_aux=True)
    q[0, 2, 0, 3] = math.nan
    o, aux = op.nsa_attention(q, k, v, return_aux=True)
    for name in ("o_cmp", "o_slc", "o_win"):
        row = getattr(aux, name)[0, 2]
        assert row[0].isnan().all() and (name == "o_slc" or row[1].isfinite().all())
    assert aux.indices[0, 2, 0].tolist() == [0, 3]  # every importance is NaN: the own block, then the lower index
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(aux.indices[0, rest], before.indices[0, rest])
    for name in ("o_cmp", "o_win", "lse_cmp", "lse_win"):
        assert torch.equal(getattr(aux, name)[0, rest], getattr(before, name)[0, rest]), name
    # A row that chooses otherwise moves others up or down in the tiles of its blocks, and with them their last bits.
    torch.testing.assert_close(o[0, rest], clean[0, rest], rtol=1e-5, atol=1e-6)
    for key_major in (0, 1):
        with op.configs.override("selected_attention", KEY_MAJOR_FORWARD=key_major):
            found = op.selected_attention(q, k, v, before.indices, before.counts)
            expected = op.selected_attention(q.nan_to_num(0.5), k, v, before.indices, before.counts)
        assert all(torch.equal(x[0, rest], y[0, rest]) for x, y in zip(found, expected, strict=True))
        assert found[0][0, 2, 0].isnan().all() and found[0][0, 2, 1].isfinite().all()


def test_the_whole_operator_passes_a_nan_to_the_rows_that_see_it_and_no_other() -> None:
    assert_matches_oracle(operator_of(count=2, gate="none"), 10, tokens_kv=48, kind="nan", gradients=False)
