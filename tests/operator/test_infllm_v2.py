"""The shipped infllm_v2_8b, scaled down, beside InfLLM-v2 written from its formulas (arXiv 2509.24663).

The two stages of OpenBMB/infllmv2_cuda_impl in dense form: probabilities of the compressed keys that end at or before
a query, added up over the heads of a KV head and pooled by maxima of five with a stride of four and a padding of one;
then attention to the first block, the local ones, and the best of the others.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nsa_gen.spec import Spec, load_spec
from tests.support import DEVICE, GPU, Operator, operator_of_spec

BLOCK, COUNT, LOCAL = (64, 8, 3) if GPU else (16, 5, 2)
KERNEL, STRIDE = BLOCK // 2, BLOCK // 4
HEADS = {"query": 32, "kv": 2} if GPU else {"query": 4, "kv": 2}
DIM = 128 if GPU else 32
LENGTH = 64 * 12 + 37 if GPU else 16 * 7 + 5


def scaled_down(**changes: object) -> Spec:
    shipped = load_spec("infllm_v2_8b")
    assert shipped.selection is not None and shipped.compression is not None
    selection = {**shipped.selection.model_dump(), "block": BLOCK, "count": COUNT, "local": LOCAL}
    compression = {**shipped.compression.model_dump(), "block": KERNEL, "stride": STRIDE}
    sizes = {"heads": HEADS, "head_dim": DIM, "selection": selection, "compression": compression}
    return shipped.replace(name="small_infllm", **{**sizes, "dtype": "float32", **changes})


def infllm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """InfLLM-v2 of one sequence: q (T, Hq, D), k and v (T, Hkv, D); differentiable."""
    tokens, heads, dim = q.shape
    group = heads // k.shape[1]
    position = torch.arange(tokens, device=q.device)
    own, blocks = position // BLOCK, -(-tokens // BLOCK)
    number = torch.arange(blocks, device=q.device)
    found = []
    for head in range(k.shape[1]):
        mine = q[:, head * group : (head + 1) * group].transpose(0, 1)  # (G, T, D)
        score = torch.zeros(tokens, blocks, dtype=q.dtype, device=q.device)
        if tokens >= KERNEL:
            means = k[:, head].detach().unfold(0, KERNEL, STRIDE).mean(-1)
            end = torch.arange(len(means), device=q.device) * STRIDE + KERNEL
            logits = (mine.detach() @ means.T * dim**-0.5).masked_fill(end > position[:, None] + 1, -torch.inf)
            summed = logits.softmax(-1).nan_to_num(0.0).sum(0)  # of a query that sees no key, none
            # As many compressed keys as all blocks have: those that do not exist have probability 0.
            summed = functional.pad(summed, (0, 4 * blocks - len(means)))
            score = functional.max_pool1d(summed, 5, 4, padding=1)[:, :blocks]
        age = own[:, None] - number
        score = score.masked_fill((number < 1) | (age < LOCAL), torch.inf).masked_fill(age < 0, -torch.inf)
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen.scatter_(1, score.sort(dim=-1, descending=True, stable=True).indices[:, :COUNT], True)
        seen = chosen[:, own] & (position <= position[:, None])
        scores = (mine @ k[:, head].T * dim**-0.5).masked_fill(~seen, -torch.inf)
        found.append((scores.softmax(-1) @ v[:, head]).transpose(0, 1))
    return torch.cat(found, 1)


def inputs(*lead: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(lead))
    heads = (HEADS["query"], HEADS["kv"], HEADS["kv"], HEADS["query"])
    return tuple(torch.randn(*lead, each, DIM, generator=generator).to(DEVICE) for each in heads)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def op() -> Operator:
    return operator_of_spec(scaled_down())


def test_the_shipped_spec_attends_to_selected_blocks_alone_and_scores_by_maxima() -> None:
    spec = load_spec("infllm_v2_8b")
    assert spec.branches == ("slc",) and spec.combine.gate == "none" and spec.scopes == spec.heads.kv == 2
    assert spec.selection is not None and spec.compression is not None
    assert (spec.selection.pool, spec.selection.initial, spec.selection.local) == ("max", 1, 32)
    assert not spec.compression.output and spec.selection.block == 4 * spec.compression.stride


def test_outputs_and_gradients_are_those_of_the_formulas(op: Operator) -> None:
    q, k, v, do = inputs(1, LENGTH)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = op.nsa_attention(*leaves)
    found = torch.autograd.grad(o, leaves, do)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = infllm(*(x[0] for x in exact))[None]
    assert_near(o, expected)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, exact, do.double()), strict=True):
        assert_near(gradient, wanted)


def test_packed_sequences_are_infllm_each(op: Operator) -> None:
    lengths = (BLOCK + 1, 1, 0, 6 * BLOCK + 3, KERNEL - 1)
    q, k, v, _ = inputs(sum(lengths))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    o = op.nsa_attention(q, k, v, cu_seqlens=bounds)
    parts = (x.double().split(lengths) for x in (q, k, v))
    expected = torch.cat([infllm(*part) for part in zip(*parts, strict=True) if len(part[0])])
    assert_near(o, expected)


@pytest.mark.parametrize("page_size", [None, 16])
def test_prefill_and_decode_are_infllm_of_the_whole_sequence(op: Operator, page_size: int | None) -> None:
    q, k, v, _ = inputs(1, LENGTH)
    expected = infllm(*(x[0].double() for x in (q, k, v)))[None]
    cache, at = op.NSACache(1, LENGTH + 8, page_size=page_size, max_new_tokens=2, device=DEVICE), 0
    for count, attend in ((LENGTH - 9, None), (5, op.nsa_prefill), (2, op.nsa_decode), (1, op.nsa_decode)):
        rows = slice(at, at + count)
        cache.extend(count)
        cache.write(k[:, rows], v[:, rows])
        at += count
        if attend is not None:
            assert_near(attend(q[:, rows], cache), expected[:, rows])
