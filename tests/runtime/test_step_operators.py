"""Steps as operators of their own, with plain torch in place of launches."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch

from nsa_gen.runtime.registration import Library, Output
from nsa_gen.runtime.sequences import Sequences
from nsa_gen.runtime.step_operators import StepOperators

NUMBERS = itertools.count()
Q, K, V = torch.randn(1, 6, 2, 4), torch.randn(1, 6, 2, 4), torch.randn(1, 6, 2, 3)
ENDS = torch.tensor([0, 2, 6], dtype=torch.int32)


class Steps:
    """Operators whose launches are kept with what they were given."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Any, ...]] = {}
        self.padded: list[str] = []
        self.library = Library(f"tests_steps_{next(NUMBERS)}", lambda device, bucket: contextlib.nullcontext())
        self.steps = StepOperators(
            self.library,
            {"Hq": 2, "Hkv": 2, "Dk": 4, "Dv": 3, "S": 2, "n": 5},
            {"Nc": lambda _, x: x.compressed_rows(2, 2), "slots": lambda q, x: 7 * x.tokens_kv},
            self.pad,
            self.pad,
            lambda do, o: (do * o).sum(-1).float(),
        )

    def pad(self, sequences: Sequences, **tensors: torch.Tensor) -> None:
        self.padded += tensors

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
        self.calls["forward"] = given
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k)
        lse = weights.logsumexp(-1).mT.contiguous()
        index = q.new_ones(42, dtype=torch.int32)
        return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v), lse, index, index

    def backward(self, *given: Any) -> None:
        self.calls["backward"] = given
        at = next(i for i, x in enumerate(given) if isinstance(x, Sequences))
        for x, value in zip(given[at - 3 : at], (1, 2, 3), strict=True):
            x.add_(value) if x.dtype == torch.float32 and value > 1 else x.fill_(value)


@pytest.fixture
def made() -> Steps:
    return Steps()


def leaves(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [x.to(dtype, copy=True).requires_grad_() for x in (Q, K, V)]


def test_attention_alone_hands_launches_what_they_take_and_pads_by_name(made: Steps) -> None:
    inputs = ("q", "k", "v", "indices", "counts?", "cu_seqlens?", "chunk_tokens:int")
    index = ("sorted_keys", "sorted_slots")
    pads = ("o_slc", "lse_slc")
    declared = made.steps.attend("slc", inputs, made.forward, made.backward, pads=pads, index=index, adds=True)
    assert (declared.saved, declared.gradients) == (("o", "lse", *index), ("q", "k", "v"))
    q, k, v = leaves(torch.float16)
    indices = torch.zeros(1, 6, 2, 5, dtype=torch.int32)
    o, lse, *found = made.library.call("slc", q, k, v, indices, None, ENDS, 64)
    assert len(found) == 2 and made.padded == list(pads)
    given = made.calls["forward"]
    assert given[0] is indices and given[1] is None and given[2] == Sequences(1, 6, 6, ENDS) and given[3] == 64
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    assert made.padded == [*pads, "dq"]
    # Gradients of keys and values begin with zero, in float32, and are rounded once.
    assert [x.dtype for x in (dq, dk, dv)] == [torch.float16] * 3
    assert (dq.eq(1).all(), dk.eq(2).all(), dv.eq(3).all()) == (True, True, True)
    *_, lists, gradient, _dq, dk_sum, _dv, sequences, chunk = made.calls["backward"]
    do, row_lse, delta, gate = gradient
    assert lists[0] is indices and lists[1] is None and len(lists) == 4
    assert dk_sum.dtype == torch.float32 and (gate, chunk) == (None, 64) and sequences.packed
    torch.testing.assert_close(delta, (do * o).sum(-1).float())
    assert torch.equal(row_lse, lse)


def test_compressed_attention_counts_the_tokens_that_its_keys_stand_for_and_clears_gaps(made: Steps) -> None:
    inputs = ("q", "k_cmp", "v_cmp", "tokens:int", "cu_seqlens?")
    pads = ("o_cmp", "lse_cmp")
    made.steps.attend("cmp", inputs, made.forward, made.backward, pads=pads, has_gaps=True)
    q, k, v = leaves()
    o = made.library.call("cmp", q, k, v, 90, None)[0]
    assert made.calls["forward"] == (Sequences(1, 6, 90, None),) and made.padded == []
    (packed,) = (made.library.call("cmp", q, k, v, 6, ENDS)[0],)
    dk, dv = torch.autograd.grad(packed, (k, v), torch.ones_like(o))
    assert (dk.eq(2).all(), dv.eq(3).all()) == (True, True)
    assert made.padded == [*pads, "dq"]


def test_without_a_backward_nothing_is_saved_and_a_gradient_is_refused(made: Steps) -> None:
    declared = made.steps.attend("win", ("q", "k", "v", "cu_seqlens?"), made.forward, pads=("o", "lse_win"))
    assert (declared.saved, declared.gradients) == ((), ())
    q, k, v = leaves()
    with pytest.raises(NotImplementedError, match="no gradient"):
        made.library.call("win", q, k, v, None)[0].sum().backward()


def test_outputs_without_values_have_the_sizes_that_are_declared(made: Steps) -> None:
    outputs = (Output("k_cmp", "B Nc Hkv Dk"), Output("v_cmp", "B Nc Hkv Dv"), Output("hidden", "B Nc Hkv 11"))
    made.steps.compress(None, (), outputs, made.forward)
    k, v = torch.empty(2, 9, 2, 4, device="meta", dtype=torch.float16), torch.empty(2, 9, 2, 3, device="meta")
    fake = made.steps._fake_of(made.steps.select("select", ("q", "k_cmp", "tokens:int", "cu_seqlens?"), made.forward))
    indices, counts = fake(torch.empty(2, 9, 4, 4, device="meta"), k, 30, None)
    assert (indices.shape, counts.shape, indices.dtype) == ((2, 9, 2, 5), (2, 9, 2), torch.int32)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = made.library.operator("compress")(mode.from_tensor(k), mode.from_tensor(v), None)
    assert [tuple(x.shape) for x in found] == [(2, 4, 2, 4), (2, 4, 2, 3), (2, 4, 2, 11)]
    assert {x.dtype for x in found} == {torch.float16}


@pytest.mark.parametrize("gate", ["sigmoid", "given", "none"])
def test_the_combinations_gradients_are_autograds(made: Steps, gate: str) -> None:
    def weights(gates: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(gates) if gate == "sigmoid" else gates

    def forward(*given: torch.Tensor) -> torch.Tensor:
        if gate == "none":
            return given[0] + given[1]
        return given[0] * weights(given[2])[..., 0, None] + given[1] * weights(given[2])[..., 1, None]

    def backward(do: torch.Tensor, *given: torch.Tensor) -> tuple[None, torch.Tensor]:
        *others, gates = (x.detach().requires_grad_() for x in given)
        with torch.enable_grad():
            return None, torch.autograd.grad(forward(*others, gates), gates, do)[0]

    inputs = ("o_cmp", "o_win", "gates")[: 2 if gate == "none" else 3]
    made.steps.combine(inputs, gate, forward, backward)
    given = [torch.randn(1, 6, 2, n, requires_grad=True) for n in (3, 3, 2)][: len(inputs)]
    do = torch.randn(1, 6, 2, 3)
    expected = torch.autograd.grad(forward(*given), given, do)
    torch.testing.assert_close(torch.autograd.grad(made.library.call("combine", *given), given, do), expected)
