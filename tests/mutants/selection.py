"""Mistakes in the choice of blocks: Eq. 9's weights, the group's sum, forced blocks, ties, NaN, the future."""

from __future__ import annotations

from tests.mutants.model import Check, Edit, Mutant

FORCED = Check("forced", 8, tokens_kv=126)
FREE = Check("free", 8, tokens_kv=126)
EARLY = Check("free", 20)
# The last queries are at 76 to 81: the own block of the last two has no compressed block yet, and importance 0, while
# a NaN at key 54 makes that of every other block NaN. Before them, all are NaN.
NAN = Check("free", 6, tokens_kv=82, kind="nan")
SHARP = Check("free", 6, tokens_kv=60, altered="sharp")

MUTANTS = (
    Mutant(
        "overlap_weights_shifted",
        "Eq. 9's weights belong to the next compressed block",
        FREE,
        ("selection",),
        (
            Edit("kernels/selection.py", "overlap_weight(member) * p", "overlap_weight(member + 1) * p"),
            Edit("kernels/selection.py", "overlap_weight(reaching) * p", "overlap_weight(reaching + 1) * p"),
        ),
    ),
    Mutant(
        "overlap_weights_all_one",
        "Eq. 9's weights are 1",
        FREE,
        ("selection",),
        (
            Edit(
                "kernels/selection.py",
                "return tl.maximum(last - first, 0).to(tl.float32) / COMPRESSION_STRIDE",
                "return tl.where(last > first, 1.0, 0.0)",
            ),
        ),
    ),
    Mutant(
        "straddling_compressed_block_counts_once",
        "a compressed block that reaches into the next selection block counts for the one it begins in alone",
        FREE,
        ("selection",),
        (Edit("kernels/selection.py", "        importance += carried\n", ""),),
    ),
    Mutant(
        "first_step_without_what_reaches_into_it",
        "nothing reaches into the blocks of the first step",
        FREE,
        ("selection",),
        (Edit("kernels/selection.py", "for step in range(-1, steps):", "for step in range(0, steps):"),),
    ),
    Mutant(
        "scale_forgotten_in_importance",
        "1/sqrt(Dk) in the importance where the spec gives another scale",
        FREE,
        ("selection",),
        (Edit("kernels/selection.py", "* SCALE_LOG2 - rows.lse", "* 0.36067376022224085 - rows.lse"),),
    ),
    Mutant(
        "importance_of_one_head",
        "the group's first head alone decides",
        FREE,
        ("selection",),
        (
            Edit(
                "kernels/selection.py",
                "return tl.sum(tl.reshape(p,",
                "head = tl.arange(0, LIST_ROWS * TOKEN_BLOCK) // TOKEN_BLOCK\n"
                "    return tl.sum(tl.reshape(tl.where((head == 0)[None, :], p, 0.0),",
            ),
        ),
    ),
    Mutant(
        "ties_to_the_higher_block",
        "equal importances go to the higher block",
        NAN,
        ("selection",),
        (
            # All candidates are loaded at once here: they are gone through from the last to the first.
            Edit(
                "kernels/selection.py",
                "slot = tl.full((TOKEN_BLOCK,), INITIAL_BLOCKS, dtype=tl.int32)",
                "slot = tl.full((TOKEN_BLOCK,), INITIAL_BLOCKS + FREE_BLOCKS - 1, dtype=tl.int32)",
            ),
            Edit(
                "kernels/selection.py",
                "            # Ties go to the lower block.\n",
                "            i = LIST.value - 1 - i\n",
            ),
            Edit("kernels/selection.py", "slot += chosen.to(tl.int32)", "slot -= chosen.to(tl.int32)"),
        ),
    ),
    Mutant(
        "nan_importance_ranks_first",
        "a block of unknown importance is preferred to all others",
        NAN,
        ("selection",),
        (
            Edit(
                "kernels/selection.py",
                "tl.where(importance >= 0.0, importance, -1.0)",
                "tl.where(importance == importance, importance, 1e30)",
            ),
        ),
    ),
    Mutant(
        "future_block_takes_a_slot",
        "the block after the query's own is a candidate",
        EARLY,
        ("selection",),
        (
            Edit(
                "kernels/selection.py",
                "tl.where(slots <= own_block[:, None],",
                "tl.where(slots <= own_block[:, None] + 1,",
            ),
        ),
    ),
    Mutant(
        "future_block_competes",
        "the block after the query's own competes with the candidates",
        FREE,
        ("selection",),
        (
            Edit("kernels/selection.py", "own_block + 1 - LOCAL_BLOCKS, 0)", "own_block + 2 - LOCAL_BLOCKS, 0)"),
            Edit("kernels/selection.py", "tl.where(visible, p, 0.0)", "p"),
        ),
    ),
    Mutant(
        "forced_initial_block_forgotten",
        "the first block has to earn its place",
        FORCED,
        ("selection",),
        (
            Edit(
                "kernels/selection.py",
                "FREE_BLOCKS = tl.constexpr(1)",
                "INITIAL_BLOCKS, FREE_BLOCKS = tl.constexpr(0), tl.constexpr(2)",
            ),
        ),
    ),
    Mutant(
        "forced_local_blocks_forgotten",
        "the most recent blocks have to earn their places",
        FORCED,
        ("selection",),
        (
            Edit(
                "kernels/selection.py",
                "FREE_BLOCKS = tl.constexpr(1)",
                "LOCAL_BLOCKS, FREE_BLOCKS = tl.constexpr(0), tl.constexpr(3)",
            ),
        ),
    ),
    Mutant(
        "one_local_block_too_few",
        "one recent block fewer is forced than the spec says",
        FORCED,
        ("selection",),
        (
            Edit(
                "kernels/selection.py",
                "FREE_BLOCKS = tl.constexpr(1)",
                "LOCAL_BLOCKS, FREE_BLOCKS = tl.constexpr(1), tl.constexpr(2)",
            ),
        ),
    ),
    Mutant(
        "underflowed_block_dropped",
        "a visible block whose probability underflows to 0 counts as none",
        SHARP,
        ("selection",),
        (
            Edit(
                "kernels/selection.py",
                "tl.store(lists + slot, first_block + i, mask=chosen)",
                "tl.store(lists + slot, tl.where(importance[i] > 0.0, first_block + i, -1), mask=chosen)",
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
                "kernels/selection.py",
                "tl.where(slots <= own_block[:, None],",
                "tl.where(slots * SELECTION_BLOCK + COMPRESSION_BLOCK <= (tokens + tokens_kv - tokens_q)[:, None],",
            ),
        ),
    ),
)
