"""Which of very many blocks decode selects: the search for the smallest importance, ties, and unlike lengths."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support import DEVICE, Operator, operator_of

BLOCK, INITIAL, LOCAL, FREE = 16, 1, 2, 5
TILES = [16, 256]
NAN = math.nan


def package() -> Operator:
    """Compressed blocks and selection blocks are the same, so that each has its probability as importance."""
    count = INITIAL + FREE + LOCAL
    given = {"compression": (BLOCK, BLOCK), "block": BLOCK, "count": count, "initial": INITIAL, "local": LOCAL}
    return operator_of(passes=("forward", "decode"), kv_heads=2, **given)


def selected(importance: list[list[float]], lengths: list[int], capacity: int) -> list[list[list[int]]]:
    """What the launch that selects leaves of each sequence and KV head, whose blocks have the importance given."""
    module, batch = package().module, len(lengths)
    layout = module.storage.Layout(batch, capacity, 0, None)
    workspace = module.workspace.DecodeWorkspace.allocate(layout, 1, DEVICE)
    for tensor in workspace:
        tensor.fill_(NAN if tensor.is_floating_point() else -7)
    # One part of a row, of maximum 0 and sum 1: the importance, relative to a reference of 0, is what it is.
    for tensor, value in (("parts", 0.0), ("max", 0.0), ("sum", 1.0)):
        getattr(workspace, f"compressed_{tensor}").fill_(value)
    workspace.reference.zero_()
    workspace.counters.zero_()
    heads = workspace.importance.view(batch * 2, 2, -1)
    for heads_of_one, values in zip(heads, importance, strict=True):
        half = torch.tensor(values, device=DEVICE) / 2
        heads_of_one[:, : len(values)] = half
    starts, ends = (torch.tensor(lengths, dtype=torch.int32, device=DEVICE) - new for new in (1, 0))
    module.kernels.decode_select.decode_select(workspace, starts, ends, batch, 1, splits=1, score_blocks=16)
    assert workspace.counters.tolist() == [0] * len(importance), "counters are 0 again"
    own = [(length - 1) // BLOCK + 1 for length in lengths]
    assert workspace.counts.flatten(1).tolist() == [[min(blocks, INITIAL + FREE + LOCAL)] * 2 for blocks in own]
    return workspace.indices[:, 0].tolist()


def best(values: list[float], length: int) -> list[int]:
    """The list by definition: greater importances first, of equal ones the lower block; NaN comes last."""
    blocks = (length - 1) // BLOCK + 1
    if blocks <= INITIAL + FREE + LOCAL:
        return [*range(blocks), *[-1] * (INITIAL + FREE + LOCAL - blocks)]
    forced = {*range(INITIAL), *range(blocks - LOCAL, blocks)}
    order = sorted(set(range(blocks)) - forced, key=lambda j: (-(-1.0 if math.isnan(values[j]) else values[j]), j))
    return sorted(forced | set(order[:FREE]))


def check(importance: list[list[float]], lengths: list[int], capacity: int, tile: int) -> None:
    with package().configs.override("decode_select", BLOCK_TILE=tile):
        found = selected(importance, lengths, capacity)
    for b, length in enumerate(lengths):
        for head in range(2):
            assert found[b][head] == best(importance[2 * b + head], length), (b, head)


BLOCKS = 75
ALIKE = 0x3F000000
"""Bits of 0.5: floats from there on differ in their last bit alone."""
IMPORTANCE = {
    "all are equal": [0.25] * BLOCKS,
    "all are zero": [0.0] * BLOCKS,
    "no number": [NAN] * BLOCKS,
    "few numbers": [NAN, 9.0, NAN, 1.0, NAN, 2.0, *[NAN] * (BLOCKS - 7), 9.0],
    "the least floats, and infinity": [0.0, 4e-45, math.inf, 0.0, 4e-45, NAN, 0.0, math.inf] * 9 + [0.0] * 3,
    "they differ in the last bit": torch.arange(ALIKE + BLOCKS, ALIKE, -1).int().view(torch.float32).tolist(),
    "they rise in the last bit": torch.arange(ALIKE, ALIKE + BLOCKS).int().view(torch.float32).tolist(),
    "powers of two": (2.0 ** torch.arange(-50, BLOCKS - 50).float()).tolist(),
    "powers of two that fall": (2.0 ** -torch.arange(BLOCKS).float()).tolist(),
}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", IMPORTANCE)
def test_blocks_are_selected_by_importance_and_number_whatever_the_bits(name: str, tile: int) -> None:
    values = IMPORTANCE[name]
    check([values, [*reversed(values)]], [BLOCKS * BLOCK - 3], BLOCKS * BLOCK, tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("levels", [2, 30, 10**6])
def test_drawn_importances_of_unlike_lengths_are_ranked_alike(levels: int, tile: int) -> None:
    lengths = [1, 8 * BLOCK, 8 * BLOCK + 1, 37 * BLOCK, 120 * BLOCK, 257 * BLOCK + 5]
    generator = torch.Generator().manual_seed(levels)
    drawn = torch.randint(levels, (2 * len(lengths), 300), generator=generator).float() / levels
    check(drawn.tolist(), lengths, 300 * BLOCK, tile)


def test_a_million_tokens_have_their_best_blocks_selected() -> None:
    blocks = 2**20 // BLOCK
    drawn = torch.rand(2, blocks, generator=torch.Generator().manual_seed(4))
    # Where tiles begin and end, and the same importance far apart.
    for places in ([255, 256, 40000, blocks - 3], [1, 2, 30000, 65000, 65001, 65002]):
        drawn[:, places] = 2.0 + drawn[:, places[:1]]
    check(drawn.tolist(), [2**20], 2**20, 256)


def test_pages_change_no_bit_of_the_choice_among_many_blocks_and_it_is_the_forwards() -> None:
    op, lengths, new = package(), [40 * BLOCK + 7, 9 * BLOCK, 1], 2
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(len(lengths), max(lengths), 2, 16, generator=generator).to(DEVICE) for _ in range(2))
    q, gates = (torch.randn(len(lengths), max(lengths), 4, d, generator=generator).to(DEVICE) for d in (16, 3))
    newest = torch.tensor([[max(length - new, 0), length - 1] for length in lengths], device=DEVICE)
    rows = newest[:, :, None, None].expand(-1, -1, 4, 16)
    outputs = []
    for page_size in (None, 16, 64):
        cache = op.NSACache(len(lengths), 700, page_size=page_size, max_new_tokens=new, device=DEVICE)
        cache.extend(lengths)
        cache.write(k, v)
        asked = q.gather(1, rows), cache, gates.gather(1, rows[..., :3])
        outputs.append(op.nsa_decode(*asked, return_aux=True)[1])
    for other in outputs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outputs[0], other, strict=True))
    for b, length in enumerate(lengths[:2]):
        _, whole = op.nsa_attention(*(x[b : b + 1, :length] for x in (q, k, v, gates)), return_aux=True)
        assert torch.equal(outputs[0].indices[b], whole.indices[0, -new:]), b


def test_the_work_of_one_launch_does_not_depend_on_the_capacity() -> None:
    module = package().module
    multiprocessors = module.configs.multiprocessors(DEVICE)
    for lists in (1, 4, 10**6):
        shares = [module.workspace.shares_of(tiles, lists, DEVICE) for tiles in (1, 64, 10**4, 10**6)]
        assert shares[0] == 1 and shares[2] == shares[3], "as many as the device runs at once, whatever the capacity"
        assert lists * shares[3] <= max(lists, 8 * multiprocessors)


@pytest.mark.parametrize("tokens", [76, 79, 80, 140])
def test_a_block_that_only_blocks_of_the_tile_before_reach_has_their_importance(tokens: int) -> None:
    """Of the newest block no compressed block begins yet, and none of its tile; it competes where no block is local."""
    op = operator_of(passes=("forward", "decode"), compression=(16, 4), initial=0, local=0, scale=0.3)
    generator = torch.Generator().manual_seed(tokens)
    k, v = (torch.randn(1, tokens, 1, 16, generator=generator).to(DEVICE) for _ in range(2))
    q, gates = (torch.randn(1, tokens, 2, width, generator=generator).to(DEVICE) for width in (16, 3))
    _, whole = op.nsa_attention(q, k, v, gates, return_aux=True)
    cache = op.NSACache(1, 200, device=DEVICE)
    for left in (math.nan, math.inf, 0.0):
        cache.reset()
        cache.workspace.importance.fill_(left)
        cache.workspace.reference.zero_()
        cache.extend(tokens)
        cache.write(k, v)
        _, found = op.nsa_decode(q[:, -1:].contiguous(), cache, gates[:, -1:], return_aux=True)
        assert torch.equal(found.indices[:, 0], whole.indices[:, -1]), left
