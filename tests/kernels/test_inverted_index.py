"""The inverted index: slots in order of the lists that they belong to."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from tests.support import DEVICE, operator_of


@pytest.fixture(scope="module")
def index() -> ModuleType:
    op = operator_of("slc", gate="none", indices="input", count=3, kv_heads=2)
    return importlib.import_module(f"{op.module.__name__}.kernels.inverted_index")


@pytest.mark.parametrize(("tokens", "most_tokens"), [(1, 64), (45, 64), (70, 64), (900, 2048), (900, 64)])
@pytest.mark.parametrize("kind", ["any", "one", "falling"])
def test_few_slots_are_sorted_as_many_are(
    index: ModuleType, tokens: int, most_tokens: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tile of slots and over several, with keys that no slot has, in one chunk and in several."""
    layout = index.Layout(tokens, min(tokens, most_tokens), 5, 5)
    slots = tokens * index.SLOTS_PER_TOKEN.value
    lists = torch.randint(0, 11, (slots,), generator=torch.Generator().manual_seed(tokens)).masked_fill(
        torch.arange(slots) % 7 == 3, 10
    )
    if kind == "one":
        lists = torch.full((slots,), 4)
    elif kind == "falling":
        lists = torch.arange(slots, 0, -1) % 11
    chunks = torch.arange(slots) // layout.chunk_slots
    keys = (chunks * 11 + lists).to(torch.int32).to(DEVICE)
    assert layout.chunk_keys == 11
    monkeypatch.setattr(index, "MOST_COMPARISONS", 0)
    few, many = index.sort_few_slots(keys, layout), index.sort_slots(keys, layout)
    for found, expected in zip(few, many, strict=True):
        assert found.dtype == torch.int32 and torch.equal(found, expected)
