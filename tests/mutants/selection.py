"""Mistakes in the choice of blocks: Eq. 9's weights, the group's sum, forced blocks, ties, NaN, the future."""

from __future__ import annotations

from tests.mutants.model import Check, Edit, Mutant

FORCED = Check("forced", 8, tokens_kv=126)
FREE = Check("free", 8, tokens_kv=126)
EARLY = Check("free", 20)
# The last queries are at 76 to 81: the own block of the last two has no compressed block yet, and importance 0, while
# a NaN at key 54 makes that of every other block NaN. Before them, all are NaN.
NAN = Check("free", 6, tokens_kv=82, kind="nan")
SHARP = Check("free", 6, tokens_kv=44, altered="sharp")

MUTANTS = (
    Mutant(
        "overlap_weights_shifted",
        "Eq. 9's weights belong to the next compressed block",
        FREE,
        ("selection",),
        (Edit("selection.py", "overlap_weight(offset) * tl.where", "overlap_weight(offset + 1) * tl.where"),),
    ),
    Mutant(
        "overlap_weights_all_one",
        "Eq. 9's weights are 1",
        FREE,
        ("selection",),
        (Edit("selection.py", "overlap_weight(offset) * tl.where", "tl.where"),),
    ),
    Mutant(
        "scale_forgotten_in_importance",
        "1/sqrt(Dk) in the importance where the spec gives another scale",
        FREE,
        ("selection",),
        (Edit("selection.py", "* SCALE_LOG2 - lse", "* 0.36067376022224085 - lse"),),
    ),
    Mutant(
        "importance_of_one_head",
        "the group's first head alone decides",
        FREE,
        ("selection",),
        (
            Edit(
                "selection.py",
                "tl.where(visible, p, 0.0)",
                "tl.where(visible & (group_heads == 0)[:, None], p, 0.0)",
            ),
        ),
    ),
    Mutant(
        "ties_to_the_higher_block",
        "equal importances go to the higher block",
        NAN,
        ("selection",),
        (
            Edit("selection.py", "(0x7FFFFFFF - blocks).to(tl.int64)", "blocks.to(tl.int64)"),
            Edit("selection.py", "NO_BLOCK - (best & 0x7FFFFFFF).to(tl.int32)", "(best & 0x7FFFFFFF).to(tl.int32)"),
        ),
    ),
    Mutant(
        "nan_importance_ranks_first",
        "a block of unknown importance is preferred to all others",
        NAN,
        ("selection",),
        (
            Edit(
                "selection.py",
                "rank = tl.where(importance >= 0.0, rank, 0)",
                "rank = tl.where(importance >= 0.0, rank, 0x7FFFFFFE)",
            ),
        ),
    ),
    Mutant(
        "future_block_takes_a_slot",
        "the block after the query's own is a candidate",
        EARLY,
        ("selection",),
        (Edit("selection.py", "blocks[None, :] <= own_block\n", "blocks[None, :] <= own_block + 1\n"),),
    ),
    Mutant(
        "forced_initial_block_forgotten",
        "the first block has to earn its place",
        FORCED,
        ("selection",),
        (Edit("selection.py", "(blocks[None, :] < INITIAL_BLOCKS) | ", ""),),
    ),
    Mutant(
        "forced_local_blocks_forgotten",
        "the most recent blocks have to earn their places",
        FORCED,
        ("selection",),
        (Edit("selection.py", " | (blocks[None, :] > own_block - LOCAL_BLOCKS)", ""),),
    ),
    Mutant(
        "one_local_block_too_few",
        "one recent block fewer is forced than the spec says",
        FORCED,
        ("selection",),
        (Edit("selection.py", "own_block - LOCAL_BLOCKS)", "own_block - LOCAL_BLOCKS + 1)"),),
    ),
    Mutant(
        "underflowed_block_dropped",
        "a visible block whose probability underflows to 0 counts as none",
        SHARP,
        ("selection",),
        (
            Edit(
                "selection.py",
                "return tl.where(candidate, keys, -1)",
                "return tl.where(candidate & (forced | (importance != 0.0)), keys, -1)",
            ),
        ),
    ),
    Mutant(
        "block_without_compressed_keys_dropped",
        "a block of which no compressed block is visible yet counts as none",
        EARLY,
        ("selection",),
        (
            Edit(
                "selection.py",
                "candidate = blocks[None, :] <= own_block\n",
                "candidate = blocks[None, :] * SELECTION_BLOCK + COMPRESSION_BLOCK <= positions[:, None]\n",
            ),
        ),
    ),
)
