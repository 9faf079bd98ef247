"""The shipped moba_llama3_8b, scaled down, beside MoBA written from its paper's formulas (arXiv 2502.13189, section 2).

For each query head alone: block i is scored by s_i = <q, mean(K[I_i])>, later blocks by -inf, the query's own by +inf;
the top k of them are attended to with one softmax, causal inside the own block.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_gen.spec import Spec, load_spec
from tests.support import DEVICE, GPU, Operator, operator_of_spec

BLOCK, TOP = (64, 4) if GPU else (16, 3)
HEADS = {"query": 8, "kv": 2} if GPU else {"query": 4, "kv": 2}
LENGTH = 64 * 9 + 5 if GPU else 16 * 5 + 3


def scaled_down(**changes: object) -> Spec:
    shipped = load_spec("moba_llama3_8b")
    assert shipped.selection is not None
    selection = {**shipped.selection.model_dump(), "block": BLOCK, "count": TOP}
    return shipped.replace(name="small_moba", heads=HEADS, selection=selection, **{"dtype": "float32", **changes})


def moba(q: Tensor, k: Tensor, v: Tensor, block: int, top: int) -> Tensor:
    """MoBA of one sequence: q (T, Hq, D), k and v (T, Hkv, D); differentiable, one head at a time."""
    tokens, heads, dim = q.shape
    group = heads // k.shape[1]
    position = torch.arange(tokens, device=q.device)
    own = position // block
    found = []
    for head in range(heads):
        keys, values = k[:, head // group], v[:, head // group]
        means = torch.stack([piece.mean(0) for piece in keys.detach().split(block)])
        number = torch.arange(len(means), device=q.device)
        gate = (q[:, head].detach() @ means.T).masked_fill(number > own[:, None], -torch.inf)  # (T, blocks)
        gate = gate.masked_fill(number == own[:, None], torch.inf)
        chosen = torch.zeros_like(gate, dtype=torch.bool)
        chosen.scatter_(1, gate.topk(min(top, len(means))).indices, True)
        seen = chosen[:, own] & (position <= position[:, None])
        scores = (q[:, head] @ keys.T * dim**-0.5).masked_fill(~seen, -torch.inf)
        found.append(scores.softmax(-1) @ values)
    return torch.stack(found, 1)


def inputs(*lead: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(lead))
    heads = (HEADS["query"], HEADS["kv"], HEADS["kv"], HEADS["query"])
    return tuple(torch.randn(*lead, each, 128, generator=generator).to(DEVICE) for each in heads)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def op() -> Operator:
    return operator_of_spec(scaled_down())


def test_the_shipped_spec_is_moba_alone() -> None:
    spec = load_spec("moba_llama3_8b")
    assert spec.branches == ("slc",) and spec.combine.gate == "none" and spec.scopes == spec.heads.query
    assert spec.selection is not None
    assert (spec.selection.scores, spec.selection.initial, spec.selection.local) == ("mean", 0, 1)


def test_outputs_and_gradients_are_those_of_the_formulas(op: Operator) -> None:
    q, k, v, do = inputs(1, LENGTH)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = op.nsa_attention(*leaves)
    found = torch.autograd.grad(o, leaves, do)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = moba(*(x[0] for x in exact), BLOCK, TOP)[None]
    assert_near(o, expected)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, exact, do.double()), strict=True):
        assert_near(gradient, wanted)


def test_packed_sequences_are_moba_each(op: Operator) -> None:
    lengths = (BLOCK + 1, 1, 0, 3 * BLOCK + 7)
    q, k, v, _ = inputs(sum(lengths))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    o = op.nsa_attention(q, k, v, cu_seqlens=bounds)
    parts = (x.double().split(lengths) for x in (q, k, v))
    expected = torch.cat([moba(*part, BLOCK, TOP) for part in zip(*parts, strict=True) if len(part[0])])
    assert_near(o, expected)


@pytest.mark.parametrize("page_size", [None, 16])
def test_prefill_and_decode_are_moba_of_the_whole_sequence(op: Operator, page_size: int | None) -> None:
    q, k, v, _ = inputs(1, LENGTH)
    expected = moba(*(x[0].double() for x in (q, k, v)), BLOCK, TOP)[None]
    cache, at = op.NSACache(1, LENGTH + 8, page_size=page_size, max_new_tokens=2, device=DEVICE), 0
    for count, attend in ((LENGTH - 9, None), (5, op.nsa_prefill), (2, op.nsa_decode), (1, op.nsa_decode)):
        rows = slice(at, at + count)
        cache.extend(count)
        cache.write(k[:, rows], v[:, rows])
        at += count
        if attend is not None:
            assert_near(attend(q[:, rows], cache), expected[:, rows])
