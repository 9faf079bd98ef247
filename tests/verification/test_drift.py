"""Sums in float32, one term after the other, stay within what `drift` says of them, and nothing else hides there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsa_gen.spec import Combine, Compression, HeadDim, Heads, Phi, Position, Spec
from nsa_gen.verification import Comparison, Inputs, OracleParameters, Reference, compare, make_inputs
from nsa_gen.verification.checking import compare_result
from nsa_gen.verification.reference.dense import gelu, round_to_tf32
from nsa_gen.verification.reference.gradients import reference_gradients, truth_and_baseline
from nsa_gen.verification.reference.rounding import chain
from tests.verification.verification_specs import spec_of

UNIT = 2.0**-24
Product = Callable[[Tensor, Tensor], Tensor]


def one_by_one(a: Tensor, b: Tensor) -> Tensor:
    """a (..., R, N) @ b (..., N, C), each product added to a float32 accumulator by itself."""
    total = torch.zeros(*a.shape[:-1], b.shape[-1])
    for n in range(a.shape[-1]):
        total = total + a[..., :, n, None] * b[..., n, None, :]
    return total


@pytest.mark.parametrize("terms", [16, 100, 1000])
@pytest.mark.parametrize("mean", [0.0, 0.1, 3.0])
def test_the_variance_of_a_chain_is_that_of_float32_sums_in_any_order(mean: float, terms: int) -> None:
    generator = torch.Generator().manual_seed(terms)
    x = torch.randn(4000, terms, generator=generator) + mean
    exact = x.double().sum(1)
    total = torch.zeros(4000)
    for n in range(terms):
        total = total + x[:, n]
    predicted = chain(terms, exact.square(), x.double().square().sum(1)).mean().sqrt() * UNIT
    measured = (total.double() - exact).square().mean().sqrt()
    assert 0.5 < measured / predicted < 1.0  # 0.74 where mantissas are distributed as they are in nature


def test_a_sum_that_cancels_drifts_as_its_terms_do() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 256, generator=generator)
    x = torch.cat([x, -x], 1)[:, torch.randperm(512, generator=generator)]
    total = torch.zeros(4000)
    for n in range(512):
        total = total + x[:, n]
    predicted = chain(512, torch.zeros(()), x.double().square().sum(1)).mean().sqrt() * UNIT
    assert 0.5 < total.double().square().mean().sqrt() / predicted < 1.0


def judged(p: OracleParameters, inputs: Inputs, truth: Reference, base: Reference, name: str, x: Tensor) -> Comparison:
    """A result held against the truth as `verify` does it."""
    return compare_result(p, inputs, name, x, truth, base)


def both(p: OracleParameters, inputs: Inputs) -> tuple[Reference, Reference]:
    base = reference_gradients(p, inputs)
    return truth_and_baseline(p, inputs, (base.outputs.indices, base.outputs.counts), with_gradients=True)


# Attention: 4 heads of a group, one sequence


WINDOW = spec_of(branches="win", gate="none", window=1000, query_heads=4, kv_heads=1)


@functools.cache
def window_case(tokens: int, kind: str, seed: int) -> tuple[OracleParameters, Inputs, Reference, Reference]:
    p = OracleParameters.from_spec(WINDOW)
    inputs = make_inputs(WINDOW, batch=1, tokens=tokens, seed=seed, kind=kind)  # type: ignore[arg-type]
    return p, inputs, *both(p, inputs)


def same(x: Tensor) -> Tensor:
    return x


def attention(
    inputs: Inputs,
    scale: float,
    *,
    operands: Callable[[Tensor], Tensor] = same,
    weights: Callable[[Tensor], Tensor] = same,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Causal attention by sums one by one. Returns results, and the terms of dk and dv for one key, (G * T, D)."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return one_by_one(operands(a), operands(b))

    q, do = (x[0].transpose(0, 1) for x in (inputs.q, inputs.do))  # (G, T, D)
    assert inputs.k is not None and inputs.v is not None
    k, v = inputs.k[0, :, 0], inputs.v[0, :, 0]
    tokens = k.shape[0]
    unseen = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    s = (product(q, k.T) * scale).masked_fill(unseen, -math.inf)
    largest = s.amax(-1, keepdim=True)
    p = torch.exp(s - largest)
    total = torch.zeros_like(largest)
    for n in range(tokens):
        total = total + p[..., n : n + 1]
    o = product(weights(p), v) / total
    lse = largest + total.log()
    p = weights(torch.exp(s - lse))
    ds = p * (product(do, v.T) - one_by_one((do * o)[..., None, :], torch.ones(o.shape[-1], 1))[..., 0])
    dq = product(ds, k) * scale
    flat_p, flat_ds, flat_q, flat_do = (x.flatten(0, 1) for x in (p, ds, q, do))
    dk, dv = product(flat_ds.T, flat_q) * scale, product(flat_p.T, flat_do)
    found = {"o": o, "lse_win": lse[..., 0], "dq": dq}
    found = {name: x.transpose(0, 1)[None] for name, x in found.items()}
    return {**found, "dk": dk[None, :, None], "dv": dv[None, :, None]}, flat_p, flat_ds * scale


@pytest.mark.parametrize("tokens", [1, 2, 200])
@pytest.mark.parametrize("kind", ["gaussian", "spread", "falling"])
def test_attention_that_adds_term_by_term_in_float32_passes(kind: str, tokens: int) -> None:
    for seed in range(2 if tokens == 200 else 6):
        p, inputs, truth, base = window_case(tokens, kind, seed)
        for name, x in attention(inputs, p.scale)[0].items():
            result = judged(p, inputs, truth, base, name, x)
            assert result.ok, (name, seed, result.describe())


@pytest.mark.parametrize("name", ["o", "lse_win", "dq", "dk", "dv"])
def test_tf32_operands_fail_where_ieee_products_were_asked_for(name: str) -> None:
    p, inputs, truth, base = window_case(200, "gaussian", 0)
    assert not judged(p, inputs, truth, base, name, attention(inputs, p.scale, operands=round_to_tf32)[0][name]).ok


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
def test_probabilities_rounded_to_bfloat16_fail_in_float32(name: str) -> None:
    p, inputs, truth, base = window_case(200, "gaussian", 0)
    found, _, _ = attention(inputs, p.scale, weights=lambda x: x.bfloat16().float())
    assert not judged(p, inputs, truth, base, name, found[name]).ok


@pytest.mark.parametrize("missing", [slice(150, 151), slice(200, 400)], ids=["a token of one head", "a head"])
@pytest.mark.parametrize("name", ["dk", "dv"])
def test_a_missing_term_of_the_sum_over_a_group_fails_in_float32(name: str, missing: slice) -> None:
    p, inputs, truth, base = window_case(200, "gaussian", 0)
    found, weights, ds = attention(inputs, p.scale)
    rows = (inputs.do if name == "dv" else inputs.q)[0].transpose(0, 1).flatten(0, 1)[missing]
    lost = (weights if name == "dv" else ds)[missing].T @ rows
    assert not judged(p, inputs, truth, base, name, found[name] - lost[None, :, None]).ok


# Compression: chains of 32 * 64 = 2048 terms


def long_spec(phi: str) -> Spec:
    return Spec(
        version=1,
        name="under_test",
        heads=Heads(query=4, kv=2),
        head_dim=HeadDim(qk=64, v=64),
        dtype="float32",
        compression=Compression(
            block=32,
            stride=16,
            phi=Phi(key=phi, value=phi, hidden=64 if phi == "mlp" else None),
            position=Position(key="learned", value="none"),
        ),
        combine=Combine(gate="sigmoid"),
    )


@functools.cache
def compressed_case(phi: str, kind: str, tokens: int) -> tuple[OracleParameters, Inputs, Reference, Reference]:
    spec = long_spec(phi)
    p = OracleParameters.from_spec(spec)
    inputs = make_inputs(spec, batch=1, tokens=tokens, seed=2, kind=kind)  # type: ignore[arg-type]
    return p, inputs, *both(p, inputs)


def compressed(p: OracleParameters, inputs: Inputs, product: Product) -> dict[str, Tensor]:
    """K_cmp and V_cmp by `product`, and o_cmp, lse_cmp of float64 on them: errors there are those of phi alone."""
    learned = {name: x[:, None] for name, x in (inputs.compression or {}).items()}
    found = {}
    for side, x in (("key", inputs.k), ("value", inputs.v)):
        assert x is not None and p.compression_block is not None and p.compression_stride is not None
        blocks = x[0].unfold(0, p.compression_block, p.compression_stride).permute(1, 0, 3, 2)  # (H, Nc, l, D)
        if side == "key" and p.position_key:
            blocks = blocks + learned["key_position"]
        if p.phi_key == "mean":
            out = product(torch.full((1, blocks.shape[2]), 1 / blocks.shape[2]), blocks)[:, :, 0]
        elif p.phi_key == "linear":
            out = product(blocks.flatten(2), learned[f"{side}_weight"][:, 0])
        else:
            hidden = gelu(product(blocks.flatten(2), learned[f"{side}_weight_in"][:, 0]))
            out = product(hidden, learned[f"{side}_weight_out"][:, 0])
        found["k_cmp" if side == "key" else "v_cmp"] = out.transpose(0, 1)[None]
    k, v = (found[name][0].repeat_interleave(p.group, 1).double() for name in ("k_cmp", "v_cmp"))
    scores = torch.einsum("thd,nhd->htn", inputs.q[0].double(), k) * p.scale
    last = torch.arange(k.shape[0]) * (p.compression_stride or 1) + (p.compression_block or 1) - 1
    unseen = last > torch.arange(inputs.q.shape[1])[:, None]
    scores = scores.masked_fill(unseen, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    return {
        **found,
        "lse_cmp": lse.T[None].float(),
        "o_cmp": torch.einsum("htn,nhd->thd", weights, v)[None].float(),
    }


@pytest.mark.parametrize("phi", ["mean", "linear", "mlp"])
@pytest.mark.parametrize(("kind", "tokens"), [("gaussian", 63), ("rising", 200), ("falling", 200)])
def test_compression_that_adds_term_by_term_in_float32_passes_and_so_does_what_reads_it(
    kind: str, tokens: int, phi: str
) -> None:
    p, inputs, truth, base = compressed_case(phi, kind, tokens)
    for name, x in compressed(p, inputs, one_by_one).items():
        result = judged(p, inputs, truth, base, name, x)
        assert result.ok, (name, result.describe())


@pytest.mark.parametrize("phi", ["linear", "mlp"])
def test_the_drift_of_compressed_keys_is_their_error_and_neither_much_more_nor_less(phi: str) -> None:
    p, inputs, truth, _ = compressed_case(phi, "gaussian", 200)
    found = compressed(p, inputs, one_by_one)
    for name in ("k_cmp", "v_cmp", "lse_cmp", "o_cmp"):
        seen = torch.isfinite(truth.outputs.tensors()[name])
        error = (found[name].double() - truth.outputs.tensors()[name])[seen].norm()
        ratio = (error / (UNIT * truth.drift[name].double()[seen].norm())).item()
        assert 0.4 < ratio < 1.2, (name, ratio)


@pytest.mark.parametrize("phi", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("name", ["k_cmp", "v_cmp"])
def test_a_compressed_tensor_too_large_by_a_ten_thousandth_fails_in_float32(name: str, phi: str) -> None:
    p, inputs, truth, base = compressed_case(phi, "gaussian", 200)
    x = compressed(p, inputs, one_by_one)[name]
    assert not judged(p, inputs, truth, base, name, x * 1.0001).ok


@pytest.mark.parametrize("phi", ["linear", "mlp"])
@pytest.mark.parametrize("name", ["k_cmp", "v_cmp", "o_cmp", "lse_cmp"])
def test_tf32_operands_in_phi_fail_where_ieee_products_were_asked_for(name: str, phi: str) -> None:
    p, inputs, truth, base = compressed_case(phi, "gaussian", 200)
    found = compressed(p, inputs, lambda a, b: round_to_tf32(a) @ round_to_tf32(b))
    assert not judged(p, inputs, truth, base, name, found[name]).ok


@pytest.mark.parametrize(
    "name", ["dq", "dgates", "dk", "dv", "dcompression.key_weight_in", "dcompression.value_weight_out"]
)
def test_gradients_through_compression_too_large_by_a_ten_thousandth_fail_in_float32(name: str) -> None:
    p, inputs, truth, base = compressed_case("mlp", "gaussian", 200)
    assert not judged(p, inputs, truth, base, name, base.gradients[name[1:]] * 1.0001).ok


def test_drift_is_not_seen_beside_the_rounding_of_bfloat16() -> None:
    """The same bounds with and without, to a hundredth."""
    spec = long_spec("mlp")
    p = OracleParameters.from_spec(spec)
    inputs = make_inputs(spec, batch=1, tokens=100, dtype=torch.bfloat16, seed=3)
    base = reference_gradients(p, inputs)
    truth = reference_gradients(p, inputs.to(torch.float64), noise_unit=2.0**-8)
    for name, gradient in truth.gradients.items():
        near, noise = base.gradients[name], truth.noise[f"d{name}"]
        bounds = []
        for drift in (None, truth.drift[f"d{name}"]):
            found = compare(near, gradient, near, dtype=torch.bfloat16, noise=noise, drift=drift)
            bounds.append((found.row.bound, found.norm.bound, found.bias.bound))
        assert all(with_drift < 1.01 * without for without, with_drift in zip(*bounds, strict=True)), (name, bounds)
