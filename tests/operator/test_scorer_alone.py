"""Compressed keys without an output: they choose blocks, and there is no branch, value, gate or gradient of theirs.

The choice is that of the same spec whose compressed keys have an output, to the bit, and that of a naive version which
looks at one token and block at a time. Outputs and gradients are the dense oracle's.
"""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.spec import Spec
from tests.support import (
    DEVICE,
    Operator,
    assert_matches_oracle,
    call,
    call_with_gradients,
    inputs_of,
    operator_of,
    operator_of_spec,
    small_spec,
)

HEADS = {"group": 3, "kv_heads": 2}
TOKENS = 16 * 6 + 3
RANDOM = torch.Generator().manual_seed(5)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM).to(DEVICE)


def scorer(branches: str = "cmp slc", **changes: Any) -> Operator:
    return operator_of(branches, output=False, **{"gate": "none", **HEADS, **changes})


def specs() -> dict[str, Spec]:
    def spec(branches: str = "cmp slc", **changes: Any) -> Spec:
        return small_spec(branches, output=False, **{"gate": "none", **HEADS, **changes})

    return {
        "maxima": spec(pool="max", initial=0, dims=(24, 40)),
        "sums, half precision": spec(dtype="float16"),
        "compressed by the caller": spec(phi="external", scope="head"),
        "gated, with a window": spec("cmp slc win", gate="sigmoid", kv="per_branch", sink="learned"),
        "local blocks in the window": spec("cmp slc win", gate="given", window=33, local=2, count=4),
        "one choice for all heads": spec("cmp slc win", scope="all", compression=(16, 4)),
    }


SPECS = specs()


@pytest.mark.parametrize("name", SPECS)
def test_outputs_and_gradients_are_the_oracles_batched_and_packed(name: str) -> None:
    op = operator_of_spec(SPECS[name])
    assert_matches_oracle(op, 4, tokens_kv=4 * 16 + 6, seed=4)
    assert_matches_oracle(op, (5, 0, 3 * 16 + 2, 1), seed=5)


def test_unknown_keys_reach_the_choices_that_see_them_alone() -> None:
    op = operator_of_spec(SPECS["maxima"])
    assert_matches_oracle(op, 7, tokens_kv=5 * 16 + 2, kind="nan", gradients=False)


