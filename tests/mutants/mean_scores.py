"""Mistakes in the choice of blocks by their mean keys."""

from __future__ import annotations

from tests.mutants.model import Check, Edit, Mutant

CHECK = Check("means", 8, tokens_kv=126)
NAN = Check("means", 6, tokens_kv=110, kind="nan")
TIES = Check("means", 6, tokens_kv=110, kind="ties")
PACKED = Check("means", (23, 86))
SELECTION, MEANS = "kernels/selection.py", "kernels/mean_keys.py"

MUTANTS = (
    Mutant(
        "scores_of_one_head",
        "the group's last head alone decides",
        CHECK,
        ("selection",),
        (Edit(SELECTION, "added += (total[i] + q[i].to(tl.float32),)", "added += (q[i].to(tl.float32),)"),),
    ),
    Mutant(
        "mean_of_the_last_tokens",
        "a block's key is the mean of its last tile of tokens",
        Check("means of 32", 8, tokens_kv=32 * 6 + 9),
        ("selection",),
        (Edit(MEANS, "(means[i] + k[i]", "(k[i]"),),
    ),
    Mutant(
        "means_of_the_block_before",
        "a block is scored by the mean key of the one before it",
        CHECK,
        ("selection",),
        (Edit(SELECTION, "* HEAD_DIM_QK, blocks, KV_HEADS", "* HEAD_DIM_QK, tl.maximum(blocks - 1, 0), KV_HEADS"),),
    ),
    Mutant(
        "scores_without_their_sign",
        "blocks are ranked by the size of their scores",
        CHECK,
        ("selection",),
        (Edit(SELECTION, "score = exact_product(means, q)", "score = tl.abs(exact_product(means, q))"),),
    ),
    Mutant(
        "negative_scores_unknown",
        "negative scores rank last, as importances below 0 would",
        # Two slots for four blocks, of which fewer than two often have a positive score.
        Check("means", 8, tokens_kv=72),
        ("selection",),
        (Edit(SELECTION, 'tl.where(importance >= float("-inf"), ', "tl.where(importance >= 0.0, "),),
    ),
    Mutant(
        "nan_score_ranks_first",
        "a block of unknown score is preferred to all others",
        NAN,
        ("selection",),
        (
            Edit(
                SELECTION,
                'tl.where(importance >= float("-inf"), importance, float("-inf"))',
                "tl.where(importance == importance, importance, 1e30)",
            ),
        ),
    ),
    Mutant(
        "equal_scores_to_the_higher_block",
        "of equal scores the higher block is taken",
        TIES,
        ("selection",),
        (
            Edit(
                SELECTION,
                "slot = tl.full((TOKEN_BLOCK,), INITIAL_BLOCKS, dtype=tl.int32)",
                "slot = tl.full((TOKEN_BLOCK,), INITIAL_BLOCKS + FREE_BLOCKS - 1, dtype=tl.int32)",
            ),
            Edit(SELECTION, "            # Ties go to the lower block.\n", "            i = LIST.value - 1 - i\n"),
            Edit(SELECTION, "slot += chosen.to(tl.int32)", "slot -= chosen.to(tl.int32)"),
        ),
    ),
    Mutant(
        "packed_means_at_their_tokens",
        "mean keys of a packed sequence are written as if its blocks began at the batch's",
        PACKED,
        ("selection",),
        (Edit(MEANS, "rows_before + first_row // SELECTION_BLOCK + block", "rows_before + block"),),
    ),
    Mutant(
        "blocks_across_sequences",
        "blocks of a packed sequence begin at multiples of their size in the batch",
        PACKED,
        ("selection",),
        (Edit(MEANS, "k_base = row_base(k_ptr, batch, first_row,",
              "k_base = row_base(k_ptr, batch, first_row // SELECTION_BLOCK * SELECTION_BLOCK,"),),
    ),
    Mutant(
        "last_blocks_never_scored",
        "the blocks right before the local ones do not compete",
        CHECK,
        ("selection",),
        (Edit(SELECTION, "end = last_block + 1 - LOCAL_BLOCKS", "end = last_block - LOCAL_BLOCKS"),),
    ),
)  # fmt: skip
