"""Checks of a package's arguments: what passes, and what an error says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from nsa_gen.runtime.arguments import Arguments, check_cu_seqlens, refuse, with_batch_dim

CHECKS = Arguments(
    torch.float32,
    ("cmp", "win"),
    {"Hq": 4, "Hkv": 2, "Dk": 16, "Dv": 8, "S": 2},
    compression=(8, 4),
    selected=3,
    parameters={"key_weight": ("Hkv", 8)},
)
Q, K, V = torch.zeros(2, 5, 4, 16), torch.zeros(2, 9, 2, 16), torch.zeros(2, 9, 2, 8)
ENDS = torch.tensor([0, 5], dtype=torch.int32)


def test_a_call_like_one_that_passed_is_known_and_another_is_not() -> None:
    checks = Arguments(torch.float32, (), {})
    seen = checks.signature(None, Q, None, K)
    assert not checks.is_accepted(seen)
    checks.accept(seen)
    assert checks.is_accepted(checks.signature(None, torch.ones_like(Q), None, K.clone()))
    assert not checks.is_accepted(checks.signature(None, Q[:1], None, K))
    assert not checks.is_accepted(checks.signature(None, Q.mT.contiguous().mT, None, K)), "strides count"
    assert checks.signature(None, Q.half()) is None and checks.signature(None, ENDS) is None
    assert not checks.is_accepted(None)


def test_a_packed_call_is_known_unless_the_values_of_its_bounds_are_to_be_checked() -> None:
    checks = Arguments(torch.float32, (), {})
    bounds = ENDS.to("meta")
    checks.accept(checks.signature(bounds, Q[0]))
    assert checks.is_accepted(checks.signature(bounds.clone(), Q[1]))
    for other in (bounds[:1], torch.empty(4, dtype=torch.int32, device="meta")[::2], bounds.long(), None):
        assert not checks.is_accepted(checks.signature(other, Q[0]))
    assert checks.signature(ENDS, Q[0]) is None
    assert [x.shape for x in with_batch_dim(Q[0], K[0])] == [(1, *Q[0].shape), (1, *K[0].shape)]


def test_what_fits_passes_and_packed_tensors_get_a_batch_dim() -> None:
    assert CHECKS.check_query("q", Q, None) is Q
    assert CHECKS.check_query("q", Q[0], ENDS).shape == (1, 5, 4, 16)
    assert CHECKS.check_keys("k", K, "v", V, Q, None) == (K, V)
    assert CHECKS.check_compressed("k_cmp", torch.zeros(2, 1, 2, 16), "Dk", 9, Q, None).shape == (2, 1, 2, 16)
    assert CHECKS.check_compressed("k_cmp", torch.zeros(1, 2, 16), "Dk", 5, Q[:1], ENDS).shape == (1, 1, 2, 16)
    (weight,) = CHECKS.check_parameters((torch.zeros(4, 8)[::2],), Q)
    assert weight.is_contiguous()


@pytest.mark.parametrize(
    ("check", "given", "error", "message"),
    [
        ("check_query", ("q", "x", None), TypeError, "q: expected a torch.Tensor, got str 'x'"),
        ("check_query", ("q", Q[0], None), ValueError, "q: expected (B, T, H, D), got shape (5, 4, 16)"),
        ("check_keys", ("k", K, "v", V[:, :8], Q, None), ValueError, "v: expected shape (B=2, T=9, Hkv=2, Dv=8), got"),
        ("check_keys", ("k", K[:, :4], "v", V, Q, None), ValueError, "k: expected at least as many tokens as q's 5"),
        ("check_keys", ("k", K, "v", V, Q, None, 8), ValueError, "k: expected Tkv=8 tokens, as k, got 9"),
        ("check_keys", ("k", K.half(), "v", V, Q, None), TypeError, "k: expected dtype torch.float32, which this pack"),
        ("check_keys", ("k", K.mT.contiguous().mT, "v", V, Q, None), ValueError, "k: expected a contiguous last dim"),
        (
            "check_gates",
            (None, Q, False),
            TypeError,
            "gates: expected logits of shape (B, Tq, Hq, 2) in the order cm",
        ),
        (
            "check_gates",
            (torch.zeros(2, 5, 4, 3), Q, False),
            ValueError,
            "gates: expected shape (B=2, Tq=5, Hq=4, br",
        ),
        ("check_selection", (torch.zeros(2, 5, 2, 3), None, Q, None), TypeError, "indices: expected dtype torch.int32"),
        ("check_parameters", (None, Q), TypeError, "compression: expected CompressionParameters(key_weight), got None"),
        ("check_parameters", ((Q,), Q), ValueError, "compression.key_weight: expected shape (Hkv=2, 8), got"),
        ("check_recompute", (("cmp", "slc"),), ValueError, "recompute: expected some of cmp, win in a tuple, got"),
        ("check_recompute", ("cmp",), ValueError, "recompute: expected some of cmp, win in a tuple, got 'cmp'"),
    ],
)
def test_an_error_names_the_argument_what_was_expected_and_what_came(
    check: str, given: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        getattr(CHECKS, check)(*given)


def test_branches_to_recompute_are_named_in_their_order() -> None:
    assert CHECKS.check_recompute(()) == ""
    assert CHECKS.check_recompute(["win", "cmp"]) == "cmp win"


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (torch.tensor([0, 5]), "expected dtype torch.int32, got torch.int64"),
        (torch.tensor([[0, 5]], dtype=torch.int32), "expected shape (N + 1,), beginning with 0, got (1, 2)"),
        (torch.tensor([0], dtype=torch.int32), "expected the bounds of a sequence at least for 5 tokens"),
        (
            torch.tensor([0, 4, 3], dtype=torch.int32),
            "expected bounds rising from 0 to at most T_total=5, got [0, 4, 3",
        ),
        (torch.tensor([0, 6], dtype=torch.int32), "expected bounds rising from 0 to at most T_total=5, got [0, 6]"),
    ],
)
def test_bounds_of_packed_sequences_rise_from_zero_within_the_batch(bounds: torch.Tensor, message: str) -> None:
    check_cu_seqlens(ENDS, 6, ENDS.device)
    with pytest.raises((TypeError, ValueError), match=f"^cu_seqlens: {re.escape(message)}"):
        check_cu_seqlens(bounds, 5, bounds.device)


def test_autocast_to_the_packages_dtype_casts_and_to_another_does_not() -> None:
    checks = Arguments(torch.bfloat16, (), {"Hkv": 2, "Dk": 16})
    with torch.autocast("cpu", torch.bfloat16):
        assert checks.autocasted(K).dtype == torch.bfloat16 and checks.autocasted(ENDS) is ENDS
    with torch.autocast("cpu", torch.float16):
        assert checks.autocasted(K) is K


def test_an_argument_that_a_spec_has_no_use_for_is_refused() -> None:
    refuse(gates=None)
    with pytest.raises(TypeError, match=r"gates: expected None, .* got a tensor of shape \(2, 5, 4, 16\)"):
        refuse(gates=Q)
