"""The dense oracle does what the semantics page says."""

from __future__ import annotations

import ast
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nsa_gen.verification import Inputs, OracleParameters, make_inputs, reference, reference_attention
from nsa_gen.verification.reference.dense import compress, overlap_weights, select_blocks
from nsa_gen.verification.reference.oracle import split_sequences
from tests.verification.brute_force import assert_row
from tests.verification.verification_specs import spec_of

PHIS = ["mean", "weighted", "linear", "mlp", "external"]
INDEPENDENT = ("alignment", "dense", "oracle", "inputs", "selection", "rounding", "gradients", "tolerance")
"""Modules of what is right: they import torch, the standard library and each other."""


def run(spec, inputs: Inputs, **changes):
    return reference_attention(OracleParameters.from_spec(spec), **{**inputs.arguments(), **changes})


@pytest.mark.parametrize("name", INDEPENDENT)
def test_what_is_right_shares_no_code_with_what_is_judged(name: str) -> None:
    tree = ast.parse(Path(reference.__file__).with_name(f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "nsa_gen.verification.reference":
            imported |= {f"nsa_gen.verification.reference.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    own = {module for module in imported if module.startswith("nsa_gen")}
    assert own <= {f"nsa_gen.verification.reference.{each}" for each in INDEPENDENT}
    assert {module.split(".")[0] for module in imported - own} <= {"torch", *sys.stdlib_module_names}


def sequences_for_loops(spec, inputs: Inputs) -> list[dict]:
    p = OracleParameters.from_spec(spec)
    tensors = {name: x for name, x in inputs.arguments().items() if name not in ("compression", "cu_seqlens")}
    return [
        {
            "tokens": s.tokens,
            "q": s.q,
            "gates": s.gates,
            "cmp": s.raw_cmp,
            "external": s.cmp,
            "slc": s.slc,
            "win": s.win,
            "joint": s.joint,
            "learned": inputs.compression or {},
            "indices": s.indices,
        }
        for s in split_sequences(p, tensors, inputs.cu_seqlens)
    ]


def assert_agrees_with_loops(spec, inputs: Inputs, rows: list[int]) -> None:
    p = OracleParameters.from_spec(spec)
    result = run(spec, inputs)
    for b, sequence in enumerate(sequences_for_loops(spec, inputs)):
        one = type(result)(**{name: x[b] for name, x in result.tensors().items()})
        for r in rows:
            for h in range(p.kv_heads):
                assert_row(p, sequence, one, r, h)


@pytest.mark.parametrize("kv", ["shared", "per_branch"])
@pytest.mark.parametrize("phi", PHIS)
def test_every_phi_agrees_with_loops_over_single_numbers(phi: str, kv: str) -> None:
    position = "none" if phi == "external" else "learned"
    spec = spec_of(phi=phi, kv=kv, position=position)
    inputs = make_inputs(spec, batch=2, tokens=75, dtype=torch.float64, seed=1)
    assert_agrees_with_loops(spec, inputs, [0, 6, 7, 15, 16, 40, 74])


@pytest.mark.parametrize("gate", ["sigmoid", "given", "none"])
def test_every_gate_and_a_written_scale_agree_with_loops(gate: str) -> None:
    spec = spec_of(gate=gate, scale=0.37, initial=0, local=1)
    inputs = make_inputs(spec, batch=1, tokens=50, dtype=torch.float64, seed=2)
    assert_agrees_with_loops(spec, inputs, [3, 31, 49])


def test_key_and_value_may_be_compressed_differently() -> None:
    spec = spec_of(phi="mlp", phi_value="weighted", position="none", position_value="learned")
    inputs = make_inputs(spec, batch=1, tokens=40, dtype=torch.float64, seed=3)
    assert_agrees_with_loops(spec, inputs, [20, 39])


@pytest.mark.parametrize("given", [False, True])
def test_fewer_queries_than_keys_align_to_the_end(given: bool) -> None:
    spec = spec_of(indices_given=given)
    inputs = make_inputs(spec, batch=2, tokens=5, tokens_kv=77, dtype=torch.float64, seed=4)
    assert_agrees_with_loops(spec, inputs, [0, 2, 4])


@pytest.mark.parametrize("kv", ["shared", "per_branch"])
@pytest.mark.parametrize("branches", ["cmp", "slc", "win", "cmp win", "slc win", "cmp slc"])
def test_absent_branches_are_left_out(branches: str, kv: str) -> None:
    spec = spec_of(branches=branches, kv=kv, indices_given="cmp" not in branches)
    inputs = make_inputs(spec, batch=1, tokens=45, dtype=torch.float64, seed=5)
    assert_agrees_with_loops(spec, inputs, [7, 30, 44])


@pytest.mark.parametrize("branches", ["cmp slc win", "slc win"])
def test_joint_branches_attend_to_each_key_of_either_once(branches: str) -> None:
    spec = spec_of(branches=branches, joint=True, window=21, indices_given="cmp" not in branches)
    inputs = make_inputs(spec, batch=1, tokens=45, dtype=torch.float64, seed=5)
    assert_agrees_with_loops(spec, inputs, [7, 30, 44])


@pytest.mark.parametrize("phi", ["mlp", "external"])
def test_packed_sequences_are_each_as_if_alone(phi: str) -> None:
    spec = spec_of(phi=phi, position="none")
    lengths = [13, 0, 1, 46, 33]
    inputs = make_inputs(spec, tokens=lengths, dtype=torch.float64, seed=6)
    packed = run(spec, inputs)
    p = OracleParameters.from_spec(spec)
    start = 0
    for length in lengths:
        rows, first = slice(start, start + length), start // p.compression_stride
        blocks = slice(first, first + p.compressed_blocks(length))
        alone = {name: None if x is None else x[None, rows] for name, x in
                 ((name, getattr(inputs, name)) for name in ("q", "k", "v", "gates"))}  # fmt: skip
        if phi == "external":
            alone |= {"k_cmp": inputs.k_cmp[None, blocks], "v_cmp": inputs.v_cmp[None, blocks]}
        single = reference_attention(p, **alone, compression=inputs.compression)
        for name, x in single.tensors().items():
            other = getattr(packed, name)[blocks if name in ("k_cmp", "v_cmp") else rows]
            torch.testing.assert_close(other[..., : x.shape[-1]], x[0], rtol=1e-12, atol=1e-12)
        start += length


@pytest.mark.parametrize("score_bytes", [1, 20_000])
def test_chunks_of_query_rows_change_nothing(score_bytes: int) -> None:
    spec = spec_of(phi="mlp", position="learned")
    inputs = make_inputs(spec, batch=1, tokens=11, tokens_kv=60, dtype=torch.float64, seed=7)
    whole, chunked = run(spec, inputs), run(spec, inputs, score_bytes=score_bytes)
    for name, x in whole.tensors().items():
        torch.testing.assert_close(getattr(chunked, name), x, rtol=1e-12, atol=1e-12)


# Eq. 9


@pytest.mark.parametrize(("block", "stride", "selection"), [(32, 16, 64), (16, 16, 16), (8, 4, 16), (24, 8, 32)])
def test_overlap_weights_count_shared_positions(block: int, stride: int, selection: int) -> None:
    p = OracleParameters(1, 1, 16, 16, 1.0, compression_block=block, compression_stride=stride,
                         selection_block=selection, selection_count=4)  # fmt: skip
    tokens = 5 * selection + 3
    compressed, blocks = p.compressed_blocks(tokens), p.selection_blocks(tokens)
    weights = overlap_weights(p, compressed, blocks)
    assert weights.shape == (compressed, blocks)
    for i in range(compressed):
        for j in range(blocks):
            shared = set(range(i * stride, i * stride + block)) & set(range(j * selection, (j + 1) * selection))
            assert weights[i, j].item() == len(shared) / stride


def test_overlap_weights_of_the_paper_are_1_2_2_2_1() -> None:
    p = OracleParameters(1, 1, 16, 16, 1.0, compression_block=32, compression_stride=16, selection_block=64)
    weights = overlap_weights(p, 39, 10)
    for j in range(1, 9):
        assert weights[:, j].nonzero().flatten().tolist() == list(range(4 * j - 1, 4 * j + 4))
        assert weights[4 * j - 1 : 4 * j + 4, j].tolist() == [1, 2, 2, 2, 1]


# Section 3


def chosen(values: list[float], t: int, **changes) -> list[int]:
    p = OracleParameters(1, 1, 16, 16, 1.0, selection_block=16, **{"selection_count": 3, **changes})
    importance = torch.tensor(values, dtype=torch.float64)[None, None]
    indices, counts = select_blocks(p, importance, torch.tensor([t]))
    assert indices.dtype == counts.dtype == torch.int32
    assert counts.item() == (indices >= 0).sum().item()
    return indices[0, 0].tolist()


def test_the_largest_importances_are_chosen_in_ascending_order() -> None:
    assert chosen([1, 5, 2, 7, 3], 79) == [1, 3, 4]


def test_ties_go_to_the_lower_block() -> None:
    assert chosen([0.0] * 6, 95) == [0, 1, 2]
    assert chosen([1, 2, 2, 2, 2, 1], 95) == [1, 2, 3]


def test_forced_blocks_take_their_slots_first_and_count_once() -> None:
    assert chosen([0, 9, 8, 7, 0, 0], 95, initial=1, local=1) == [0, 1, 5]
    assert chosen([0, 9], 31, initial=2, local=1) == [0, 1, -1]
    assert chosen([0, 9, 8, 7, 6, 0], 95, initial=1, local=2) == [0, 4, 5]


def test_a_future_block_never_takes_a_slot() -> None:
    assert chosen([1, 2, 9, 9, 9], 31) == [0, 1, -1]
    assert chosen([1, 2, 9, 9, 9], 15, initial=2) == [0, -1, -1]


def test_nan_importance_ranks_last_among_candidates_but_above_the_future() -> None:
    nan = math.nan
    assert chosen([nan, 1, nan, 0, 2], 79) == [1, 3, 4]
    assert chosen([nan, 1, nan, 5, 5], 47) == [0, 1, 2]
    assert chosen([nan, 1, nan, 0.5, 5], 63, selection_count=3) == [0, 1, 3]


def test_a_candidate_with_importance_zero_still_fills_a_slot() -> None:
    assert chosen([3, 0, 0, 0], 63, selection_count=4) == [0, 1, 2, 3]


# Section 4, 5: free oracles


def dense_causal(inputs: Inputs, group: int, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


def test_selection_of_every_block_and_a_wide_window_are_dense_causal_attention() -> None:
    spec = spec_of(count=8, window=200, query_heads=6, scale=0.37)
    inputs = make_inputs(spec, batch=2, tokens=120, dtype=torch.float64, seed=8)
    result = run(spec, inputs)
    dense = dense_causal(inputs, 3, 0.37)
    torch.testing.assert_close(result.o_slc, dense)
    torch.testing.assert_close(result.o_win, dense)


def test_the_window_holds_exactly_w_keys() -> None:
    spec = spec_of(branches="win", window=5, gate="none")
    inputs = make_inputs(spec, batch=1, tokens=20, dtype=torch.float64, seed=9)
    base = run(spec, inputs).o
    v = inputs.v.clone()
    v[:, 10] += 1
    changed = (run(spec, inputs, v=v).o != base).any(-1).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]


# Section 8


def test_rows_without_a_visible_compressed_block_are_zero_with_zero_gradients() -> None:
    spec = spec_of(branches="cmp", phi="mlp", position="none")
    inputs = make_inputs(spec, batch=1, tokens=7, dtype=torch.float64, seed=10)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.differentiable().items()}
    result = run(spec, inputs.replace_differentiable(leaves))
    assert (result.o == 0).all() and (result.lse_cmp == -math.inf).all() and result.k_cmp.shape[1] == 0
    longer = make_inputs(spec, batch=1, tokens=9, dtype=torch.float64, seed=10)
    leaves = {name: x.clone().requires_grad_() for name, x in longer.differentiable().items()}
    result = run(spec, longer.replace_differentiable(leaves))
    gradients = dict(zip(leaves, torch.autograd.grad(result.o, list(leaves.values()), longer.do), strict=True))
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert (gradients["q"][:, :7] == 0).all() and (gradients["gates"][:, :7] == 0).all()
    assert (gradients["v"][:, :8] != 0).any() and (gradients["v"][:, 8:] == 0).all()


def test_indices_that_are_empty_future_or_out_of_range_are_ignored() -> None:
    spec = spec_of(branches="slc", indices_given=True, gate="none", count=4)
    inputs = make_inputs(spec, batch=1, tokens=40, dtype=torch.float64, seed=11)
    indices = torch.full_like(inputs.indices, -1)
    indices[:, 39, :, :2] = torch.tensor([0, 2])
    clean = run(spec, inputs, indices=indices)
    indices[:, 39, :, 2:] = torch.tensor([3, 10**9])
    indices[:, 38, :, 1] = -7
    dirty = run(spec, inputs, indices=indices)
    assert torch.equal(clean.o, dirty.o)
    assert (clean.o[:, :39] == 0).all() and (clean.lse_slc[:, :39] == -math.inf).all() and (clean.o[:, 39] != 0).all()


def test_slots_beyond_the_count_are_ignored() -> None:
    spec = spec_of(branches="slc", indices_given=True, gate="none", count=3)
    inputs = make_inputs(spec, batch=1, tokens=60, dtype=torch.float64, seed=12)
    indices = torch.zeros_like(inputs.indices) + torch.tensor([0, 1, 2], dtype=torch.int32)
    counts = torch.full(indices.shape[:-1], 2, dtype=torch.int32)
    fewer = indices.clone()
    fewer[..., 2] = -1
    assert torch.equal(run(spec, inputs, indices=indices, counts=counts).o, run(spec, inputs, indices=fewer).o)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["k", "v", "q"])
def test_nan_and_inf_reach_only_the_rows_that_see_them(which: str, value: float) -> None:
    spec = spec_of(branches="win slc", indices_given=True, window=6, count=2, gate="none")
    inputs = make_inputs(spec, batch=1, tokens=50, dtype=torch.float64, seed=13)
    indices = torch.full_like(inputs.indices, -1)
    indices[:, 35:37, :, 0] = 1
    x = getattr(inputs, which).clone()
    x[0, 20, 0, 3] = value
    clean, dirty = run(spec, inputs, indices=indices), run(spec, inputs, indices=indices, **{which: x})
    touched = (clean.o != dirty.o).any(-1)[0]  # NaN differs from everything
    rows = {20} if which == "q" else {20, 21, 22, 23, 24, 25, 35, 36}
    heads = [0] if which == "q" else [0, 1]
    assert {r for r, h in touched.nonzero().tolist()} == rows
    assert {h for r, h in touched.nonzero().tolist()} <= set(heads)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 9), (2, 0), (2, [0, 0]), (2, [])])
