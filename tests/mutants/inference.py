"""Mistakes in the cache and in decode."""

from __future__ import annotations

from nsa_gen.verification.inference import Scenario, Step
from tests.mutants.model import CacheCheck, Edit, Mutant

ONE_TOKEN = CacheCheck("cached", Scenario(1, 120, None, (Step("fill", (75,)), Step("decode", (1,)))))
TWO_TOKENS = CacheCheck("cached", Scenario(1, 120, None, (Step("fill", (75,)), Step("decode", (2,)))))
REJECTED = CacheCheck(
    "cached",
    Scenario(1, 120, None, (Step("fill", (80,)), Step("fill", (10,)), Step("truncate", (69,)), Step("decode", (1,)))),
)
FORKED = CacheCheck(
    "cached",
    Scenario(
        2, 120, 16, (Step("fill", (70, 9)), Step("fork", (0, 1, 66)), Step("fill", (9, 9)), Step("decode", (1, 1)))
    ),
)
TIED = CacheCheck("cached choice", Scenario(1, 260, None, (Step("fill", (200,)), Step("decode", (1,))), kind="ties"))
LONG = CacheCheck("cached choice", Scenario(1, 320, None, (Step("fill", (300,)), Step("decode", (2,))), seed=2))


def _mutant(
    name: str,
    mistake: str,
    check: CacheCheck,
    killed_by: tuple[str, ...],
    file: str,
    old: str,
    new: str,
    times: int = 1,
) -> Mutant:
    return Mutant(name, mistake, check, killed_by, (Edit(file, old, new, times),))


MEANS = CacheCheck("cached means", Scenario(1, 320, None, (Step("fill", (300,)), Step("decode", (2,))), seed=2))
GROWN = CacheCheck("cached means", Scenario(1, 260, 16, (*[Step("fill", (24,))] * 10, Step("decode", (1,)))))
EQUAL = CacheCheck(
    "cached means", Scenario(1, 320, None, (Step("fill", (300,)), Step("decode", (1,))), kind="ties", seed=1)
)

CODES = CacheCheck("cached codes", Scenario(1, 120, None, (Step("fill", (75,)), Step("decode", (2,)))))
CODED_IN_STEPS = CacheCheck(
    "cached codes", Scenario(1, 120, 16, (Step("fill", (70,)), *[Step("decode", (1,))] * 6, Step("prefill", (9,))))
)

