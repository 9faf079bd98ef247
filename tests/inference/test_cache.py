"""The cache's books: room, pages, what is taken back and what is shared, and the errors that name the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import DEVICE, operator_of

PASSES = ("forward", "decode")


def package(**changes: Any) -> Any:
    return operator_of(passes=PASSES, **changes).module


def rows(module: Any, batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(batch, tokens, 1, 16, generator=generator).to(DEVICE) for _ in range(2)]
    return draw[0], draw[1]


def append(cache: Any, module: Any, counts: int | list[int], seed: int = 0) -> None:
    most = counts if isinstance(counts, int) else max(counts)
    cache.extend(counts)
    k, v = rows(module, cache.layout.batch, most, seed)
    cache.write(k, v)


def snapshot(cache: Any) -> list[Tensor]:
    return [x.clone() for layer in cache.layers for x in layer] + [cache.lengths.clone(), cache.starts.clone()]


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_cache_that_has_no_room_says_so_and_stays_as_it_was(page_size: int | None) -> None:
    module = package()
    cache = module.NSACache(2, 40, page_size=page_size, device=DEVICE)
    append(cache, module, [30, 5])
    before, tokens, free = snapshot(cache), cache.tokens, cache.free_pages
    with pytest.raises(module.CapacityError, match="sequence 0 holds 30 of at most 40 tokens"):
        cache.extend([11, 1])
    assert cache.tokens == tokens and cache.free_pages == free
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(cache), strict=True))
    append(cache, module, [10, 1])
    assert cache.tokens == (40, 6) and cache.lengths.tolist() == [40, 6]


def test_pages_run_out_before_anything_is_changed_and_come_back_when_tokens_go() -> None:
    module = package()
    cache = module.NSACache(2, 64, page_size=16, pages=4, device=DEVICE)
    append(cache, module, [33, 10])
    assert cache.free_pages == 0
    table = cache.layout.table.clone()
    with pytest.raises(module.CapacityError, match="1 pages of 16 tokens needed, 0 are free"):
        cache.extend([0, 7])
    assert torch.equal(table, cache.layout.table) and cache.tokens == (33, 10)
    cache.truncate([32, 10])
    assert cache.free_pages == 1
    append(cache, module, [0, 7])
    assert cache.free_pages == 0
    cache.reset(0)
    assert cache.tokens == (0, 17) and cache.free_pages == 2
    cache.reset()
    assert cache.tokens == (0, 0) and cache.free_pages == 4


def test_a_shared_page_is_copied_in_time_where_the_host_does_not_know_that_it_will_be_written() -> None:
    module = package()
    cache = module.NSACache(2, 64, page_size=16, device=DEVICE)
    append(cache, module, [40, 0])
    cache.fork(0, 1)
    append(cache, module, [0, 1], seed=1)
    before = cache.layers[0].k.flatten(0, 1)[cache.layout.index(None, 0, 1, 40)].clone()
    # Within a page that sequence 0 still uses; the host believes that 41 tokens are held.
    cache.truncate(torch.tensor([40, 20], dtype=torch.int32, device=DEVICE))
    append(cache, module, [0, 1], seed=2)
    assert cache.lengths.tolist() == [40, 21] == list(cache.tokens)
    assert torch.equal(before, cache.layers[0].k.flatten(0, 1)[cache.layout.index(None, 0, 1, 40)])


def test_a_sequence_that_is_forgotten_has_found_no_lack_of_room() -> None:
    module = package()
    cache = module.NSACache(2, 64, device=DEVICE)
    append(cache, module, [4, 4])
    cache.overflow.fill_(1)  # as a replayed graph leaves it
    cache.reset(0)
    with pytest.raises(module.CapacityError, match="sequences 1: no room"):
        cache.synchronize()
    cache.overflow.fill_(1)
    cache.reset()
    cache.synchronize()
    assert cache.tokens == (0, 0)


def test_where_no_page_is_shared_the_lengths_stay_on_the_device() -> None:
    module = package()
    cache = module.NSACache(2, 64, page_size=16, device=DEVICE)
    append(cache, module, [20, 20])
    cache.fork(0, 1)
    cache.reset(0)  # the pages have one user again
    cache.truncate(torch.tensor([0, 10], dtype=torch.int32, device=DEVICE))
    append(cache, module, [0, 1])
    assert cache.tokens == (0, 21) and not cache.exact


def test_counts_may_come_from_anything_that_gives_them_once() -> None:
    module = package()
    cache = module.NSACache(2, 64, device=DEVICE)
    cache.extend(count for count in (3, 4))
    assert cache.lengths.tolist() == [3, 4] == list(cache.tokens)
    with pytest.raises(TypeError, match=r"^new_tokens: expected whole numbers, got float 1.5"):
        cache.extend(1.5)
    with pytest.raises(ValueError, match=r"^page_size: expected one of 16"):
        module.NSACache(2, 64, page_size=16.0, device=DEVICE)


def test_a_page_that_sequences_share_is_copied_by_the_first_to_write_and_kept_by_the_last() -> None:
    module = package()
    cache = module.NSACache(3, 64, page_size=16, pages=6, device=DEVICE)
    append(cache, module, [20, 0, 0])
    cache.fork(0, 1)
    cache.fork(0, 2, 16)
    assert cache.free_pages == 4
    shared = cache.layout.table[:, 0].tolist()
    assert len(set(shared)) == 1 and cache.layout.table[0, 1] == cache.layout.table[1, 1]
    held = cache.layers[0].k[cache.layout.table[0, 1], :4].clone()
    append(cache, module, [1, 1, 0], seed=3)
    assert cache.free_pages == 3, "one copy is enough for two writers"
    assert cache.layout.table[0, 1] != cache.layout.table[1, 1]
    for sequence in (0, 1):
        assert torch.equal(cache.layers[0].k[cache.layout.table[sequence, 1], :4], held)
    cache.reset(0)
    assert cache.layout.table[1, 0] == cache.layout.table[2, 0] == shared[0], "others still use it"


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_compressed_block_is_written_once_when_its_last_token_comes(page_size: int | None) -> None:
    module = package()
    cache = module.NSACache(1, 64, page_size=page_size, device=DEVICE)
    k, v = rows(module, 1, 40)
    at = 0
    for count in (7, 1, 1, 3, 13, 1, 14):
        before = cache.layers[0].k_cmp.clone()
        cache.extend(count)
        cache.write(k[:, at : at + count], v[:, at : at + count])
        changed = int((cache.layers[0].k_cmp != before).flatten(2).any(-1).sum())
        assert changed == max(0, (at + count - 8) // 4 + 1) - max(0, (at - 8) // 4 + 1)
        at += count
    whole, _ = module.compress(k, v)
    found = cache.layers[0].k_cmp[:, : whole.shape[1]]
    if page_size:
        found = cache.layers[0].k_cmp.flatten(0, 1)[cache.layout.index(module.storage.COMPRESSED, 0, 1, 40)]
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)


def test_the_device_refuses_tokens_without_room_and_synchronize_names_the_sequences() -> None:
    module = package()
    cache = module.NSACache(2, 32, page_size=16, device=DEVICE)
    append(cache, module, [16, 3])
    place = (cache.layout.table, cache.layout.capacity, cache.layout.page_size)
    # As a replayed graph does it, without reserve: the first sequence has no second page.
    module.registration.operator("cache_extend")(cache.starts, cache.lengths, cache.overflow, None, 1, *place)
    assert cache.lengths.tolist() == [16, 4] and cache.starts.tolist() == [16, 3]
    with pytest.raises(module.CapacityError, match="sequences 0: no room"):
        cache.synchronize()
    assert cache.tokens == (16, 4) and cache.new_tokens == (0, 1)


def test_truncation_by_a_tensor_is_known_to_the_host_after_synchronize() -> None:
    module = package()
    cache = module.NSACache(2, 64, page_size=16, device=DEVICE)
    append(cache, module, [40, 20])
    cache.truncate(torch.tensor([17, 50], dtype=torch.int32, device=DEVICE))
    assert not cache.exact and cache.tokens == (40, 20) and cache.lengths.tolist() == [17, 20]
    free = cache.free_pages
    cache.synchronize()
    assert cache.exact and cache.tokens == (17, 20) and cache.free_pages == free + 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batch": 0}, ValueError, "batch: expected 1 to"),
        ({"capacity": 1.5}, TypeError, "capacity: expected a whole number"),
        ({"page_size": 24}, ValueError, "page_size: expected one of 16, 32"),
        ({"pages": 3}, ValueError, "pages: expected None for a contiguous cache"),
        ({"max_new_tokens": 9}, ValueError, "max_new_tokens: expected 1 to 8, got 9"),
    ],
)
def test_arguments_of_a_cache_are_checked(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        package().NSACache(**{"batch": 1, "capacity": 64, "device": DEVICE, **arguments})


def test_arguments_of_decode_and_prefill_are_checked() -> None:
    module = package()
    cache = module.NSACache(1, 64, max_new_tokens=2, device=DEVICE)
    append(cache, module, 20)
    q, gates = torch.randn(1, 3, 2, 16, device=DEVICE), torch.randn(1, 3, 2, 3, device=DEVICE)
    with pytest.raises(ValueError, match="q: expected 1 to 2 tokens, the cache's max_new_tokens, got 3"):
        module.nsa_decode(q, cache, gates)
    with pytest.raises(ValueError, match="q: expected at least the cache's 20 new tokens, got 3"):
        module.nsa_prefill(q, cache, gates)
    with pytest.raises(TypeError, match="cache: expected this package's NSACache, got Tensor"):
        module.nsa_decode(q, gates, gates)
    with pytest.raises(ValueError, match="k: expected at least the 20 tokens"):
        cache.write(*rows(module, 1, 3))
    with pytest.raises(ValueError, match="layer: expected 0 to 0, got 1"):
        module.nsa_decode(q[:, :1], cache, gates[:, :1], layer=1)
    with pytest.raises(ValueError, match="target: expected another sequence"):
        cache.fork(0, 0)
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        module.nsa_decode(q[:, :1], cache, gates[:, :1], out=torch.empty(1, 1, 2, 32, device=DEVICE)[..., :16])


def test_layers_share_lengths_and_hold_their_own_keys() -> None:
    module = package()
    cache = module.NSACache(1, 64, layers=2, device=DEVICE)
    cache.extend(30)
    for layer in range(2):
        cache.write(*rows(module, 1, 30, seed=layer), layer=layer)
    q, gates = torch.randn(1, 1, 2, 16, device=DEVICE), torch.randn(1, 1, 2, 3, device=DEVICE)
    alone = []
    for layer in range(2):
        one = module.NSACache(1, 64, device=DEVICE)
        one.extend(30)
        one.write(*rows(module, 1, 30, seed=layer))
        alone.append(module.nsa_decode(q, one, gates))
    found = [module.nsa_decode(q, cache, gates, layer=layer) for layer in range(2)]
    assert torch.equal(found[0], alone[0]) and torch.equal(found[1], alone[1])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("by", ["numbers", "tensor"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_after_a_truncation_nothing_is_new_whatever_it_left(page_size: int | None, by: str) -> None:
    module = package()
    cache = module.NSACache(2, 64, page_size=page_size, max_new_tokens=4, device=DEVICE)
    append(cache, module, [10, 9])
    append(cache, module, [3, 4], seed=1)
    kept = [13, 12]  # of the first sequence nothing goes, of the second the last token
    cache.truncate(torch.tensor(kept, dtype=torch.int32, device=DEVICE) if by == "tensor" else kept)
    assert cache.new_tokens == (0, 0)
    before = snapshot(cache)
    cache.write(*rows(module, 2, 4, seed=2))
    assert all(torch.equal(x, y) for x, y in zip(before, snapshot(cache), strict=True))
    q, gates = torch.randn(2, 4, 2, 16, device=DEVICE), torch.randn(2, 4, 2, 3, device=DEVICE)
    for attend in (module.nsa_decode, module.nsa_prefill):
        o, aux = attend(q, cache, gates, return_aux=True)
        assert not o.any() and (aux.lse_win == -torch.inf).all() and (aux.indices == -1).all()
    assert cache.exact or by == "tensor"
    cache.synchronize()
    assert cache.new_tokens == (0, 0) and cache.tokens == tuple(kept)


def test_a_sequence_that_is_forgotten_leaves_the_new_tokens_of_the_others() -> None:
    module = package()
    cache, other = (module.NSACache(2, 64, max_new_tokens=4, device=DEVICE) for _ in range(2))
    k, v = rows(module, 2, 4)
    for each in (cache, other):
        append(each, module, [9, 12])
        each.extend([2, 4])
    cache.reset(0)
    for each in (cache, other):
        each.write(k, v)
    assert cache.tokens == (0, 16) and cache.new_tokens == (0, 4) and cache.lengths.tolist() == [0, 16]
    assert torch.equal(cache.layers[0].k[1], other.layers[0].k[1])
    q, gates = torch.randn(2, 4, 2, 16, device=DEVICE), torch.randn(2, 4, 2, 3, device=DEVICE)
    for attend in (module.nsa_decode, module.nsa_prefill):
        assert torch.equal(attend(q, cache, gates)[1], attend(q, other, gates)[1])


@pytest.mark.parametrize("page_size", [None, 16])
def test_tokens_that_are_drafted_and_rejected_by_a_tensor_go_on_to_the_capacity(
    page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = package()
    cache = module.NSACache(2, 40, page_size=page_size, max_new_tokens=4, device=DEVICE)
    read: list[tuple[int, ...]] = []
    synchronize = module.NSACache.synchronize
    monkeypatch.setattr(module.NSACache, "synchronize", lambda self: read.append(self.tokens) or synchronize(self))
    for length in range(1, 37):  # of four drafted tokens one is accepted
        cache.extend(4)
        assert cache.lengths.tolist() == [length + 3] * 2
        cache.truncate(torch.full((2,), length, dtype=torch.int32, device=DEVICE))
    assert not cache.exact and 0 < len(read) <= 12, "the host asks where its bound leaves no room, and not each step"
    cache.extend(4)
    assert cache.lengths.tolist() == [40, 40]
    with pytest.raises(module.CapacityError, match="sequence 0 holds 40 of at most 40 tokens; no room for 1 more"):
        cache.extend(1)
    assert cache.exact and cache.tokens == (40, 40)


def test_pages_that_a_bound_alone_takes_come_back_before_there_is_no_room() -> None:
    module = package()
    cache = module.NSACache(2, 64, page_size=16, pages=3, device=DEVICE)
    for _ in range(6):  # 24 tokens by the host's bound, of which one is kept
        cache.extend([4, 0])
        cache.truncate(torch.tensor([1, 0], dtype=torch.int32, device=DEVICE))
    cache.extend([0, 32])
    assert cache.tokens == (1, 32) and cache.free_pages == 0


def test_a_cache_that_cannot_ask_the_device_says_what_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    module = package()
    cache = module.NSACache(1, 40, device=DEVICE)
    append(cache, module, 39)
    cache.truncate(torch.tensor([8], dtype=torch.int32, device=DEVICE))
    monkeypatch.setattr(module.NSACache, "_capturing", lambda self: True)  # as within torch.cuda.graph
    q, gates = torch.randn(1, 2, 2, 16, device=DEVICE), torch.randn(1, 2, 2, 3, device=DEVICE)
    for attempt in (lambda: cache.reserve(2), lambda: module.nsa_prefill(q, cache, gates), cache.synchronize):
        with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured; call synchronize\(\) before"):
            attempt()
    cache.extend(2)  # the device's part alone
    assert cache.lengths.tolist() == [10]


def test_a_graph_that_truncates_leaves_the_host_with_bounds_at_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    module = package()
    cache = module.NSACache(1, 40, device=DEVICE)
    kept = torch.tensor([8], dtype=torch.int32, device=DEVICE)
    append(cache, module, 8)
    with monkeypatch.context() as captured:
        captured.setattr(module.NSACache, "_capturing", lambda self: True)
        cache.extend(4)
        cache.truncate(kept)
    cache.synchronize()
    assert cache.exact
    for _ in range(20):  # each replay drafts four tokens and keeps none: the host has no room for 80
        cache.reserve(4)
        place = (cache.layout.table, cache.layout.capacity, cache.layout.page_size)
        module.registration.operator("cache_extend")(cache.starts, cache.lengths, cache.overflow, None, 4, *place)
        cache.lengths.copy_(torch.minimum(cache.lengths, kept))
    assert not cache.exact
    cache.synchronize()
    assert cache.tokens == (8,)