def test_empty_batches_and_sequences_give_empty_outputs(batch: int, tokens) -> None:
    spec = spec_of(phi="linear", position="learned")
    inputs = make_inputs(spec, batch=batch, tokens=tokens, dtype=torch.float64)
    result = run(spec, inputs)
    assert result.o.shape == (*inputs.q.shape[:-1], 24)
    assert result.indices.shape == (*inputs.q.shape[:-2], 2, 3)
    assert result.lse_cmp.shape == inputs.q.shape[:-1]


def test_given_indices_replace_the_choice_but_importance_is_still_computed() -> None:
    spec = spec_of(count=2, initial=0, local=1)
    inputs = make_inputs(spec, batch=1, tokens=80, dtype=torch.float64, seed=14)
    own = run(spec, inputs)
    indices = torch.full_like(own.indices, -1)
    indices[..., 0] = 0
    other = run(spec, inputs, indices=indices)
    assert torch.equal(other.importance, own.importance) and torch.equal(other.o_cmp, own.o_cmp)
    assert torch.equal(other.indices, indices) and not torch.equal(other.o_slc, own.o_slc)


def test_a_missing_argument_is_named() -> None:
    spec = spec_of(kv="per_branch")
    inputs = make_inputs(spec, batch=1, tokens=20)
    with pytest.raises(ValueError, match="k_win"):
        run(spec, inputs, k_win=None)
    with pytest.raises(ValueError, match="gates"):
        run(spec, inputs, gates=None)


