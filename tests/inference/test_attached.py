"""A cache in the caller's memory: an engine that forms its batch anew each step finds what a cache of its own would."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import DEVICE, Operator, operator_of

PAGE, PAGES, WIDTH = 16, 12, 4
PASSES = ("forward", "decode")


class Engine:
    """Requests by number: tokens held and pages, which are taken at random from a pool of one allocation."""

    def __init__(self, module: Any, rows: int) -> None:
        self.shapes = module.NSACache.page_shapes(PAGE)
        # One buffer, as an engine that gives each layer so many bytes a page; NaN where nothing was written.
        numbers = sum(Tensor.numel(torch.empty(shape)) for shape, _ in self.shapes.values())
        memory, at, layer = torch.full((PAGES * numbers,), float("nan"), device=DEVICE), 0, {}
        for name, (shape, dtype) in self.shapes.items():
            assert dtype == memory.dtype
            count = PAGES * torch.Size(shape).numel()
            layer[name] = memory[at : at + count].view(PAGES, *shape)
            at += count
        self.table = torch.full((rows, WIDTH), PAGES + 99, dtype=torch.int32, device=DEVICE)  # no page at all
        self.cache = module.NSACache.attach([layer], self.table, page_size=PAGE, max_new_tokens=2)
        self.free = random.Random(0).sample(range(PAGES), PAGES)
        self.held: dict[int, int] = {}
        self.owned: dict[int, list[int]] = {}

    def step(self, batch: list[tuple[int, int]]) -> None:
        """Give (request, new tokens) in this order pages, and rows of the table."""
        rows = self.table.shape[0]
        tokens, new = [0] * rows, [0] * rows
        self.table.fill_(PAGES + 99)
        for row, (request, more) in enumerate(batch):
            held = self.held[request] = self.held.get(request, 0) + more
            pages = self.owned.setdefault(request, [])
            while len(pages) * PAGE < held:
                pages.append(self.free.pop())
            self.table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            tokens[row], new[row] = held, more
        self.cache.assign(tokens, new)


def draw(op: Operator, tokens: int, seed: int) -> dict[str, Tensor]:
    """q, k, v and gates of one sequence."""
    generator, heads = torch.Generator().manual_seed(seed), op.spec.heads
    shapes = {
        "q": (heads.query, op.spec.head_dim.qk),
        "k": (heads.kv, op.spec.head_dim.qk),
        "v": (heads.kv, op.spec.head_dim.v),
        "gates": (heads.query, 3),
    }
    return {name: torch.randn(1, tokens, *shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}


def rows_of(inputs: dict[int, dict[str, Tensor]], engine: Engine, batch: list[tuple[int, int]]) -> dict[str, Tensor]:
    """The new tokens of a batch, a row each, padded with NaN."""
    most, rows = max(new for _, new in batch), engine.table.shape[0]
    found = {}
    for name, example in next(iter(inputs.values())).items():
        padded = torch.full((rows, most, *example.shape[2:]), float("nan"), device=DEVICE)
        for row, (request, new) in enumerate(batch):
            end = engine.held[request]
            padded[row, :new] = inputs[request][name][0, end - new : end]
        found[name] = padded
    return found


def test_a_batch_formed_anew_each_step_in_an_engines_pages_gives_the_bits_of_a_cache_of_its_own() -> None:
    op = operator_of(passes=PASSES)
    engine = Engine(op.module, rows=3)
    inputs = {request: draw(op, 40, request) for request in range(4)}
    own = {
        request: op.module.NSACache(3, WIDTH * PAGE, page_size=PAGE, max_new_tokens=2, device=DEVICE)
        for request in inputs
    }
    # Prompts of ragged lengths, a chunk behind them, tokens one and two at a time; rows change, one comes, one goes.
    steps = [
        [(0, 21), (1, 9)],
        [(1, 1), (2, 18), (0, 1)],
        [(2, 1), (0, 2)],
        [(3, 20), (0, 1), (2, 2)],
        [(0, 1), (3, 1), (1, 2)],
    ]
    for batch in steps:
        engine.step(batch)
        new = rows_of(inputs, engine, batch)
        engine.cache.write(new["k"], new["v"])
        attend = op.module.nsa_prefill if new["q"].shape[1] > 2 else op.module.nsa_decode
        o = attend(new["q"], engine.cache, new["gates"])
        for row, (request, more) in enumerate(batch):
            end, alone = engine.held[request], own[request]
            first = {name: x[:, end - more : end].expand(3, -1, -1, -1) for name, x in inputs[request].items()}
            alone.extend([more, 0, 0])
            alone.write(first["k"], first["v"])
            there = attend(first["q"], alone, first["gates"])
            assert torch.equal(o[row, :more], there[0, :more]), (batch, request)
            assert not o[row, more:].any()


def test_two_rows_that_name_the_same_full_page_share_a_beginning() -> None:
    op = operator_of(passes=PASSES)
    engine, common = Engine(op.module, rows=2), draw(op, 40, 0)
    engine.step([(0, 36)])
    new = rows_of({0: common}, engine, [(0, 36)])
    engine.cache.write(new["k"], new["v"])
    # A second request begins with the first 32 tokens: two pages, compressed blocks included.
    engine.held[1], engine.owned[1] = 32, engine.owned[0][:2]
    batch = [(1, 2), (0, 2)]
    engine.step(batch)
    new = rows_of({0: common, 1: {name: x.clone() for name, x in common.items()}}, engine, batch)
    engine.cache.write(new["k"], new["v"])
    o = op.module.nsa_decode(new["q"], engine.cache, new["gates"])
    whole = op.module.nsa_attention(*(common[name] for name in ("q", "k", "v", "gates")))
    torch.testing.assert_close(o[0], whole[0, 32:34])
    torch.testing.assert_close(o[1], whole[0, 36:38])


def test_what_is_said_of_a_batch_is_checked_and_changes_nothing_where_it_is_wrong() -> None:
    module = operator_of(passes=PASSES).module
    engine = Engine(module, rows=2)
    engine.step([(0, 5), (1, 3)])
    before = engine.cache.lengths.clone(), engine.cache.tokens
    for arguments, error, words in [
        (([65, 0], [1, 0]), module.CapacityError, "sequence 0 is to hold 65 of at most 64 tokens"),
        (([4, 2], [1, 3]), ValueError, "new_tokens: expected at most the 2 tokens of sequence 1, got 3"),
        (([4], [1]), ValueError, "tokens: expected a number, or one for each of 2 sequences, got 1"),
        (([4, 1.5], [1, 1]), TypeError, "tokens: expected a whole number, got float 1.5"),
    ]:
        with pytest.raises(error, match=words):
            engine.cache.assign(*arguments)
    assert torch.equal(engine.cache.lengths, before[0]) and engine.cache.tokens == before[1]
    with pytest.raises(RuntimeError, match="fork: the pages are the caller's"):
        engine.cache.fork(0, 1)
    with pytest.raises(RuntimeError, match="assign: expected a cache in the caller's memory"):
        module.NSACache(2, 64, page_size=16, device=DEVICE).assign([1, 1], [1, 1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"page_size": 24}, "page_size: expected one of 16, 32, 64, 128, 256, got 24"),
        ({"capacity": 65}, "capacity: expected at most the 64 tokens of W pages, got 65"),
        ({"table": torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)}, "table: expected a contiguous int32 tensor"),
        ({"table": torch.zeros(4, 2, dtype=torch.int32, device=DEVICE).T}, "table: expected a contiguous int32 tensor"),
        ({"layers": []}, "layers: expected the tensors of one layer or more"),
        ({"layers": [{"k": None}]}, r"layers\[0\]: expected tensors by name: k, v, k_cmp, v_cmp; got k"),
        ({"rows": 8}, r"layers\[0\]\['v'\]: expected shape .*16.*got \(3, 8, 1, 16\)"),
        ({"strided": True}, r"layers\[0\]\['k_cmp'\]: expected a contiguous tensor, got strides"),
    ],
)
def test_memory_that_does_not_fit_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    cache = operator_of(passes=PASSES).module.NSACache
    layer = {name: torch.zeros(3, *shape, device=DEVICE) for name, (shape, _) in cache.page_shapes(PAGE).items()}
    if "rows" in changes:
        layer["v"] = layer["v"][:, : changes.pop("rows")].contiguous()
    if changes.pop("strided", False):
        layer["k_cmp"] = torch.zeros(6, *layer["k_cmp"].shape[1:], device=DEVICE)[::2]
    arguments: dict[str, Any] = {
        "layers": [layer],
        "table": torch.zeros(2, WIDTH, dtype=torch.int32, device=DEVICE),
        "page_size": PAGE,
        **changes,
    }
    with pytest.raises(ValueError, match=words):
        cache.attach(arguments.pop("layers"), arguments.pop("table"), **arguments)
