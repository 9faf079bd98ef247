"""The chunked driver of reference gradients agrees with autograd over the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa_gen.verification import OracleParameters, make_inputs, reference_attention, reference_gradients
from tests.verification.verification_specs import spec_of


def direct(p: OracleParameters, inputs) -> dict[str, torch.Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.differentiable().items()}
    o = reference_attention(p, **inputs.replace_differentiable(leaves).arguments()).o
    found = torch.autograd.grad(o, list(leaves.values()), inputs.do, allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


@pytest.mark.parametrize("kv", ["shared", "per_branch"])
@pytest.mark.parametrize("phi", ["mean", "weighted", "linear", "mlp", "external"])
@pytest.mark.parametrize("tokens", [37, (12, 0, 1, 30)])
def test_chunked_gradients_equal_direct_autograd(phi: str, kv: str, tokens) -> None:
    spec = spec_of(phi=phi, position="none" if phi == "external" else "learned", kv=kv)
    p = OracleParameters.from_spec(spec)
    inputs = make_inputs(spec, batch=2, tokens=tokens, dtype=torch.float64, seed=1)
    indices = reference_attention(p, **inputs.arguments()).indices
    inputs = replace(inputs, indices=indices)
    expected = direct(p, inputs)
    for chunk_bytes in (2000, 1 << 27):
        reference = reference_gradients(p, inputs, indices, chunk_bytes=chunk_bytes)
        assert reference.gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(reference.gradients[name], gradient, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("branches", ["cmp", "slc", "win"])
def test_single_branches_and_fewer_queries_than_keys_are_driven_too(branches: str) -> None:
    spec = spec_of(branches=branches, indices_given=True, gate="given")
    p = OracleParameters.from_spec(spec)
    inputs = make_inputs(spec, batch=1, tokens=9, tokens_kv=50, dtype=torch.float64, seed=2)
    reference = reference_gradients(p, inputs, noise_unit=1.0)
    for name, gradient in direct(p, inputs).items():
        torch.testing.assert_close(reference.gradients[name], gradient, rtol=1e-11, atol=1e-12)
        assert reference.noise[f"d{name}"].shape == gradient.shape
    assert torch.equal(reference.outputs.o, reference_attention(p, **inputs.arguments()).o)


@pytest.mark.parametrize("phi", ["mean", "weighted", "linear", "mlp"])
def test_noise_scales_are_the_spread_of_results_under_independent_disturbance(phi: str) -> None:
    """Disturb values and the output's gradient: dv, o and (through phi) dk must move by about their noise scale."""
    spec = spec_of(branches="cmp", phi=phi, position="none", gate="none", query_heads=2, kv_heads=1)
    p = OracleParameters.from_spec(spec)
    inputs = make_inputs(spec, batch=1, tokens=48, dtype=torch.float64, seed=3)
    base = reference_gradients(p, inputs, noise_unit=1.0)
    u, generator = 1e-6, torch.Generator().manual_seed(4)
    squares: dict[str, torch.Tensor] = {}
    draws = 12
    for _ in range(draws):
        do = inputs.do * (1 + u * torch.randn(inputs.do.shape, generator=generator, dtype=torch.float64))
        moved = reference_gradients(p, replace(inputs, do=do))
        for name, gradient in moved.gradients.items():
            squares[name] = squares.get(name, 0) + (gradient - base.gradients[name]).square() / draws / u**2
    for name, spread in squares.items():
        ratio = (spread.sum() / base.noise[f"d{name}"].double().square().sum()).sqrt().item()
        assert 0.1 < ratio < 3, (name, ratio)


def test_rows_whose_gradient_cancels_have_a_noise_scale() -> None:
    spec = spec_of(branches="win", gate="none")
    p = OracleParameters.from_spec(spec)
    inputs = make_inputs(spec, batch=1, tokens=1, dtype=torch.float64, seed=5)
    reference = reference_gradients(p, inputs, noise_unit=1.0)
    assert reference.gradients["q"].abs().max() < 1e-14
    assert (reference.noise["dq"] > 0.01).all()
