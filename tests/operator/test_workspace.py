"""How many tokens' partial results a call holds at a time, by default and by `workspace_bytes`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nsa_gen.runtime.sizes import LEAST_WORKSPACE, MOST_WORKSPACE, workspace_of
from nsa_gen.verification.calls import arguments_of
from tests.support import DEVICE, inputs_of, operator_of, operator_of_spec, small_spec


def chunk_tokens(op: Any, tokens: int, workspace_bytes: int | None = None, target: str = "sm_90") -> int:
    """What a call of so many tokens agrees on, on a GPU of `target`."""
    spec = op.spec
    q = torch.empty(1, tokens, spec.heads.query, spec.head_dim.qk, dtype=torch.bfloat16, device="meta")
    attention, sequences = op.module.kernels.selected_attention, op.module.runtime.sequences
    with op.configs.use_target(target):
        return attention.most_chunk_tokens(q, sequences.Sequences(1, tokens, tokens), workspace_bytes)


def slot_bytes(op: Any, tokens: int, target: str = "sm_90") -> int:
    """Bytes of parts that a slot leaves in the pass where it leaves more of them."""
    spec, table = op.spec, op.configs.DEFAULTS[target]
    dq = spec.selection.block // table["selected_backward_dkdv"]["KEY_BLOCK"] * spec.heads.group * spec.head_dim.qk * 2
    pieces = 4 * spec.selection.block * (spec.head_dim.qk + spec.head_dim.v)
    return dq + -(-pieces // table["selected_backward_dkdv"]["PIECE"])


LARGE = small_spec(
    group=4, kv_heads=4, dims=(128, 128), dtype="bfloat16", compression=(32, 16), block=64, count=16, window=512
)


def test_the_default_is_nine_times_q_within_bounds() -> None:
    q = torch.empty(1, 2**14, 32, 128, dtype=torch.bfloat16, device="meta")
    assert workspace_of(q) == 9 * 2**27
    assert workspace_of(q[:, :100]) == LEAST_WORKSPACE == 320 * 2**20
    assert workspace_of(q.expand(64, -1, -1, -1)) == MOST_WORKSPACE == 1920 * 2**20
    assert workspace_of(q, 12345) == 12345


@pytest.mark.parametrize("workspace_bytes", [2**25, 2**28, 2**30])
def test_a_chunks_parts_fit_what_was_asked_for_with_less_than_a_token_to_spare(workspace_bytes: int) -> None:
    op = operator_of_spec(LARGE)
    token = slot_bytes(op, 2**17) * 4 * 16
    found = chunk_tokens(op, 2**17, workspace_bytes)
    assert found * token <= workspace_bytes < (found + 1) * token


def test_a_chunk_has_64_tokens_at_least_and_those_of_the_schedule_at_most() -> None:
    op = operator_of_spec(LARGE)
    assert chunk_tokens(op, 2**17, 1) == 64
    with op.configs.override("selected_attention", CHUNK_TOKENS=48):
        assert chunk_tokens(op, 2**17, 2**40) == 48


def test_a_call_and_a_layer_pass_on_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    op = operator_of(count=2)
    asked: list[Any] = []

    def most_chunk_tokens(q: torch.Tensor, sequences: Any, workspace_bytes: int | None = None) -> int:
        asked.append(workspace_bytes)
        return 64

    monkeypatch.setattr(op.module.operator, "most_chunk_tokens", most_chunk_tokens)
    call(op, 2**20)
    op.module.NativeSparseAttention(8, workspace_bytes=2**21, device=DEVICE)(torch.zeros(1, 3, 8, device=DEVICE))
    assert asked == [2**20, 2**21]


def call(op: Any, workspace_bytes: Any) -> None:
    _, positional, named = arguments_of(op.module, inputs_of(op, 3), False)
    op.module.nsa_attention(*positional, **named, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0, ValueError, "workspace_bytes: expected at least 1, got 0"),
        (True, TypeError, "workspace_bytes: expected an int or None, got bool"),
        (2.0**28, TypeError, "workspace_bytes: expected an int or None, got float"),
        ("1 GiB", TypeError, "workspace_bytes: expected an int or None, got str"),
    ],
    ids=str,
)
def test_budgets_that_are_none_are_refused(value: Any, error: type[Exception], text: str) -> None:
    op = operator_of(count=2)
    with pytest.raises(error, match=f"^{text}"):
        call(op, value)
    with pytest.raises(error, match=f"^{text}"):
        op.module.NativeSparseAttention(8, workspace_bytes=value)


def test_compiled_code_has_the_chunks_of_each_length_without_being_compiled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op = operator_of(count=2)
    attention, sequences = op.module.kernels.selected_attention, op.module.runtime.sequences.Sequences
    monkeypatch.setattr(op.module.runtime.sizes, "LEAST_WORKSPACE", 1)
    monkeypatch.setattr(attention, "FEWEST_CHUNK_TOKENS", 1)
    counter = CompileCounter()

    def scaled(q: torch.Tensor) -> torch.Tensor:
        return q * attention.most_chunk_tokens(q, sequences(1, q.shape[1], q.shape[1]))

    compiled = torch.compile(scaled, backend=counter, dynamic=True, fullgraph=True)
    found = set()
    with op.configs.override("selected_attention", CHUNK_TOKENS=4096):
        for tokens in (40, 80, 120):
            q = torch.ones(1, tokens, op.spec.heads.query, op.spec.head_dim.qk)
            assert torch.equal(compiled(q), scaled(q))
            found.add(int(scaled(q).max()))
    assert len(found) == 3 and counter.frame_count == 1
