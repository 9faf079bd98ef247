"""Prefill, decode, truncation and forks agree with one long forward, over specs, layouts and page sizes."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch

from nsa_gen.verification.inference import PAGE_SIZES, Scenario, Step, run_scenario, scenario_of_seed
from tests.support import DEVICE, GPU, operator_of

PASSES = ("forward", "decode")
STEPS = (
    Step("fill", (100, 61)),
    Step("decode", (1, 1)),
    Step("truncate", (95, 58)),
    Step("fork", (0, 1, 90)),
    Step("decode", (2, 1)),
)
SPECS: dict[str, dict[str, Any]] = {
    "window alone": {"branches": "win", "gate": "none"},
    "selection of the caller": {"branches": "slc", "gate": "given", "indices": "input"},
    "compression alone": {"branches": "cmp"},
    "selection of the caller and window": {"branches": "slc win", "indices": "input"},
    "keys of each branch": {"kv": "per_branch", "group": 3, "kv_heads": 2, "dims": (24, 40)},
    "mlp and linear": {"branches": "cmp slc", "phi": "mlp", "phi_value": "linear", "position": ("learned", "none")},
    "weighted and mean": {"branches": "cmp win", "phi": "weighted", "phi_value": "mean", "position": ("learned",) * 2},
    "compressed by the caller": {"phi": "external"},
    "compressed by the caller alone": {"branches": "cmp", "phi": "external"},
    "forced blocks only": {"count": 3, "initial": 1, "local": 2},
    "blocks that reach over three others": {"compression": (16, 4), "initial": 0, "local": 0},
    "blocks that reach over none": {"compression": (16, 16)},
    "a group of twenty": {"group": 20, "count": 5, "window": 70},
    "half precision": {"dtype": "float16"},
    "mean scores alone": {"branches": "slc", "gate": "none", "scores": "mean", "initial": 0},
    "mean scores beside compression": {
        "scores": "mean",
        "kv": "per_branch",
        "group": 3,
        "kv_heads": 2,
        "dims": (24, 40),
    },
    "indexer alone": {"branches": "slc", "gate": "none", "index": 16, "initial": 0, "kv_heads": 2},
    "indexer, each head alone": {
        "branches": "slc win",
        "index": 32,
        "scope": "head",
        "group": 3,
        "kv_heads": 2,
        "dims": (24, 40),
        "dtype": "float16",
    },
    "indexer beside compression, all heads together": {"index": 16, "scope": "all", "kv_heads": 2, "kv": "per_branch"},
    "codes, indexer, joint branches": {
        "branches": "slc win",
        "cache": "e4m3",
        "index": 64,
        "joint": True,
        "sink_joint": "learned",
        "initial": 0,
    },
    "maxima": {"pool": "max", "group": 3, "kv_heads": 2, "initial": 0},
    "maxima, all heads together": {"branches": "cmp slc", "pool": "max", "scope": "all", "kv_heads": 2},
    "maxima, each head alone": {"pool": "max", "scope": "head", "compression": (16, 4), "initial": 0, "local": 0},
    "compressed keys without output": {
        "branches": "cmp slc",
        "gate": "none",
        "output": False,
        "pool": "max",
        "group": 3,
        "kv_heads": 2,
        "initial": 0,
    },
    "compressed keys without output, keys of each branch": {
        "output": False,
        "kv": "per_branch",
        "kv_heads": 2,
        "dims": (24, 40),
        "scope": "head",
    },
    "compressed keys without output by the caller": {"output": False, "phi": "external", "scope": "all", "kv_heads": 2},
    "mean scores, each head alone": {
        "branches": "slc win",
        "scores": "mean",
        "scope": "head",
        "group": 3,
        "kv_heads": 2,
        "dims": (24, 40),
    },
    "mean scores, all heads together": {"scores": "mean", "scope": "all", "kv_heads": 2},
    "compressed scores, each head alone": {"scope": "head", "group": 3, "kv_heads": 2},
    "compressed scores, all heads together": {"scope": "all", "group": 3, "kv_heads": 2, "kv": "per_branch"},
    "selection of the caller for all heads": {"branches": "slc win", "indices": "input", "scope": "all", "kv_heads": 2},
    "selection of the caller for each head": {"branches": "slc", "indices": "input", "scope": "head", "kv_heads": 2},
    "codes": {"cache": "e4m3", "group": 3, "kv_heads": 2, "dims": (24, 40)},
    "codes, keys of each branch": {"cache": "e4m3", "kv": "per_branch", "kv_heads": 2, "dtype": "float16"},
    "codes, mlp and linear": {
        "branches": "cmp slc",
        "cache": "e4m3",
        "kv_heads": 2,
        "phi": "mlp",
        "phi_value": "linear",
        "position": ("learned", "none"),
    },
    "codes, weighted and mean": {"cache": "e4m3", "phi": "weighted", "phi_value": "mean", "position": ("learned",) * 2},
    "codes, mean scores": {"branches": "slc win", "cache": "e4m3", "scores": "mean", "kv_heads": 2, "initial": 0},
    "codes, compressed by the caller": {"cache": "e4m3", "phi": "external", "kv_heads": 2},
    "codes, compressed keys without output": {"cache": "e4m3", "output": False, "kv_heads": 2},
    "codes, joint branches, compressed keys without output": {
        "cache": "e4m3",
        "joint": True,
        "sink_joint": "learned",
        "output": False,
        "gate": "none",
        "kv_heads": 2,
    },
    "codes, window alone": {"branches": "win", "gate": "none", "cache": "e4m3", "sink": "learned", "kv_heads": 2},
    "mean scores, forced blocks only": {"branches": "slc win", "scores": "mean", "count": 3, "initial": 1, "local": 2},
}


def check(scenario: Scenario, **changes: Any) -> None:
    op = operator_of(changes.pop("branches", "cmp slc win"), scale=0.37, passes=PASSES, **changes)
    rows = run_scenario(op.spec, op.module, scenario, DEVICE.type)
    assert rows
    failures = [f"{row.case}: {row.quantity}: {row.problem or (row.error, row.bound)}" for row in rows if not row.ok]
    assert not failures, "\n".join(failures[:8])


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_spec_decodes_what_one_forward_computes(name: str) -> None:
    page_size = (None, 16)[list(SPECS).index(name) % 2]
    check(Scenario(2, 140, page_size, STEPS), **SPECS[name])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages_of_every_size_hold_the_same(page_size: int) -> None:
    check(Scenario(1, 160, page_size, (Step("fill", (129,)), Step("decode", (1,)), Step("decode", (1,)))))


def test_a_prompt_in_chunks_of_unequal_sequences_is_one_forward() -> None:
    steps = (Step("prefill", (6, 3)), Step("fill", (40, 0)), Step("prefill", (2, 5)), Step("prefill", (0, 4)))
    check(Scenario(2, 80, 16, (*steps, Step("decode", (1, 1)))))


def test_equal_importances_go_to_the_lower_block_in_whichever_tile_they_are() -> None:
    steps = (Step("fill", (230,)), Step("decode", (1,)), Step("decode", (3,)))
    for pool in ("sum", "max"):
        check(Scenario(1, 300, None, steps, kind="ties"), count=4, initial=0, local=0, pool=pool)


def test_logits_far_apart_lose_no_part_of_the_softmax() -> None:
    check(Scenario(1, 200, 32, (Step("fill", (150,)), Step("decode", (2,))), kind="spread"))


@pytest.mark.parametrize("seed", range(40 if GPU else 3))
def test_drawn_scenarios_agree_with_the_oracle(seed: int) -> None:
    op = operator_of(scale=0.37, passes=PASSES, kv_heads=2, count=4)
    rows = run_scenario(op.spec, op.module, scenario_of_seed(op.spec, seed, DEVICE.type), DEVICE.type)
    assert rows and [row for row in rows if not row.ok] == []


@pytest.mark.parametrize(("page_size", "scope"), [(None, "group"), (16, "head"), (64, "all")])
def test_mean_keys_and_the_choice_have_the_same_bits_in_one_forward_in_chunks_and_step_by_step(
    page_size: int | None, scope: str
) -> None:
    shape = {"block": 32, "kv_heads": 2, "group": 3, "initial": 0}
    op = operator_of("slc", gate="none", scores="mean", scope=scope, passes=PASSES, **shape)
    generator = torch.Generator().manual_seed(3)
    tokens = 32 * 6 + 9
    q, k, v = (torch.randn(1, tokens, heads, 16, generator=generator).to(DEVICE) for heads in (6, 2, 2))
    whole = op.select_blocks(q[:, -12:], k)[0]
    cache, at, chosen = op.NSACache(1, 250, page_size=page_size, max_new_tokens=2, device=DEVICE), 0, []
    for count in (31, 1, 70, 87, 5, 3, 1, 1, 2):
        rows = slice(at, at + count)
        cache.extend(count)
        cache.write(k[:, rows], v[:, rows])
        at += count
        if at > tokens - 12:
            attend = op.nsa_decode if count < 3 else op.nsa_prefill
            chosen.append(attend(q[:, rows], cache, return_aux=True)[1].indices)
    assert torch.equal(torch.cat(chosen, 1), whole)
    means = sys.modules[f"{op.module.__name__}.kernels.mean_keys"]
    expected = means.pool_mean_keys(k, op.runtime.sequences.Sequences(1, tokens, tokens))
    found = cache.layers[0].mean_keys
    if page_size:
        found = found.flatten(0, 1)[cache.layout.index(op.storage.SELECTED, 0, 1, tokens)]
    assert torch.equal(found[:, :6], expected)


@pytest.mark.parametrize(("page_size", "scope"), [(None, "group"), (16, "head"), (64, "all")])
def test_index_keys_are_kept_and_choose_the_same_in_one_forward_in_chunks_and_step_by_step(
    page_size: int | None, scope: str
) -> None:
    shape = {"block": 32, "kv_heads": 2, "group": 3, "initial": 0, "index": 16}
    op = operator_of("slc", gate="none", scope=scope, passes=PASSES, **shape)
    generator = torch.Generator().manual_seed(3)
    tokens, scopes = 32 * 6 + 9, op.parameters.scopes
    q, k, v, q_idx, k_idx = (
        torch.randn(1, tokens, heads, 16, generator=generator).to(DEVICE) for heads in (6, 2, 2, scopes, 1)
    )
    whole = op.select_blocks(q_idx[:, -12:], k_idx)[0]
    cache, at, chosen = op.NSACache(1, 250, page_size=page_size, max_new_tokens=2, device=DEVICE), 0, []
    for count in (31, 1, 70, 87, 5, 3, 1, 1, 2):
        rows = slice(at, at + count)
        cache.extend(count)
        cache.write(k[:, rows], v[:, rows], k_idx=k_idx[:, rows])
        at += count
        if at > tokens - 12:
            attend = op.nsa_decode if count < 3 else op.nsa_prefill
            chosen.append(attend(q[:, rows], cache, q_idx=q_idx[:, rows], return_aux=True)[1].indices)
    assert torch.equal(torch.cat(chosen, 1), whole)
    found = cache.layers[0].k_idx
    if page_size:
        found = found.flatten(0, 1)[cache.layout.index(None, 0, 1, tokens)]
    assert torch.equal(found[:, :tokens], k_idx)
    with pytest.raises(ValueError, match="q_idx: expected shape"):
        op.nsa_decode(q[:, :1], cache, q_idx=q_idx[:, :1, :, :8])
    with pytest.raises(ValueError, match="k_idx: expected shape"):
        cache.write(k[:, :1], v[:, :1], k_idx=k[:, :1])


def test_an_attached_cache_keeps_index_keys_in_the_callers_pages() -> None:
    op = operator_of("slc", gate="none", kv_heads=2, initial=0, index=32, passes=PASSES)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 90, heads, 16, generator=generator).to(DEVICE) for heads in (4, 2, 2))
    q_idx, k_idx = (torch.randn(1, 90, heads, 32, generator=generator).to(DEVICE) for heads in (2, 1))
    shapes = op.NSACache.page_shapes(16)
    assert shapes["k_idx"] == ((16, 1, 32), torch.float32)
    pages = {name: torch.zeros(8, *shape, dtype=dtype, device=DEVICE) for name, (shape, dtype) in shapes.items()}
    table = torch.tensor([[5, 2, 7, 0, 1, 3, 4, 6]], dtype=torch.int32, device=DEVICE)
    cache = op.NSACache.attach([pages], table, page_size=16)
    cache.assign([89], [89])
    cache.write(k[:, :89], v[:, :89], k_idx=k_idx[:, :89])
    cache.assign([90], [1])
    cache.write(k[:, 89:], v[:, 89:], k_idx=k_idx[:, 89:])
    assert torch.equal(pages["k_idx"][5], k_idx[0, :16])
    o, aux = op.nsa_decode(q[:, -1:].contiguous(), cache, q_idx=q_idx[:, -1:], return_aux=True)
    assert torch.equal(aux.indices, op.select_blocks(q_idx[:, -1:], k_idx)[0])
    whole = op.nsa_attention(q[:, -1:].contiguous(), k, v, q_idx=q_idx[:, -1:], k_idx=k_idx)
    torch.testing.assert_close(o, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scorer", [{"scores": "mean"}, {"index": 16}], ids=["mean keys", "index keys"])
def test_unknown_and_equal_scores_are_ranked_in_decode_as_in_the_forward(scorer: dict[str, Any]) -> None:
    op = operator_of("slc", gate="none", **scorer, group=1, count=4, initial=1, passes=PASSES)
    indexed = "index" in scorer
    q, k = torch.ones(1, 1, 1, 16), torch.zeros(1, 24 * 16, 1, 16)
    for levels in ([-1.0] * 23, [-5.0, *[float(-(j % 7)) for j in range(22)]], [math.nan] * 23, [-math.inf] * 23):
        k[0, : 23 * 16, 0, 0] = torch.tensor(levels).repeat_interleave(16)
        for torn in ((), (1, 2, 9, 20), range(3, 23)):
            keys = k.clone()
            for block in torn:
                keys[0, 16 * block + 3, 0, 5] = math.nan
            keys, queries = keys.to(DEVICE), q.to(DEVICE)
            cache = op.NSACache(1, 24 * 16, device=DEVICE)
            cache.extend(24 * 16)
            cache.write(keys, keys, **({"k_idx": keys} if indexed else {}))
            asked = {"q_idx": queries} if indexed else {}
            found = op.nsa_decode(queries, cache, **asked, return_aux=True)[1].indices
            assert torch.equal(found, op.select_blocks(queries, keys)[0]), (levels[:3], torn)


def test_a_decoded_token_has_the_same_bits_whatever_else_the_cache_and_the_batch_hold() -> None:
    op = operator_of(passes=PASSES)
    generator = torch.Generator().manual_seed(1)
    k, v, q, gates = (
        torch.randn(1, 90, *shape, generator=generator).to(DEVICE) for shape in ((1, 16), (1, 16), (2, 16), (2, 3))
    )
    found = []
    for batch, page_size in ((1, None), (1, 16), (1, 64)):
        cache = op.NSACache(batch, 120, page_size=page_size, device=DEVICE)
        cache.extend(90)
        cache.write(k, v)
        found.append(op.nsa_decode(q[:, -1:].contiguous(), cache, gates[:, -1:]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    again = op.nsa_decode(q[:, -1:].contiguous(), cache, gates[:, -1:])
    assert torch.equal(found[0], again), "counters are 0 again after a call"


def test_a_prefill_of_everything_is_the_operator_itself() -> None:
    op = operator_of(passes=PASSES)
    k, v = (torch.randn(1, 30, 1, 16, device=DEVICE) for _ in range(2))
    q, gates = torch.randn(1, 30, 2, 16, device=DEVICE), torch.randn(1, 30, 2, 3, device=DEVICE)
    cache = op.NSACache(1, 64, device=DEVICE)
    cache.extend(30)
    cache.write(k, v)
    torch.testing.assert_close(op.nsa_prefill(q, cache, gates), op.nsa_attention(q, k, v, gates), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("most", "splits"), [(1, 1), (4, 4), (8, 7), (16, 13), (24, 13), (25, 25), (99, 25)])
def test_tiles_are_shared_out_in_as_few_programs_as_need_no_more_rounds(most: int, splits: int) -> None:
    module = operator_of("win", passes=PASSES, gate="none").module
    found = sys.modules[f"{module.__name__}.workspace"].even_splits(25, most)
    assert found == splits and math.ceil(25 / found) == math.ceil(25 / most)
