"""Who shares a choice of blocks, and how compressed probabilities become a block's importance.

Choices are compared with a naive version that looks at one token and block at a time, outputs and gradients with the
dense oracle, and scopes with each other where they must agree.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_gen.spec import Spec
from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.schedules import Variation
from tests.support import (
    DEVICE,
    Operator,
    assert_matches_oracle,
    call,
    call_with_gradients,
    inputs_of,
    operator_of,
    operator_of_spec,
    set_constants,
    small_spec,
)

SCOPES = ("group", "head", "all")
#: Groups of three heads on two KV heads: 2, 6 or 1 choices a token.
HEADS = {"group": 3, "kv_heads": 2}
LISTS = {"group": 2, "head": 6, "all": 1}
RANDOM = torch.Generator().manual_seed(11)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM).to(DEVICE)


def heads_of(scope: str) -> list[list[int]]:
    """The query heads of each scope."""
    return {"group": [[0, 1, 2], [3, 4, 5]], "head": [[h] for h in range(6)], "all": [list(range(6))]}[scope]


def best(scores: dict[int, float], own: int, count: int) -> list[int]:
    """The own block and the best others, ties to the lower."""
    ranked = sorted((j for j in scores if j != own), key=lambda j: (-scores[j], j))
    return sorted([own, *ranked[: count - 1]])


def padded(blocks: list[int], count: int) -> list[int]:
    return blocks + [-1] * (count - len(blocks))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_heads_of_a_scope_choose_together_by_mean_keys(scope: str) -> None:
    op = operator_of("slc", gate="none", scores="mean", scope=scope, initial=0, dims=(24, 16), **HEADS)
    q, k = draw(1, 9, 6, 24), draw(1, 16 * 7 + 5, 2, 24)
    indices, counts = op.select_blocks(q, k)
    assert indices.shape == (1, 9, LISTS[scope], 3) and counts.shape == (1, 9, LISTS[scope])
    means = k[0].double().cpu()[: 16 * 7].unflatten(0, (7, 16)).mean(1)
    for row, (number, heads) in itertools.product(range(9), enumerate(heads_of(scope))):
        own = (16 * 7 + 5 - 9 + row) // 16
        scores = {j: sum(float(q[0, row, h].double().cpu() @ means[j, h // 3]) for h in heads) for j in range(own)}
        assert indices[0, row, number].tolist() == padded(best(scores, own, 3), 3)


@pytest.mark.parametrize("pool", ["sum", "max"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("compression", [(8, 4), (16, 16), (4, 4)], ids=str)
def test_importance_is_the_sum_over_a_scope_and_then_the_sum_or_the_maximum_over_blocks(
    compression: tuple[int, int], scope: str, pool: str
) -> None:
    """One token and block at a time: block j sees compressed block i by the tokens that they have in common."""
    op = operator_of("cmp slc", gate="none", scope=scope, pool=pool, initial=0, compression=compression, **HEADS)
    size, stride = compression
    tokens = 16 * 6 + 3
    q, k, v = draw(1, 7, 6, 16), draw(1, tokens, 2, 16), draw(1, tokens, 2, 16)
    _, aux = op.nsa_attention(q, k, v, return_aux=True)
    keys = k[0].double().cpu().unfold(0, size, stride).mean(-1)  # (Nc, 2, 16)
    for row in range(7):
        t = tokens - 7 + row
        seen = [i for i in range(keys.shape[0]) if i * stride + size - 1 <= t]
        p = [torch.softmax(0.25 * keys[seen, h // 3] @ q[0, row, h].double().cpu(), 0) for h in range(6)]
        for number, heads in enumerate(heads_of(scope)):
            summed = sum(p[h] for h in heads)
            scores = {}
            for j in range(t // 16 + 1):
                common = [len({*range(i * stride, i * stride + size)} & {*range(16 * j, 16 * j + 16)}) for i in seen]
                terms = [float(summed[i]) * (c / stride if pool == "sum" else c > 0) for i, c in enumerate(common)]
                scores[j] = sum(terms) if pool == "sum" else max(terms, default=0.0)
            assert aux.indices[0, row, number].tolist() == padded(best(scores, t // 16, 3), 3)


def specs() -> dict[str, Spec]:
    found = {}
    for scope in SCOPES[1:]:
        found[f"mean, {scope}"] = small_spec("slc", gate="none", scores="mean", scope=scope, dims=(24, 40), **HEADS)
        found[f"mean with a window, {scope}"] = small_spec("slc win", scores="mean", scope=scope, window=33, **HEADS)
        found[f"compression, {scope}"] = small_spec(scope=scope, kv="per_branch", **HEADS)
        found[f"maxima, {scope}"] = small_spec("cmp slc", scope=scope, pool="max", dtype="float16", **HEADS)
        found[f"given, {scope}"] = small_spec("slc", gate="given", scope=scope, indices="input", count=2, **HEADS)
    found["maxima, group"] = small_spec(pool="max", gate="none", initial=0, **HEADS)
    return found


SPECS = specs()


@pytest.mark.parametrize("name", SPECS)
def test_outputs_and_gradients_are_the_oracles_batched_and_packed(name: str) -> None:
    op = operator_of_spec(SPECS[name])
    assert_matches_oracle(op, 4, tokens_kv=4 * 16 + 6, seed=4)
    assert_matches_oracle(op, (5, 0, 3 * 16 + 2, 1), gradients=False, seed=5)


@pytest.mark.parametrize("name", ["mean, head", "compression, head", "given, all"])
def test_every_schedule_agrees(name: str) -> None:
    op = operator_of_spec(SPECS[name])
    inputs = inputs_of(op, 4, tokens_kv=4 * 16 + 6, batch=2, seed=6)
    for forward, dq, chunk in ((0, 0, 64), (1, 0, 3), (0, 1, 4)):
        values = {"KEY_MAJOR_FORWARD": forward, "KEY_MAJOR_DQ": dq, "CHUNK_TOKENS": chunk}
        way = Variation(0, tuple(("selected_attention", *each) for each in values.items()), ("slc",))
        case = Case(4, 4 * 16 + 6, batch=2, twice=True, variation=way)
        rows = check_case(op.module, op.parameters, case, inputs, with_gradients=True)
        assert not [row for row in rows if not row.ok], values


def test_many_slots_and_pieces_of_lists_add_up_where_each_head_has_a_list() -> None:
    """Lists that several pieces share: every query of every head chooses the first block."""
    op = operator_of("slc", gate="none", scope="head", indices="input", count=2, **HEADS)
    assert_matches_oracle(op, 40, kind="hot", seed=7)


def unshared(op: Operator, scope: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> dict[str, Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, aux = op.nsa_attention(*leaves, return_aux=True)
    found = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do), strict=True))
    return {"o": o.detach(), "indices": aux.indices, **found}


def test_a_head_that_chooses_alone_is_a_head_with_a_kv_head_of_its_own() -> None:
    alone = operator_of("slc", gate="none", scores="mean", scope="head", initial=0, **HEADS)
    apart = operator_of("slc", gate="none", scores="mean", initial=0, group=1, kv_heads=6)
    q, k, v, do = draw(1, 9, 6, 16), draw(1, 101, 2, 16), draw(1, 101, 2, 16), draw(1, 9, 6, 16)
    one = unshared(alone, "head", q, k, v, do)
    other = unshared(apart, "group", q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), do)
    assert torch.equal(one["indices"], other["indices"])
    for name in ("dk", "dv"):
        other[name] = other[name].unflatten(2, (2, 3)).sum(3)
    for name in ("o", "dq", "dk", "dv"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_a_choice_that_all_heads_share_is_the_same_choice_given_to_each_kv_head() -> None:
    shared = operator_of("slc", gate="none", scores="mean", scope="all", **HEADS)
    given = operator_of("slc", gate="none", indices="input", **HEADS)
    q, k, v = draw(1, 9, 6, 16), draw(1, 101, 2, 16), draw(1, 101, 2, 16)
    o, aux = shared.nsa_attention(q, k, v, return_aux=True)
    each = aux.indices.expand(-1, -1, 2, -1).contiguous()
    assert torch.equal(o, given.nsa_attention(q, k, v, indices=each))


@pytest.mark.parametrize("name", ["mean, head", "compression, all", "maxima, group"])
def test_a_choice_is_followed_again_and_one_of_another_scope_is_refused(name: str) -> None:
    op = operator_of_spec(SPECS[name])
    inputs = inputs_of(op, 5, tokens_kv=5 * 16 + 6, seed=8)
    first = call_with_gradients(op, inputs)
    given = replace(inputs, indices=first["indices"], counts=first["counts"])
    assert torch.equal(call(op, given), first["o"])
    wrong = first["indices"].new_zeros(1, 5, 3, 3)
    with pytest.raises(ValueError, match=rf"indices: expected shape \(B=1, Tq=5, S={op.parameters.scopes}, n=3\)"):
        call(op, replace(inputs, indices=wrong))


def test_unknown_probabilities_rank_last_where_the_largest_counts() -> None:
    op = operator_of("cmp slc", gate="none", pool="max", group=1, initial=0, local=1, compression=(8, 4))
    tokens = 16 * 7
    q, k, v = draw(1, 1, 1, 16), draw(1, tokens, 1, 16), draw(1, tokens, 1, 16)
    k[0, 16 * 3 + 2] = float("nan")  # every probability is unknown then, so the lowest blocks are taken
    _, aux = op.nsa_attention(q, k, v, return_aux=True)
    assert aux.indices.flatten().tolist() == [0, 1, 6]


def test_memory_between_q_and_the_choice_is_bounded_where_heads_choose_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    op = operator_of("slc", gate="none", scores="mean", scope="head", initial=0, **HEADS)
    q, k = draw(1, 70, 6, 16), draw(1, 9 * 16, 2, 16)
    whole, _ = op.select_blocks(q, k)
    set_constants(monkeypatch, op, "selection", SCORE_BYTES=4 * 9 * 32, SCORE_TOKENS=32)
    assert torch.equal(op.select_blocks(q, k)[0], whole)


@pytest.mark.parametrize(
    ("name", "said"), [("mean, head", "for each query head"), ("compression, all", "for all heads")]
)
def test_a_package_says_who_chooses_its_blocks(name: str, said: str) -> None:
    op = operator_of_spec(SPECS[name])
    assert said in op.explain() and said in op.nsa_attention.__doc__
