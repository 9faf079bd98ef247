"""Rows behind the last packed sequence: whatever they hold, outputs and gradients have nothing there."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.verification.calls import poisoned_memory
from nsa_gen.verification.cases import Case
from nsa_gen.verification.properties import PROPERTIES, Trial
from nsa_gen.verification.relations import padded
from tests.support import DEVICE, Operator, inputs_of, operator_of

SPECS: dict[str, dict[str, Any]] = {
    "whole": {"count": 2, "kv_heads": 2},
    "linear, branches apart": {"phi": "linear", "position": ("learned", "none"), "kv": "per_branch", "gate": "given"},
    "mlp": {"branches": "cmp win", "phi": "mlp", "gate": "none"},
    "all given": {"phi": "external", "indices": "input", "kv": "per_branch", "count": 2},
    "compressed alone": {"branches": "cmp", "gate": "none"},
    "selected alone": {"branches": "slc", "indices": "input", "gate": "none"},
    "window alone": {"branches": "win", "gate": "none"},
    "forward alone": {"branches": "cmp slc", "passes": ("forward",)},
}
SCHEDULES: dict[str, dict[str, int]] = {
    "defaults": {},
    "token by token": {"KEY_MAJOR_FORWARD": 0, "KEY_MAJOR_DQ": 0},
    "dq token by token": {"KEY_MAJOR_DQ": 0},
    "local blocks in the window": {"LOCAL_IN_WINDOW": 1},
}


def wrong_of(op: Operator, lengths: tuple[int, ...]) -> list[str]:
    case = Case(lengths, batch=1, twice=False)
    rows = PROPERTIES["padded"].check(Trial(op.spec, op.module, case, 3, DEVICE.type))
    assert any(row.quantity == "padding" for row in rows)
    return [f"{row.quantity}: {row.problem or row.error}" for row in rows if not row.ok]


@pytest.mark.parametrize("name", SPECS)
def test_a_padded_batch_gives_what_it_gives_without_padding_and_nothing_for_the_padding(name: str) -> None:
    assert wrong_of(operator_of(**SPECS[name]), (3, 0, 10)) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_padding_is_nothing_by_every_schedule_of_selection(schedule: str) -> None:
    op = operator_of(count=4, local=2, window=40)
    values = SCHEDULES[schedule]
    with op.configs.override("selected_attention", **values) if values else nullcontext():
        assert wrong_of(op, (4, 9)) == []


@pytest.mark.parametrize("lengths", [(5, 0, 0), (0, 0, 16), (1,)], ids=str)
def test_sequences_of_no_tokens_may_lie_before_the_padding(lengths: tuple[int, ...]) -> None:
    assert wrong_of(operator_of("slc win", indices="input", gate="none"), lengths) == []


def test_a_batch_of_nothing_but_padding_gives_nothing() -> None:
    op = operator_of(count=2)
    inputs = padded(op.parameters, inputs_of(op, (0, 0)), 21)
    leaves = {name: x.requires_grad_() for name, x in inputs.differentiable().items()}
    given = {name: x for name, x in inputs.arguments().items() if x is not None}
    with poisoned_memory():
        o, aux = op.nsa_attention(**given, return_aux=True)
        gradients = torch.autograd.grad(o, list(leaves.values()), torch.full_like(o, torch.nan))
    assert all(x.shape[0] == 21 and not x.any() for x in (o, *gradients))
    assert (aux.indices == -1).all() and not aux.counts.any() and (aux.lse_slc == -torch.inf).all()


def nothing(x: Tensor) -> bool:
    return bool((x[-21:] == 0).all())


def test_the_steps_give_nothing_for_padding_either() -> None:
    op = operator_of(count=2)
    inputs = padded(op.parameters, inputs_of(op, (9, 11), seed=2), 21)
    packed = {"cu_seqlens": inputs.cu_seqlens}
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))

    def differentiated(o: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(o, leaves, torch.full_like(o, torch.nan).index_fill(0, inside, 1.0))
        assert all(x[:20].isfinite().all() for x in found)
        return found

    inside = torch.arange(20, device=DEVICE)
    with poisoned_memory():
        k_cmp, v_cmp = op.compress(k, v, **packed)
        assert not k_cmp[5:].any() and not v_cmp[5:].any()
        dk_cmp = torch.ones_like(k_cmp).index_fill(0, torch.arange(5, k_cmp.shape[0], device=DEVICE), torch.nan)
        assert all(map(nothing, torch.autograd.grad((k_cmp, v_cmp), (k, v), (dk_cmp, dk_cmp))))
        k_cmp, v_cmp = (x.detach().requires_grad_() for x in (k_cmp, v_cmp))
        o, lse = op.compressed_attention(q, k_cmp, v_cmp, **packed)
        assert nothing(o) and (lse[-21:] == -torch.inf).all()
        dq, dk_cmp, dv_cmp = differentiated(o, q, k_cmp, v_cmp)
        assert nothing(dq) and not dk_cmp[5:].any() and not dv_cmp[5:].any()
        indices, counts = op.select_blocks(q, k_cmp, lse, **packed)
        assert (indices[-21:] == -1).all() and not counts[-21:].any()
        for attend in (
            lambda: op.selected_attention(q, k, v, indices.clamp(min=0), counts, **packed),
            lambda: op.window_attention(q, k, v, **packed),
        ):
            o, lse = attend()
            assert nothing(o) and (lse[-21:] == -torch.inf).all()
            assert all(map(nothing, differentiated(o, q, k, v)))


def test_bounds_without_a_sequence_are_refused_where_there_are_tokens() -> None:
    op = operator_of("win", gate="none")
    inputs = inputs_of(op, (4,))
    bounds = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected the bounds of a sequence at least for 4 tokens"):
        op.nsa_attention(inputs.q, inputs.k, inputs.v, cu_seqlens=bounds)
