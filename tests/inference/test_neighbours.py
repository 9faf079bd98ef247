"""What a sequence's bits depend on: itself, and how many share the cache; not what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.verification.calls import steady_products
from nsa_gen.verification.cases import Case
from nsa_gen.verification.properties import PROPERTIES, Trial
from tests.support import DEVICE, operator_of

CAPACITY, LENGTH, NEW = 400, 333, 3
PASSES = ("forward", "backward", "decode")


def drawn(tokens: int, seed: int) -> dict[str, Tensor]:
    """A sequence of its own: keys and values of all its tokens, queries and gates of the newest."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"k": (tokens, 1, 16), "v": (tokens, 1, 16), "q": (NEW, 2, 16), "gates": (NEW, 2, 3)}
    return {name: torch.randn(*shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}


def attended(
    module: Any, lengths: list[int], place: int, seed: int, page_size: int | None, prefill: bool
) -> list[Tensor]:
    """Outputs, by branch too, of the sequence at `place`, which is always the same; the others are of a seed."""
    if DEVICE.type == "cpu":
        steady_products()
    batch = [drawn(length, 7 if b == place else seed + b) for b, length in enumerate(lengths)]
    cache = module.NSACache(len(lengths), CAPACITY, page_size=page_size, max_new_tokens=NEW, device=DEVICE)

    def write(first: list[int], counts: list[int]) -> None:
        cache.extend(counts)
        rows = torch.arange(max(counts), device=DEVICE)
        at = [(rows + start).clamp(max=length - 1) for start, length in zip(first, lengths, strict=True)]
        k, v = (torch.stack([x[name][rows] for x, rows in zip(batch, at, strict=True)]) for name in "kv")
        cache.write(k, v)

    held = [length - NEW for length in lengths]
    write([0] * len(lengths), held)
    write(held, [NEW] * len(lengths))
    attend = module.nsa_prefill if prefill else module.nsa_decode
    q, gates = (torch.stack([x[name] for x in batch]) for name in ("q", "gates"))
    o, aux = attend(q, cache, gates, return_aux=True)
    return [o[place], *(x[place] for x in aux)]


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
def test_a_sequences_bits_depend_on_no_other_in_the_cache(prefill: bool, page_size: int | None) -> None:
    module = operator_of(passes=PASSES).module
    first = attended(module, [LENGTH, 21, 250], 0, 100, None, prefill)
    for lengths, place in (([LENGTH, 390, 9], 0), ([40, LENGTH, LENGTH], 1)):
        found = attended(module, lengths, place, 500, page_size, prefill)
        assert all(torch.equal(x, y) for x, y in zip(first, found, strict=True)), (lengths, place)


def test_how_many_share_the_cache_changes_decode_by_rounding_alone() -> None:
    module = operator_of(passes=PASSES).module
    alone = attended(module, [LENGTH], 0, 100, None, False)
    splits = module.decode.splits_of("decode_compressed", 1, 512, DEVICE)
    assert splits > module.decode.splits_of("decode_compressed", 4, 512, DEVICE), "the work is shared otherwise"
    found = attended(module, [LENGTH, 9, 9, 9], 0, 100, None, False)
    for x, y in zip(alone, found, strict=True):
        assert torch.equal(x, y) if x.dtype == torch.int32 else (x - y).abs().max() <= 8 * 2.0**-23 * x.abs().max()


@pytest.mark.parametrize("schedule", [{}, {"KEY_MAJOR_FORWARD": 0, "KEY_MAJOR_DQ": 0}, {"LOCAL_IN_WINDOW": 1}], ids=str)
def test_a_batch_entrys_bits_depend_on_no_other(schedule: dict[str, int]) -> None:
    op = operator_of(count=4, local=2, window=40)
    with op.configs.override("selected_attention", CHUNK_TOKENS=20, **schedule):
        rows = PROPERTIES["neighbours"].check(Trial(op.spec, op.module, Case(9, 90, batch=2), 3, DEVICE.type))
    assert {"neighbours", "neighbours: sums: dk"} <= {row.quantity for row in rows}
    assert [row for row in rows if not row.ok] == []
