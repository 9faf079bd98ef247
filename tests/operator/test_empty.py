"""Nothing to do: no batch, no tokens, no sequences."""

from __future__ import annotations

import pytest
import torch

from tests.support import DEVICE, call, call_with_gradients, inputs_of, operator_of

CASES = {
    "the whole": {"count": 2, "phi": "mlp", "position": ("learned", "none")},
    "external": {"branches": "cmp slc", "phi": "external", "indices": "input", "count": 2},
    "window": {"branches": "win", "gate": "none"},
    "selection": {"branches": "slc", "indices": "input", "gate": "none"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tokens", "batch"), [(5, 0), (0, 2), (0, 0), ((0,), 1), ((0, 0), 1), ((), 1)], ids=str)
def test_empty_calls_give_empty_outputs_and_zero_gradients(case: str, tokens: int | tuple, batch: int) -> None:
    op = operator_of(**CASES[case])
    inputs = inputs_of(op, tokens, batch=batch)
    found = call_with_gradients(op, inputs)
    assert found["o"].shape == (*inputs.q.shape[:-1], 16) and found["o"].numel() == 0
    for name, x in inputs.differentiable().items():
        gradient = found[f"d{name}"]
        assert gradient.shape == x.shape and gradient.dtype == x.dtype and not gradient.any(), name


def test_no_queries_of_many_keys_give_nothing_and_zero_gradients() -> None:
    op = operator_of(count=2, gate="none")
    inputs = inputs_of(op, 0, tokens_kv=20)
    found = call_with_gradients(op, inputs)
    assert found["o"].shape == (1, 0, 2, 16)
    assert found["dk"].shape == (1, 20, 1, 16) and not found["dk"].any() and not found["dv"].any()


def test_empty_steps_give_empty_results() -> None:
    op = operator_of(count=2)
    q, k, v = (torch.empty(0, 7, h, 16, device=DEVICE) for h in (2, 1, 1))
    k_cmp, v_cmp = op.compress(k, v)
    o, lse = op.compressed_attention(q, k_cmp, v_cmp)
    indices, counts = op.select_blocks(q, k_cmp, lse)
    assert op.selected_attention(q, k, v, indices, counts)[0].shape == q.shape
    assert op.window_attention(q, k, v)[1].shape == q.shape[:3]
    gates = torch.empty(0, 7, 2, 3, device=DEVICE)
    assert op.combine((o, o, o), gates).shape == q.shape


def test_a_call_without_gradients_records_none() -> None:
    op = operator_of("win", gate="none")
    inputs = inputs_of(op, 3)
    inputs.q.requires_grad_()
    with torch.no_grad():
        assert not call(op, inputs).requires_grad
