"""The bounds let honest rounding pass and catch errors that a single tolerance would let through."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsa_gen.verification import OracleParameters, Reference, compare, make_inputs, reference_gradients
from nsa_gen.verification.reference.tolerance import HARDWARE_UNITS, unit_roundoff
from tests.verification.verification_specs import spec_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = 300


@functools.cache
def references(dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Reference, Reference]:
    """Truth and baseline on the same indices."""
    spec = spec_of(phi="mlp", position="learned", window=40)
    p = OracleParameters.from_spec(spec)
    inputs = make_inputs(spec, batch=2, tokens=tokens, dtype=dtype, seed=1)
    baseline = reference_gradients(p, inputs)
    chosen = baseline.outputs.indices, baseline.outputs.counts
    return reference_gradients(p, inputs.to(torch.float64), *chosen, noise_unit=unit_roundoff(dtype)), baseline


def compared(dtype: torch.dtype, name: str, change: Callable[[Tensor], Tensor], tokens: int = TOKENS):
    truth, baseline = references(dtype, tokens)
    noise = truth.noise.get(name)
    honest = baseline.tensors()[name]
    return compare(
        change(honest.clone()), truth.tensors()[name], honest, dtype=dtype, noise=noise, rows=name[:3] != "lse"
    )


QUANTITIES = ["o", "o_cmp", "lse_slc", "dq", "dk", "dv", "dgates", "dcompression.key_weight_in"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", QUANTITIES)
def test_honest_rounding_passes_with_room_to_spare(name: str, dtype: torch.dtype) -> None:
    def rounded_once_more(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        unit = torch.finfo(dtype).eps / 2
        return (x.double() * (1 + unit * (2 * torch.rand(x.shape, generator=generator) - 1))).to(x.dtype)

    assert compared(dtype, name, lambda x: x).usage <= 0.5
    assert compared(dtype, name, rounded_once_more).ok


def shifted_element(x: Tensor) -> Tensor:
    x.view(-1)[-x.shape[-1] // 2] += x.abs().mean()
    return x


def zeroed_last_row(x: Tensor) -> Tensor:
    x.view(-1, x.shape[-1])[-1] = 0
    return x


def scaled(x: Tensor) -> Tensor:
    return (x.double() * 1.01).to(x.dtype)


def late_token_zeroed(x: Tensor) -> Tensor:
    x[:, -3] = 0
    return x


def rows_swapped(x: Tensor) -> Tensor:
    x[:, [200, 201]] = x[:, [201, 200]]
    return x


INJECTED = [shifted_element, zeroed_last_row, scaled, late_token_zeroed, rows_swapped]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["o", "o_cmp", "o_win", "dq", "dk", "dv"])
@pytest.mark.parametrize("change", INJECTED)
def test_injected_errors_are_caught_at_every_dtype(change, name: str, dtype: torch.dtype) -> None:
    result = compared(dtype, name, change)
    assert not result.ok, result.describe()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dcompression.key_weight_in", "dcompression.value_weight_out"])
@pytest.mark.parametrize("change", [zeroed_last_row, scaled])
def test_errors_in_parameter_gradients_are_caught(change, name: str, dtype: torch.dtype) -> None:
    assert not compared(dtype, name, change).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_lse_in_base_two_is_caught(dtype: torch.dtype) -> None:
    assert not compared(dtype, "lse_win", lambda x: x / math.log(2)).ok


def test_an_error_of_one_part_in_ten_thousand_is_caught_in_float32() -> None:
    assert not compared(torch.float32, "o", lambda x: x * 1.0001).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_truth_of_zero_wants_zero_where_nothing_rounds(dtype: torch.dtype) -> None:
    assert compared(dtype, "o_cmp", lambda x: x, tokens=5).usage == 0
    result = compared(dtype, "o_cmp", lambda x: x + 1e-4, tokens=5)
    assert not result.ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_that_cancels_to_zero_may_be_as_large_as_rounding_makes_it(dtype: torch.dtype) -> None:
    truth, _ = references(dtype, 1)
    noise = truth.noise["dq"]
    unit = torch.finfo(dtype).eps / 2
    assert truth.tensors()["dq"].abs().max() < 1e-12
    assert compared(dtype, "dq", lambda x: x + 0.4 * unit * noise.to(x.dtype), tokens=1).ok
    assert not compared(dtype, "dq", lambda x: x + 30 * unit * noise.to(x.dtype), tokens=1).ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_must_be_where_the_truth_has_it(value: float) -> None:
    def spoiled(x: Tensor) -> Tensor:
        x[1, 7, 0, 0] = value
        return x

    result = compared(torch.float32, "o", spoiled)
    assert not result.ok and "(1, 7, 0, 0)" in result.problem
    assert not compared(torch.float32, "lse_cmp", lambda x: x.clamp(min=-100)).ok


def test_another_shape_is_a_problem_not_a_broadcast() -> None:
    result = compared(torch.float32, "o", lambda x: x[:1])
    assert not result.ok and "expected shape" in result.problem


def test_nothing_to_compare_is_fine() -> None:
    empty = torch.empty(0, 4, 2, 8)
    assert compare(empty, empty.double(), empty, dtype=torch.float32).ok


def flash_style(inputs, scale: float, window: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Window attention of one head as a kernel computes it: tiles of keys, online softmax, dS by way of delta."""
    q, k, v, do = (x[0, :, 0].float() for x in (inputs.q, inputs.k, inputs.v, inputs.do))
    t = torch.arange(q.shape[0])
    unseen = (t > t[:, None]) | (t <= t[:, None] - window)
    m, total, acc = torch.full((len(t), 1), -1e30), torch.zeros(len(t), 1), torch.zeros(len(t), v.shape[1])
    log2e = math.log2(math.e)
    for start in range(0, len(t), 32):
        tile = slice(start, start + 32)
        s = (q @ k[tile].T * (scale * log2e)).masked_fill(unseen[:, tile], -math.inf)
        m_new = torch.maximum(m, s.amax(-1, keepdim=True))
        p = torch.exp2(s - m_new)
        total = total * torch.exp2(m - m_new) + p.sum(-1, keepdim=True)
        acc = acc * torch.exp2(m - m_new) + p.to(dtype).float() @ v[tile]
        m = m_new
    o = (acc / total).to(dtype)
    lse = m / log2e + total.log()
    p = torch.exp(q @ k.T * scale - lse).masked_fill(unseen, 0)
    ds = (p * (do @ v.T - (do * o.float()).sum(-1, keepdim=True))).to(dtype).float() * scale
    found = {"o": o, "lse_win": lse[:, 0], "dq": ds @ k, "dk": ds.T @ q, "dv": p.to(dtype).float().T @ do}
    return {name: x[None, :, None].to(dtype if name[0] != "l" else torch.float32) for name, x in found.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 33, 300])
