"""Inputs for timing: drawn on the device, independent or as in a model."""

from __future__ import annotations

import pytest
import torch

import nsa_gen
from nsa_gen.bench.inputs import RHO, draw_inputs, selection_overlap, selection_shares
from nsa_gen.bench.workloads import nsa_spec
from nsa_gen.spec import Spec
from nsa_gen.verification.reference.inputs import make_inputs

SMALL = nsa_spec("small", 4, 2, 32, 16)


def changed(spec: Spec, **changes: object) -> Spec:
    return Spec.model_validate({**spec.model_dump(), **changes})


GIVEN = changed(
    SMALL,
    compression=None,
    selection={"block": 64, "count": 4, "indices": "input"},
    window=None,
    combine={"gate": "none"},
)
EXTERNAL = changed(SMALL, compression={"block": 32, "stride": 16, "phi": "external"}, selection=None, window=None)


@pytest.mark.parametrize("spec", [SMALL, GIVEN, EXTERNAL, nsa_gen.load_spec("nsa_paper")], ids=lambda spec: spec.name)
@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_they_have_the_shapes_and_dtypes_that_the_operator_takes(spec, kind):
    wanted = make_inputs(spec, batch=1, tokens=200, dtype=torch.bfloat16)
    found = draw_inputs(spec, 200, device="cpu", kind=kind)
    for name, x in {**wanted.arguments(), "do": wanted.do}.items():
        y = getattr(found, name)
        if isinstance(x, torch.Tensor):
            assert (y.shape, y.dtype) == (x.shape, x.dtype), name
        else:
            assert (y is None) == (x is None), name
    for name, x in (wanted.compression or {}).items():
        assert found.compression[name].shape == x.shape


def test_a_seed_gives_the_same_numbers_again_and_another_others():
    first, again, other = (draw_inputs(SMALL, 100, device="cpu", seed=seed, kind="correlated") for seed in (1, 1, 2))
    assert torch.equal(first.q, again.q) and torch.equal(first.k, again.k)
    assert not torch.equal(first.q, other.q) and not torch.equal(first.k, other.k)


def test_independent_queries_do_not_correlate_and_correlated_ones_do_by_rho():
    for kind, expected in (("independent", 0.0), ("correlated", RHO)):
        q = draw_inputs(SMALL, 3000, device="cpu", kind=kind).q.float()[0]
        assert q.std().item() == pytest.approx(1, abs=0.05)
        assert (q[1:] * q[:-1]).mean().item() == pytest.approx(expected, abs=0.05)
        # Ten steps on, across the edges of the chunks that the recurrence is computed in.
        assert (q[10:] * q[:-10]).mean().item() == pytest.approx(expected**10, abs=0.06)


def test_correlated_keys_share_directions_over_runs_of_tokens():
    k = draw_inputs(SMALL, 4096, device="cpu", kind="correlated").k.float()[0]
    assert k.std().item() == pytest.approx(1, abs=0.1)
    near = (k[1:] * k[:-1]).mean().item()
    far = (k[2000:] * k[:-2000]).mean().item()
    assert near == pytest.approx(0.64, abs=0.1)
    assert far < near / 2


def test_indices_are_distinct_visible_ascending_and_hold_the_query_s_own_block():
    indices = draw_inputs(GIVEN, 500, device="cpu").indices
    assert indices.shape == (1, 500, 2, 4) and indices.dtype == torch.int32
    for token in (0, 63, 64, 200, 499):
        for slots in indices[0, token].tolist():
            used = [slot for slot in slots if slot >= 0]
            assert slots == used + [-1] * (4 - len(used))
            assert used == sorted(set(used)) and used[-1] == token // 64
            assert len(used) == min(4, token // 64 + 1)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"independent, correlated or a file \.json, got 'zeros'"):
        draw_inputs(SMALL, 10, device="cpu", kind="zeros")


def test_the_overlap_is_the_share_of_blocks_that_the_query_before_has_too():
    indices = torch.tensor([[[[0, 1, -1]], [[0, 1, 2]], [[0, 5, 6]]]], dtype=torch.int32)
    assert selection_overlap(indices) == pytest.approx((2 + 1) / 6)
    assert selection_overlap(indices[:, :1]) is None


def test_the_overlap_of_a_long_sequence_does_not_depend_on_how_it_is_cut(monkeypatch):
    indices = draw_inputs(GIVEN, 300, device="cpu").indices
    whole = selection_overlap(indices)
    monkeypatch.setattr("nsa_gen.bench.inputs.ROWS_AT_ONCE", 7)
    assert selection_overlap(indices) == whole


def test_the_map_of_what_is_selected_adds_up_to_one_and_says_where_it_lies():
    tokens, block = 64, 8
    own = torch.arange(tokens) // block
    # Every query selects block 0 and its own; the first eight have one block, twice the same share.
    indices = torch.stack([torch.zeros_like(own), torch.where(own > 0, own, -1)], -1)[None, :, None].int()
    shares = selection_shares(indices, block, bins=8)
    assert [sum(row) for row in shares] == pytest.approx([1.0] * 8)
    assert shares[0][0] == 1.0
    assert all(row[0] == row[i] == 0.5 for i, row in enumerate(shares) if i > 0)


def test_a_short_sequence_has_a_part_a_block():
    indices = torch.zeros(1, 20, 2, 3, dtype=torch.int32)
    assert selection_shares(indices, 8) == ((1.0, 0.0, 0.0),) * 3


def test_the_map_of_a_long_sequence_does_not_depend_on_how_it_is_cut(monkeypatch):
    indices = torch.randint(0, 8, (1, 64, 2, 3), dtype=torch.int32)
    whole = selection_shares(indices, 8)
    monkeypatch.setattr("nsa_gen.bench.inputs.ROWS_AT_ONCE", 7)
    assert selection_shares(indices, 8) == whole