# Gradients and lower precision


@pytest.mark.parametrize("phi", PHIS)
def test_gradients_pass_gradcheck(phi: str) -> None:
    spec = spec_of(phi=phi, position="none" if phi == "external" else "learned", kv="per_branch", tiny=True)
    inputs = make_inputs(spec, batch=1, tokens=19, dtype=torch.float64, seed=15)
    p = OracleParameters.from_spec(spec)
    indices = reference_attention(p, **inputs.arguments()).indices
    names = list(inputs.differentiable())

    def f(*tensors: Tensor) -> Tensor:
        changed = replace(inputs.replace_differentiable(dict(zip(names, tensors, strict=True))), indices=indices)
        return reference_attention(p, **changed.arguments()).o

    leaves = [x.clone().requires_grad_() for x in inputs.differentiable().values()]
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_is_near_the_truth_and_keeps_its_dtypes(dtype: torch.dtype) -> None:
    spec = spec_of(phi="mlp", position="learned")
    inputs = make_inputs(spec, batch=1, tokens=64, dtype=dtype, seed=16)
    result = run(spec, inputs)
    exact = run(spec, inputs.to(torch.float64), indices=result.indices)
    assert result.o.dtype == dtype and result.o_cmp.dtype == dtype and result.k_cmp.dtype == dtype
    assert result.lse_cmp.dtype == torch.float32 and result.importance.dtype == torch.float32
    assert (result.o - exact.o).abs().max() < 10 * torch.finfo(dtype).eps
    assert (result.o.double() != exact.o).any()


def test_tf32_products_round_their_operands_to_ten_bits() -> None:
    spec = spec_of(branches="win", gate="none")
    inputs = make_inputs(spec, batch=1, tokens=64, seed=17)
    p = OracleParameters.from_spec(spec)
    exact = reference_attention(p, **inputs.to(torch.float64).arguments()).o
    errors = [
        (reference_attention(replace(p, tf32=tf32), **inputs.arguments()).o - exact).abs().max().item()
        for tf32 in (False, True)
    ]
    assert errors[0] < 5e-6 and 1e-4 < errors[1] < 1e-2


def test_compress_covers_complete_blocks_only() -> None:
    p = OracleParameters.from_spec(spec_of())
    k, v = torch.randn(23, 2, 16), torch.randn(23, 2, 24)
    k_cmp, v_cmp = compress(p, k, v, None)
    assert k_cmp.shape == (4, 2, 16) and v_cmp.shape == (4, 2, 24)
    torch.testing.assert_close(k_cmp[3], k[12:20].mean(0))
