"""check_selection accepts every right choice and finds each kind of wrong one; check_indices likewise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nsa_gen.verification import OracleParameters, check_indices, check_selection, make_inputs, reference_attention
from tests.verification.verification_specs import spec_of

PARAMETERS = OracleParameters.from_spec(spec_of(count=4, initial=1, local=1))
TOKENS = 150


def right_choice(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    inputs = make_inputs(spec_of(count=4, initial=1, local=1), batch=2, tokens=TOKENS, dtype=torch.float64, seed=seed)
    result = reference_attention(PARAMETERS, **inputs.arguments())
    return result.indices, result.counts, result.importance


def check(indices: Tensor, counts: Tensor, importance: Tensor):
    return check_selection(PARAMETERS, indices, counts, importance, tolerance=1e-5)


def test_the_oracles_own_choice_is_right() -> None:
    assert check(*right_choice()).ok


def test_packed_and_late_queries_are_placed_rightly() -> None:
    spec = spec_of(count=4, initial=1, local=1)
    inputs = make_inputs(spec, tokens=[70, 0, 1, 95], dtype=torch.float64)
    r = reference_attention(PARAMETERS, **inputs.arguments())
    assert check_selection(
        PARAMETERS, r.indices, r.counts, r.importance, tolerance=1e-5, cu_seqlens=inputs.cu_seqlens
    ).ok
    assert check_indices(r.indices, r.counts, selection_block=16, cu_seqlens=inputs.cu_seqlens) == ()
    inputs = make_inputs(spec, batch=1, tokens=6, tokens_kv=99, dtype=torch.float64)
    r = reference_attention(PARAMETERS, **inputs.arguments())
    assert check_selection(PARAMETERS, r.indices, r.counts, r.importance, tolerance=1e-5, tokens=99).ok
    assert not check_selection(PARAMETERS, r.indices, r.counts, r.importance, tolerance=1e-5).ok


def test_either_of_two_blocks_within_rounding_error_is_right_but_not_a_worse_one() -> None:
    indices, counts, importance = right_choice()
    row = (0, TOKENS - 1, 0)
    importance[row] = torch.tensor([1, 5, 3, 3 * (1 + 1e-9), 2, 1, 0, 0, 0, 0], dtype=torch.float64)
    for third, shortfall in ((2, 1e-3), (3, 1e-3), (4, 0.3e5)):
        indices[row] = torch.tensor([0, 1, third, 9], dtype=torch.int32)
        result = check(indices, counts, importance)
        assert not result.problems
        assert result.ok == (third != 4) and result.shortfall <= max(1.0, 2 * shortfall)


WRONG = {
    "a forced block is missing": lambda row: row.copy_(torch.tensor([1, 2, 3, 9])),
    "ascending": lambda row: row.copy_(torch.tensor([0, 3, 2, 9])),
    "none twice": lambda row: row.copy_(torch.tensor([0, 2, 2, 9])),
    "future": lambda row: row.copy_(torch.tensor([0, 2, 9, 10])),
    "a slot is empty": lambda row: row.copy_(torch.tensor([0, 2, 9, -1])),
}


@pytest.mark.parametrize("message", WRONG)
def test_each_broken_rule_is_named(message: str) -> None:
    indices, counts, importance = right_choice()
    WRONG[message](indices[1, TOKENS - 1, 1])
    result = check(indices, counts, importance)
    assert not result.ok and any(message in problem for problem in result.problems), result
    assert f"row {2 * TOKENS - 1}, KV head 1" in result.problems[0]


def test_a_wrong_count_and_a_block_beyond_it_are_found() -> None:
    indices, counts, importance = right_choice()
    counts[0, 3, 0] = 2
    indices[0, 17, 1, 2] = 1
    messages = " ".join(check(indices, counts, importance).problems)
    assert "min(n, t // l' + 1)" in messages and "beyond the count" in messages


def test_equal_importances_must_take_the_lower_blocks() -> None:
    indices, counts, importance = right_choice()
    row = (1, TOKENS - 1, 0)
    for value in (0.0, math.nan):
        importance[row] = value
        indices[row] = torch.tensor([0, 1, 2, 9], dtype=torch.int32)
        assert check(indices, counts, importance).ok
        indices[row] = torch.tensor([0, 1, 3, 9], dtype=torch.int32)
        assert any("lower blocks" in problem for problem in check(indices, counts, importance).problems)


def test_two_equal_importances_among_others_must_take_the_lower_block() -> None:
    indices, counts, importance = right_choice()
    row = (1, TOKENS - 1, 0)
    importance[row] = torch.tensor([1, 2, 9, 5, 5, 1, 5, 0, 0, 0], dtype=torch.float64)
    for third, right in ((3, True), (4, False), (6, False)):
        indices[row] = torch.tensor([0, 2, third, 9], dtype=torch.int32)
        assert check(indices, counts, importance).ok == right
    importance[(*row, 3)] *= 1 + 1e-9  # within the rounding of float32, but not equal
    indices[row] = torch.tensor([0, 2, 4, 9], dtype=torch.int32)
    assert check(indices, counts, importance).ok


def test_choosing_nan_over_a_number_is_found() -> None:
    indices, counts, importance = right_choice()
    row = (1, TOKENS - 1, 0)
    importance[row] = torch.tensor([1, math.nan, 3, 2, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    indices[row] = torch.tensor([0, 1, 2, 9], dtype=torch.int32)
    assert not check(indices, counts, importance).ok
    indices[row] = torch.tensor([0, 2, 3, 9], dtype=torch.int32)
    assert check(indices, counts, importance).ok


def test_a_choice_shifted_by_one_row_is_found() -> None:
    indices, counts, importance = right_choice()
    indices[:, 1:] = indices[:, :-1].clone()
    assert not check(indices, counts, importance).ok


def test_check_indices_accepts_random_callers_choices_and_names_each_error() -> None:
    spec = spec_of(indices_given=True, count=4)
    indices = make_inputs(spec, batch=2, tokens=80, seed=1).indices
    assert indices is not None and check_indices(indices, selection_block=16) == ()
    assert (indices == -1).all(-1).any()

    def problems(*row: int, counts: Tensor | None = None) -> str:
        changed = indices.clone()
        changed[1, 70, 0] = torch.tensor(row, dtype=torch.int32)
        return " ".join(check_indices(changed, counts, selection_block=16))

    assert problems(2, 0, -1, 1) == ""
    assert "future" in problems(5, -1, -1, -1)
    assert "twice" in problems(1, -1, 1, -1)
    assert "-1" in problems(-2, 0, 1, 2)
    counts = torch.full(indices.shape[:-1], 2, dtype=torch.int32)
    assert problems(0, 1, 1, 9, counts=counts) == ""
    assert "0..4" in problems(0, 1, 2, 3, counts=counts + 3)


def test_check_indices_refuses_wrong_shapes_and_dtypes() -> None:
    indices = torch.zeros(1, 5, 2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="int32"):
        check_indices(indices.long(), selection_block=16)
    with pytest.raises(ValueError, match="4 dimensions"):
        check_indices(indices[0], selection_block=16)
    with pytest.raises(ValueError, match="counts"):
        check_indices(indices, indices, selection_block=16)


def test_the_lower_of_equal_blocks_must_be_taken_only_where_they_are_equal_term_by_term() -> None:
    indices, counts, importance = right_choice()
    fingerprint = importance.clone()
    row = (0, TOKENS - 1, 0)
    importance[row] = torch.tensor([1, 5, 3, 3, 2, 1, 0, 0, 0, 0], dtype=torch.float64)
    indices[row] = torch.tensor([0, 1, 3, 9], dtype=torch.int32)
    for term, ok in ((7.0, False), (7.5, True)):
        fingerprint[row] = torch.tensor([1, 5, 7, term, 2, 1, 0, 0, 0, 0], dtype=torch.float64)
        found = check_selection(PARAMETERS, indices, counts, importance, tolerance=1e-5, fingerprint=fingerprint)
        assert found.ok == ok, found