@pytest.mark.parametrize("pool", ["sum", "max"])
@pytest.mark.parametrize("scope", ["group", "head", "all"])
def test_the_choice_is_that_of_a_naive_version(scope: str, pool: str) -> None:
    """One token and block at a time; block j sees compressed block i by the tokens that they have in common."""
    op = scorer(scope=scope, pool=pool, initial=0)
    q, k, v = draw(1, 7, 6, 16), draw(1, TOKENS, 2, 16), draw(1, TOKENS, 2, 16)
    _, aux = op.nsa_attention(q, k, v, return_aux=True)
    keys = k[0].double().cpu().unfold(0, 8, 4).mean(-1)
    heads_of = {"group": [[0, 1, 2], [3, 4, 5]], "head": [[h] for h in range(6)], "all": [list(range(6))]}[scope]
    for row, (number, heads) in itertools.product(range(7), enumerate(heads_of)):
        t = TOKENS - 7 + row
        own, seen = t // 16, [i for i in range(len(keys)) if 4 * i + 7 <= t]
        p = sum(torch.softmax(0.25 * keys[seen, h // 3] @ q[0, row, h].double().cpu(), 0) for h in heads)
        scores = []
        for j in range(own):
            common = [len({*range(4 * i, 4 * i + 8)} & {*range(16 * j, 16 * j + 16)}) for i in seen]
            terms = [float(p[i]) * (c / 4 if pool == "sum" else c > 0) for i, c in enumerate(common)]
            scores.append(sum(terms) if pool == "sum" else max(terms))
        best = sorted(range(own), key=lambda j: (-scores[j], j))[:2]
        assert aux.indices[0, row, number].tolist() == sorted([*best, own])


@pytest.mark.parametrize("scope", ["group", "head", "all"])
def test_choice_and_output_are_those_beside_a_branch_to_the_bit(scope: str) -> None:
    alone, beside = scorer(scope=scope), operator_of("cmp slc", gate="none", scope=scope, **HEADS)
    q, k, v = draw(2, 9, 6, 16), draw(2, TOKENS, 2, 16), draw(2, TOKENS, 2, 16)
    o, aux = alone.nsa_attention(q, k, v, return_aux=True)
    _, other = beside.nsa_attention(q, k, v, return_aux=True)
    assert torch.equal(aux.indices, other.indices) and torch.equal(aux.counts, other.counts)
    assert torch.equal(o, other.o_slc) and torch.equal(aux.lse_slc, other.lse_slc)


@pytest.mark.parametrize("branches", ["cmp slc", "cmp slc win"])
def test_the_lse_of_compressed_keys_is_that_of_a_branch_to_the_bit(branches: str) -> None:
    """The pass without values is the branch's own, values left out; a window shares the kernel."""
    alone, beside = scorer(branches), operator_of(branches, **HEADS)
    q, k, v = draw(2, 21, 6, 16), draw(2, 45, 2, 16), draw(2, 45, 2, 16)
    k_cmp, v_cmp = beside.compress(k, v)
    assert torch.equal(alone.compress(k), k_cmp)
    modules = (
        importlib.import_module(f"{alone.module.__name__}.{name}") for name in ("kernels.banded", "runtime.sequences")
    )
    banded, runtime = modules
    with alone.configs.override("compressed_lse", QUERY_BLOCK=16, KEY_BLOCK=16):
        lse = banded.compressed_lse(q, k_cmp, runtime.Sequences(2, 21, 45))
    with beside.configs.override("compressed_forward", QUERY_BLOCK=16, KEY_BLOCK=16):
        assert torch.equal(lse, beside.compressed_attention(q, k_cmp, v_cmp, tokens=45)[1])


def test_there_is_neither_a_gate_nor_a_value_nor_an_output_of_compressed_keys() -> None:
    op = operator_of_spec(SPECS["gated, with a window"])
    shown = {"o_slc", "lse_slc", "o_win", "lse_win", "indices", "counts"}
    assert set(op.Auxiliary._fields) == shown
    assert not hasattr(op, "compressed_attention") and not hasattr(op, "CompressionParameters")
    inputs = inputs_of(op, 5)
    assert inputs.gates is not None and inputs.gates.shape[-1] == 2
    with pytest.raises(ValueError, match=r"gates: expected shape .*2"):
        call(op, replace(inputs, gates=draw(1, 5, 6, 3)))


def test_a_spec_of_the_callers_keys_takes_no_values_and_gives_no_gradient() -> None:
    op = operator_of_spec(SPECS["compressed by the caller"])
    inputs = inputs_of(op, 5, tokens_kv=70)
    assert inputs.v_cmp is None and inputs.k_cmp is not None
    with pytest.raises(TypeError, match="v_cmp"):
        call(op, replace(inputs, v_cmp=inputs.k_cmp))
    with pytest.raises((TypeError, ValueError), match="k_cmp"):
        call(op, replace(inputs, k_cmp=None))
    leaf = inputs.k_cmp.clone().requires_grad_()
    q = inputs.q.clone().requires_grad_()
    o = call(op, replace(inputs, q=q, k_cmp=leaf))
    dq, dk_cmp = torch.autograd.grad(o, (q, leaf), inputs.do, allow_unused=True)
    assert dq.abs().sum() > 0 and dk_cmp is None


@pytest.mark.parametrize("name", ["maxima", "compressed by the caller", "gated, with a window"])
def test_the_steps_one_by_one_choose_as_the_operator(name: str) -> None:
    op = operator_of_spec(SPECS[name])
    for tokens, keys in ((6, 70), ((33, 0, 50), None)):
        inputs = inputs_of(op, tokens, tokens_kv=keys, seed=9)
        _, aux = call(op, inputs, return_aux=True)
        more = {"cu_seqlens": inputs.cu_seqlens}
        k_cmp = inputs.k_cmp if inputs.k_cmp is not None else op.compress(inputs.k, **more)
        indices, counts = op.select_blocks(inputs.q, k_cmp, tokens=keys, **more)
        assert torch.equal(indices, aux.indices) and torch.equal(counts, aux.counts)


def test_a_choice_is_followed_again_without_being_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    op = operator_of_spec(SPECS["maxima"])
    inputs = inputs_of(op, 5, tokens_kv=5 * 16 + 6, seed=8)
    first = call_with_gradients(op, inputs)
    operator = importlib.import_module(f"{op.module.__name__}.operator")
    for name in ("compress_keys", "compressed_lse", "select_blocks"):
        monkeypatch.setattr(operator, name, None)
    second = call_with_gradients(op, replace(inputs, indices=first["indices"], counts=first["counts"]))
    assert all(torch.equal(x, first[name]) for name, x in second.items())


def test_the_backward_keeps_nothing_of_compressed_keys() -> None:
    op = operator_of_spec(SPECS["maxima"])
    saved = op.ops.ATTENTION.saved
    assert not [name for name in saved if "cmp" in name]
    folder = op.folder / "kernels"
    assert "backward" not in (folder / "compression_pool.py").read_text()
    assert not (folder / "banded_backward.py").exists()


def test_a_layer_trains_and_decodes() -> None:
    op = scorer("cmp slc win", gate="sigmoid", passes=("forward", "backward", "decode"))
    layer = op.NativeSparseAttention(64, device=DEVICE)
    hidden = draw(1, 40, 64)
    whole = layer(hidden)
    whole.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    cache = op.NSACache(1, 48, device=DEVICE)
    with torch.no_grad():
        parts = []
        for first, last in ((0, 39), (39, 40)):
            cache.extend(last - first)
            parts.append(layer(hidden[:, first:last], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.layers[0]._fields == ("k", "v", "k_cmp")