@pytest.mark.parametrize("kind", ["gaussian", "spread", "rising", "falling", "hot"])
def test_a_kernels_other_order_of_rounding_passes(kind: str, tokens: int, dtype: torch.dtype) -> None:
    spec = spec_of(branches="win", gate="none", window=70, query_heads=1, kv_heads=1)
    p = OracleParameters.from_spec(spec)
    for seed in range(4):
        inputs = make_inputs(spec, batch=1, tokens=tokens, dtype=dtype, seed=seed, kind=kind)
        baseline = reference_gradients(p, inputs)
        truth = reference_gradients(p, inputs.to(torch.float64), noise_unit=unit_roundoff(dtype))
        for name, actual in flash_style(inputs, p.scale, p.window, dtype).items():
            noise = truth.noise.get(name)
            near = baseline.tensors()[name]
            result = compare(actual, truth.tensors()[name], near, dtype=dtype, noise=noise, rows=name[0] != "l")
            assert result.ok, (name, seed, result.describe())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_elements_may_each_be_a_roundoff_off_and_the_norm_of_many_may_not(dtype: torch.dtype) -> None:
    unit = unit_roundoff(dtype) * HARDWARE_UNITS.get(dtype, 1.0)

    def norm_is_fine(count: int, error: float) -> bool:
        truth = torch.ones(count, 1, dtype=torch.float64)
        signs = 1.0 - 2.0 * (torch.arange(count, dtype=torch.float64)[:, None] % 2)
        norm = compare(truth + error * unit * signs, truth, truth, dtype=dtype).norm
        return norm.error <= norm.bound

    assert norm_is_fine(2, 0.99) and not norm_is_fine(2, 1.2)
    assert norm_is_fine(4096, 0.55) and not norm_is_fine(4096, 0.65)
