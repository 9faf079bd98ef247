"""A cache's tensors and books, with plain torch in place of a package's kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from nsa_gen.runtime.arguments import Arguments
from nsa_gen.runtime.cache import Cache
from nsa_gen.runtime.inference import runs_of
from nsa_gen.runtime.pages import CapacityError
from nsa_gen.runtime.storage import Blocks, Kept, Layout

SIZES = {"Hq": 4, "Hkv": 2, "Dk": 16, "Dv": 8}


class Layer(NamedTuple):
    k: torch.Tensor
    v: torch.Tensor
    k_cmp: torch.Tensor
    v_cmp: torch.Tensor


BLOCKS = Blocks(8, 4)


def extend(starts, lengths, overflow, counts, number, table, capacity, page_size):
    starts.copy_(lengths)
    lengths += number if counts is None else counts


class Small(Cache):
    """Keys and values of 2 heads, and of blocks of 8 tokens, one every 4."""

    _checks = Arguments(torch.float32, (), SIZES)
    _most_tokens = 8
    _kept = {"k": Kept("Dk"), "v": Kept("Dv"), "k_cmp": Kept("Dk", BLOCKS), "v_cmp": Kept("Dv", BLOCKS)}  # noqa: RUF012
    _layer_type = Layer
    _new_workspace = staticmethod(lambda layout, tokens, device: (layout, tokens))

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.written: list[tuple[Any, ...]] = []
        calls = {"cache_extend": extend, "cache_write": lambda *given: self.written.append(given)}
        self._operator = calls.__getitem__
        super().__init__(*arguments, **named)

    def write(self, k: torch.Tensor, v: torch.Tensor, layer: int = 0) -> None:
        self._write({"k": k, "v": v}, None, layer)


def rows(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(*shape, 2, 16), torch.zeros(*shape, 2, 8)


def test_tensors_have_a_row_a_token_and_a_block_contiguous_and_in_pages() -> None:
    whole, paged = Small(3, 21, layers=2), Small(3, 40, page_size=16, pages=5)
    assert [tuple(x.shape) for x in whole.layers[1]] == [(3, 21, 2, 16), (3, 21, 2, 8), (3, 4, 2, 16), (3, 4, 2, 8)]
    assert [tuple(x.shape[:2]) for x in paged.layers[0]] == [(5, 16), (5, 16), (5, 4), (5, 4)]
    assert paged.layout.table is not None and paged.layout.table.shape == (3, 3) and paged.free_pages == 5
    assert whole.workspace == (whole.layout, 1)


def test_a_row_in_pages_is_found_where_the_table_says() -> None:
    layout = Layout(1, 48, 16, torch.tensor([[7, 2, 5]], dtype=torch.int32))
    assert layout.index(None, 0, 1, 33)[0, [0, 15, 16, 32]].tolist() == [112, 127, 32, 80]
    # Block 3 is tokens 12 to 19: it lies in the second page, at the fourth token's place.
    assert BLOCKS.of(20) == 4 and layout.index(BLOCKS, 0, 1, 20)[0].tolist() == [29, 30, 31, 8]
    assert [BLOCKS.of(tokens) for tokens in (0, 7, 8, 11, 12)] == [0, 0, 1, 1, 2]


def test_growth_is_refused_whole_where_one_sequence_has_no_room() -> None:
    cache = Small(2, 40, page_size=16, pages=4)
    cache.extend([17, 3])
    assert (cache.tokens, cache.new_tokens, cache.free_pages) == ((17, 3), (17, 3), 1)
    assert (cache.lengths.tolist(), cache.starts.tolist()) == ([17, 3], [0, 0])
    with pytest.raises(CapacityError, match="2 pages of 16 tokens needed, 1 are free"):
        cache.extend(16)
    with pytest.raises(CapacityError, match="sequence 0 holds 17 of at most 40 tokens; no room for 24 more"):
        cache.extend([24, 0])
    assert cache.tokens == (17, 3) and cache.lengths.tolist() == [17, 3]


def test_a_fork_shares_pages_until_one_of_the_two_writes() -> None:
    cache = Small(2, 64, page_size=16)
    cache.extend([20, 0])
    cache.layers[0].k.fill_(1.0)
    cache.fork(0, 1)
    table = cache.layout.table
    assert table is not None and torch.equal(table[0], table[1]) and cache.free_pages == 6
    cache.extend([0, 1])
    assert table[0, 0] == table[1, 0] and table[0, 1] != table[1, 1] and cache.free_pages == 5
    assert cache.layers[0].k[table[1, 1].long()].eq(1).all(), "the page was copied"
    cache.truncate([3, 64])
    assert cache.tokens == (3, 21) and cache.lengths.tolist() == [3, 21] and cache.new_tokens == (0, 0)
    cache.reset(1)
    assert cache.tokens == (3, 0) and cache.free_pages == 7


def test_after_truncation_by_a_tensor_the_host_knows_a_bound_until_it_looks() -> None:
    cache = Small(2, 32)
    cache.extend(10)
    cache.truncate(torch.tensor([4, 50], dtype=torch.int32))
    assert (cache.tokens, cache.exact) == ((10, 10), False)
    cache.synchronize()
    assert (cache.tokens, cache.exact) == ((4, 10), True)


def test_new_tokens_are_checked_by_name_and_handed_over_in_order() -> None:
    cache = Small(2, 32)
    cache.extend([3, 1])
    k, v = rows(2, 3)
    cache.write(k.requires_grad_(), v)
    ((new, layer, parameters, hidden, starts, lengths, *place),) = cache.written
    assert [x.shape for x in new] == [k.shape, v.shape] and not new[0].requires_grad
    assert layer == list(cache.layers[0]) and (parameters, hidden) == ([], None)
    assert starts is cache.starts and lengths is cache.lengths and place == [None, 32, 0]
    for given, message in (
        (rows(2, 2), r"k: expected at least the 3 tokens that `extend` made room for, got 2"),
        (rows(1, 3), r"k: expected shape \(B=2, N=3, Hkv=2, D=16\), got \(1, 3, 2, 16\)"),
        ((k, rows(2, 4)[1]), r"v: expected shape \(B=2, N=3, Hkv=2, D=8\), got \(2, 4, 2, 8\)"),
        ((k[0], v), r"k: expected a tensor \(B, N, Hkv, D\), got shape \(3, 2, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.write(*given)


def test_sequences_side_by_side_of_equal_lengths_are_one_run() -> None:
    assert runs_of((5, 5, 9, 5, 5), (2, 2, 2, 0, 1)) == [(0, 2, 5, 2), (2, 3, 9, 2), (4, 5, 5, 1)]
    assert runs_of((3,), (0,)) == []
