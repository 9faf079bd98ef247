"""A cache of e4m3 codes: which code a number becomes, what is read of it, its size and its scales."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import DEVICE, operator_of

PASSES = ("forward", "decode")


def package(**changes: Any) -> Any:
    return operator_of(cache="e4m3", passes=PASSES, **changes).module


def own_token(heads: int = 1) -> Any:
    """A package whose tokens attend to themselves alone, so that o is what the cache holds of v."""
    return package(branches="win", gate="none", window=1, group=1, kv_heads=heads)


def written(cache: Any, k: Tensor, v: Tensor) -> None:
    cache.extend(v.shape[1])
    cache.write(k, v)


def test_a_number_becomes_the_nearest_code_and_the_even_one_of_two() -> None:
    module = own_token()
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).double()
    numbers = numbers[~numbers.isnan()].unique()
    between = ((numbers[1:] + numbers[:-1]) / 2).float()
    near = torch.stack([torch.nextafter(between, torch.tensor(sign * math.inf)) for sign in (-1, 1)]).flatten()
    drawn = torch.randn(280, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 280)
    edges = torch.tensor([0.0, -0.0, 448.0, 449.0, 1e30, math.inf, -math.inf, math.nan, 1e-30, 2.0**-10, -(2.0**-10)])
    x = torch.cat((numbers.float(), between, near, drawn, edges))
    tokens = math.ceil(len(x) / 16)
    v = torch.nn.functional.pad(x, (0, tokens * 16 - len(x))).view(1, tokens, 1, 16).to(DEVICE)
    cache = module.NSACache(1, tokens, device=DEVICE)
    written(cache, torch.zeros_like(v), v)
    expected = v.cpu().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    found = cache.layers[0].v.cpu()
    is_nan = v.cpu().isnan()
    assert torch.equal(found[~is_nan], expected[~is_nan])
    assert ((found[is_nan] & 0x7F) == 0x7F).all()


@pytest.mark.parametrize("attend", ["nsa_decode", "nsa_prefill"])
def test_every_code_is_read_as_its_number_times_its_heads_scale(attend: str) -> None:
    module = own_token(heads=2)
    cache = module.NSACache(1, 16, max_new_tokens=1, device=DEVICE)
    scales = torch.tensor([0.25, 3.0], device=DEVICE)
    cache.set_scales(v=scales)
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).expand(-1, -1, 2, -1).to(DEVICE)
    zeros = torch.zeros(1, 1, 2, 16, device=DEVICE)
    found = []
    for token in range(16):
        written(cache, zeros, zeros)
        cache.layers[0].v[:, token] = codes[:, token]
        found.append(getattr(module, attend)(zeros, cache))
    numbers = codes.cpu().view(torch.float8_e4m3fn).float().to(DEVICE) * scales[:, None]
    torch.testing.assert_close(torch.cat(found, 1), numbers, rtol=0, atol=0, equal_nan=True)


def test_raw_keys_and_values_take_a_byte_each_and_compressed_ones_what_they_took() -> None:
    module = package()
    shapes = module.NSACache.page_shapes(16)
    assert {name: dtype for name, (_, dtype) in shapes.items()} == {
        "k": torch.uint8,
        "v": torch.uint8,
        "k_cmp": torch.float32,
        "v_cmp": torch.float32,
    }
    layer = {name: torch.zeros(3, *shape, dtype=dtype, device=DEVICE) for name, (shape, dtype) in shapes.items()}
    table = torch.tensor([[2, 0]], dtype=torch.int32, device=DEVICE)
    cache = module.NSACache.attach([layer], table, page_size=16)
    cache.set_scales(k=torch.full((1,), 0.5, device=DEVICE))
    cache.assign([20], [20])
    k = torch.full((1, 20, 1, 16), 3.0, device=DEVICE)
    cache.write(k, k)
    assert layer["k"][2].view(torch.float8_e4m3fn).float().unique().tolist() == [6.0]
    assert layer["k_cmp"][2, :, 0, 0].unique().tolist() == [0.0, 3.0]


def test_forks_copy_codes_and_leave_scales_alone() -> None:
    module = package()
    for page_size in (None, 16):
        cache = module.NSACache(2, 40, page_size=page_size, device=DEVICE)
        cache.set_scales(v=torch.full((1,), 0.125, device=DEVICE))
        scales = cache.layers[0].scales.clone()
        x = torch.randn(2, 20, 1, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        cache.extend([20, 0])
        cache.write(x, x)
        cache.fork(0, 1, 18)
        q, gates = torch.ones(2, 1, 2, 16, device=DEVICE), torch.zeros(2, 1, 2, 3, device=DEVICE)
        cache.truncate([18, 18])
        cache.extend(1)
        cache.write(x[:1, :1].expand(2, -1, -1, -1), x[:1, :1].expand(2, -1, -1, -1))
        o = module.nsa_decode(q, cache, gates)
        assert torch.equal(o[0], o[1]) and o.isfinite().all()
        assert torch.equal(cache.layers[0].scales, scales)


def test_scales_are_checked_by_name() -> None:
    cache = package(kv_heads=2).NSACache(1, 16, layers=2, device=DEVICE)
    good = torch.ones(2, device=DEVICE)
    for scales, error, words in [
        ({"keys": good}, TypeError, "keys: expected scales of k, v"),
        ({"k": good[:1]}, ValueError, r"k: expected shape \(Hkv=2\), got \(1,\)"),
        ({"k": good.double()}, TypeError, "k: expected dtype torch.float32, which .*got torch.float64"),
        ({"k": good, "layer": 2}, ValueError, "layer: expected 0 to 1, got 2"),
    ]:
        with pytest.raises(error, match=words):
            cache.set_scales(**scales)
    plain = operator_of(passes=PASSES).module.NSACache(1, 16, device=DEVICE)
    with pytest.raises(TypeError, match="k: expected scales of nothing: the cache has no codes"):
        plain.set_scales(k=torch.ones(1, device=DEVICE))