MUTANTS: tuple[Mutant, ...] = (
    _mutant(
        "codes_rounded_towards_zero",
        "a number becomes the code of the next smaller one",
        CODES,
        ("o",),
        "kernels/e4m3.py",
        "normal = (size + 0x7FFFF + ((size >> 20) & 1)) >> 20",
        "normal = size >> 20",
    ),
    _mutant(
        "codes_do_not_saturate",
        "numbers beyond the largest code wrap around",
        CODES,
        ("o",),
        "kernels/e4m3.py",
        "tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)",
        "bits & 0x7FFFFFFF",
    ),
    _mutant(
        "values_with_the_scale_of_keys",
        "decode reads values by the scale of their keys",
        CODES,
        ("o_win",),
        "kernels/decode_attend.py",
        "tl.load(scales + 2 * KV_HEADS)",
        "tl.load(scales)",
    ),
    _mutant(
        "blocks_of_numbers_that_the_cache_does_not_hold",
        "a block is compressed from new tokens as they came, not as the cache holds them",
        CODED_IN_STEPS,
        ("o_cmp",),
        "kernels/append.py",
        "        x = decode(codes, side.scales[0], new.dtype).to(tl.float32)",
        "        x = tl.where(held[:, None], decode(codes, side.scales[0], new.dtype), new).to(tl.float32)",
    ),
    _mutant(
        "decoded_token_sees_the_next",
        "a token decoded with others sees the key of the one after it",
        TWO_TOKENS,
        ("o_slc", "o_win"),
        "kernels/decode_attend.py",
        "keys <= position",
        "keys <= position + 1",
        times=2,
    ),
    _mutant(
        "decode_window_one_key_too_long",
        "decode's window has w + 1 keys",
        TWO_TOKENS,
        ("o_win",),
        "kernels/decode_attend.py",
        "window_start = tl.maximum(position - WINDOW + 1, 0)",
        "window_start = tl.maximum(position - WINDOW, 0)",
    ),
    _mutant(
        "shared_tile_counted_twice",
        "a selected tile that lies in the window is attended to in both loops",
        TWO_TOKENS,
        ("o_slc",),
        "kernels/decode_attend.py",
        "wanted &= first_key + KEY_BLOCK <= window_start",
        "wanted &= first_key <= position",
    ),
    _mutant(
        "splits_of_tiles_not_rescaled",
        "parts of selected and window attention are added whatever their maxima",
        ONE_TOKEN,
        ("o_slc",),
        "kernels/decode_attend.py",
        "weight = tl.where(used, tl.exp2(part_max - reference), 0.0)",
        "weight = tl.where(used, 1.0, 0.0)",
    ),
    _mutant(
        "splits_of_compressed_blocks_not_rescaled",
        "parts of compressed attention are added whatever their maxima",
        TWO_TOKENS,
        ("o_cmp",),
        "kernels/decode_select.py",
        "weight = tl.where(used, tl.exp2(part_max - reference[:, None]), 0.0)",
        "weight = tl.where(used, 1.0, 0.0)",
    ),
    _mutant(
        "decode_gate_of_another_branch",
        "the selected branch is weighted by the compressed one's gate",
        TWO_TOKENS,
        ("o",),
        "kernels/decode_attend.py",
        "(gates + 1, valid)",
        "(gates + 0, valid)",
    ),
    _mutant(
        "compressed_block_of_rejected_tokens_seen",
        "after tokens were taken back, the compressed block that they completed is still seen",
        REJECTED,
        ("o_cmp",),
        "kernels/decode_compressed.py",
        "end_compressed(first_position + ",
        "end_compressed(4 + first_position + ",
        times=3,
    ),
    _mutant(
        "truncation_forgets_the_device",
        "tokens are taken back in the host's books alone",
        REJECTED,
        ("o",),
        "runtime/cache.py",
        "self.lengths.copy_(torch.minimum(self.lengths, torch.tensor(kept, dtype=torch.int32).to(self.device)))",
        "pass",
    ),
    _mutant(
        "block_of_the_first_new_token_not_compressed",
        "a block that the first new token completes is left as it was",
        ONE_TOKEN,
        ("o_cmp",),
        "kernels/append.py",
        "range(end_compressed(start + first_token - 1), ",
        "range(end_compressed(start + first_token), ",
    ),
    _mutant(
        "compressed_block_in_the_page_of_its_first_token",
        "a shared page holds compressed blocks that depend on later tokens",
        FORKED,
        ("o_cmp",),
        "runtime/storage.py",
        "last = blocks * STRIDE + BLOCK - 1",
        "last = blocks * STRIDE",
    ),
    _mutant(
        "shared_page_written_in_place",
        "a sequence writes to a page that another shares",
        FORKED,
        ("o",),
        "runtime/pages.py",
        "if length % self.page_size == 0 or number >= len(owned) or self._users[owned[number]] == 1:",
        "if True:",
    ),
    _mutant(
        "pages_of_the_first_sequence",
        "every sequence finds its tokens by the first one's row of the table",
        FORKED,
        ("o",),
        "runtime/storage.py",
        "entries = table_ptr + tl.cast(batch, tl.int64) * table_width",
        "entries = table_ptr + tl.cast(batch, tl.int64) * 0",
        times=2,
    ),
    _mutant(
        "decode_ties_to_the_higher_block",
        "equal importances go to the higher block",
        TIED,
        ("selection",),
        "kernels/decode_select.py",
        "(tl.cumsum(equal.to(tl.int32), 0) <= left)",
        "(tl.cumsum(equal.to(tl.int32), 0) > tl.sum(equal.to(tl.int32), 0) - left)",
    ),
    _mutant(
        "importance_from_before_the_tile_forgotten",
        "what reaches into a tile's first selection block from before the tile is lost",
        LONG,
        ("selection",),
        "kernels/decode_compressed.py",
        "tl.where(blocks == 0, first[:, None], carried)",
        "tl.where(blocks == 0, 0.0, carried)",
    ),
    _mutant(
        "importance_relative_to_its_tile",
        "importance is compared between tiles whose probabilities have different references",
        LONG,
        ("selection",),
        "kernels/decode_select.py",
        "factor[:, :, None] * p",
        "p",
    ),
    _mutant(
        "candidates_of_the_first_tile",
        "blocks are chosen among those that the first tile named",
        LONG,
        ("selection",),
        "kernels/decode_select.py",
        "used = places < tiles * CANDIDATES",
        "used = places < CANDIDATES",
    ),
    _mutant(
        "last_blocks_of_new_tokens_not_averaged",
        "the last blocks that new tokens complete have no mean key",
        MEANS,
        ("selection",),
        "kernels/mean_keys.py",
        "(block + 1) * SELECTION_BLOCK > tl.load(lengths_ptr + batch)",
        "(block + 6) * SELECTION_BLOCK > tl.load(lengths_ptr + batch)",
    ),
    _mutant(
        "mean_of_new_tokens_alone",
        "the mean key of a block that was begun before is not written",
        GROWN,
        ("selection",),
        "kernels/mean_keys.py",
        "block = tl.load(starts_ptr + batch) // SELECTION_BLOCK",
        "block = (tl.load(starts_ptr + batch) + SELECTION_BLOCK - 1) // SELECTION_BLOCK",
    ),
    _mutant(
        "decoded_score_of_one_head",
        "the group's first head alone decides in decode",
        MEANS,
        ("selection",),
        "kernels/selection.py",
        "for head in range(0, LIST_HEADS):",
        "for head in range(0, 1):",
    ),
    _mutant(
        "decode_ranks_blocks_without_their_sign",
        "decode ranks blocks by the size of their scores",
        MEANS,
        ("selection",),
        "kernels/decode_select.py",
        "exact_product(means, q)",
        "tl.abs(exact_product(means, q))",
    ),
    _mutant(
        "equal_decoded_scores_to_the_higher_block",
        "equal scores go to the higher block in decode",
        EQUAL,
        ("selection",),
        "kernels/decode_select.py",
        "(tl.cumsum(equal.to(tl.int32), 0) <= left)",
        "(tl.cumsum(equal.to(tl.int32), 0) > tl.sum(equal.to(tl.int32), 0) - left)",
    ),
)
