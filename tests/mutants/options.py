"""Mistakes that an option, a split or an offset shows: recomputation, shares of heads, packed starts, far edges."""

from __future__ import annotations

from dataclasses import replace

from tests.mutants.model import Check, Edit, Equivalent, Mutant

ATTENTION, POOL, SELECTION = "operator.py", "kernels/compression_pool.py", "kernels/selection.py"
BANDED, BANDED_BACKWARD, SHARED_SUMS = "kernels/banded.py", "kernels/banded_backward.py", "runtime/shares.py"

RECOMPUTED = Check("full", 4, tokens_kv=20, gradients=True, recompute=("cmp", "slc", "win"))
LOCAL_RECOMPUTED = Check("local", 5, tokens_kv=67, gradients=True, local_in_window=True, recompute=("slc",))
# Two shares of three heads: the second has one. The sequence with complete blocks begins inside a stride.
SPLIT = ("compressed_backward_dkdv", "HEAD_SPLITS", 2)
SHARES = Check("shares", (5, 13), gradients=True, values=(SPLIT,))
# The second and the third sequence begin at tokens of remainder 2 and 3.
PACKED = Check("compressed", (14, 9, 13), gradients=True)
# The last query that sees a tile's last key is the first of its tile.
FAR_END = Check("window of 18", 37, gradients=True)
FAR_END_INSIDE_A_TILE = Check("window", 33, gradients=True)
# A compressed block of large keys, the last of them the newest, reaches over the start of the last selection block.
CONTESTED = Check("free", 8, tokens_kv=68, kind="late")
CONTESTED_PACKED = Check("free", (5, 66))
COMPRESSED_FORWARD = Check("compressed", 22)
WINDOW_FORWARD = Check("window", 23)

ROUNDED_UP = ("first_key", "(first_row + STRIDE - 1) // STRIDE")


def rounded_up(
    name: str, what: str, line: str, killed_by: tuple[str, ...], files: tuple[str, ...] = (BANDED_BACKWARD,)
) -> Mutant:
    """Packed compressed rows begin at the sequence's start divided by the stride, rounded up."""
    mistake = f"{what} of packed sequences begin at the start divided by the stride, rounded up"
    edits = tuple(Edit(file, line, line.replace(*ROUNDED_UP)) for file in files)
    return Mutant(name, mistake, PACKED, killed_by, edits)


MUTANTS = (
    # The forward computed again by the backward
    Mutant(
        "values_compressed_again_from_keys",
        "the compressed values that the backward computes again are those of the keys",
        RECOMPUTED,
        ("dq", "dk", "dgates"),
        (
            Edit(
                ATTENTION,
                'if "cmp" in recompute:\n        k_cmp, v_cmp, _ = compress_forward(k, v,',
                'if "cmp" in recompute:\n        k_cmp, v_cmp, _ = compress_forward(k, k,',
            ),
        ),
    ),
    Mutant(
        "window_computed_again_with_keys_for_values",
        "the window's output that the backward computes again has keys for values",
        RECOMPUTED,
        ("dq", "dk", "dgates"),
        (
            Edit(
                ATTENTION,
                'if "win" in recompute:\n        o_win, lse_win = window_forward(q, k, v,',
                'if "win" in recompute:\n        o_win, lse_win = window_forward(q, k, k,',
            ),
        ),
    ),
    Mutant(
        "selection_computed_again_with_keys_for_values",
        "the selected branch's output that the backward computes again has keys for values",
        RECOMPUTED,
        ("dq", "dk", "dgates"),
        (
            Edit(
                ATTENTION,
                "sorted_slots = selected_forward(q, k, v, indices, counts, sequences, chunk_tokens)\n    if",
                "sorted_slots = selected_forward(q, k, k, indices, counts, sequences, chunk_tokens)\n    if",
            ),
        ),
    ),
    Mutant(
        "local_part_not_computed_again",
        "the selected branch is computed again without the part for its local blocks, which the window leaves",
        LOCAL_RECOMPUTED,
        ("dk", "dv"),
        (Edit(ATTENTION, 'and ("slc" in recompute or "win" in recompute)', 'and "win" in recompute'),),
    ),
    # Shares of a group's heads
    Mutant(
        "heads_of_the_next_group_in_the_last_share",
        "the last share of a group's heads is as large as the others, and takes a head of the next group",
        SHARES,
        ("dk_cmp", "dv_cmp"),
        (
            Edit(
                BANDED_BACKWARD,
                "tl.minimum((kv_head + 1) * GROUP - first_head, HEADS)",
                "tl.minimum((kv_head + 1) * GROUP - first_head + 1 - kv_head, HEADS)",
            ),
        ),
    ),
    Mutant(
        "first_share_of_heads_alone",
        "dK and dV of the compressed branch are those of the first share of heads",
        SHARES,
        ("dk_cmp", "dv_cmp"),
        (Edit(SHARED_SUMS, "torch.sum(shares, 0, out=total)", "total.copy_(shares[0])"),),
    ),
    Mutant(
        "shares_of_heads_in_one_place",
        "every share of heads is written to the place of the first",
        SHARES,
        ("dk_cmp", "dv_cmp"),
        (
            Edit(
                BANDED_BACKWARD,
                "entry = tl.cast(split, tl.int64) * tl.num_programs(2) + batch",
                "entry = tl.cast(split, tl.int64) * 0 + batch",
            ),
        ),
    ),
    Mutant(
        "rows_between_sequences_unwritten_in_shares",
        "rows of packed compressed keys that belong to no block get whatever the shares' memory held",
        SHARES,
        ("dk_cmp", "dv_cmp"),
        (Edit(SHARED_SUMS, "total.new_zeros if sequences.packed else total.new_empty", "total.new_empty"),),
    ),
    # Where a packed sequence's compressed rows begin
    rounded_up(
        "compressed_keys_rounded_up_in_the_attention",
        "the compressed keys that queries attend to",
        "row_base(k_ptr, batch, first_key, head // GROUP",
        ("o_cmp", "lse_cmp", "dq"),
        files=(BANDED, BANDED_BACKWARD),
    ),
    rounded_up(
        "compressed_values_rounded_up_in_the_backward",
        "the compressed values that dK and dV are made of",
        "row_base(v_ptr, batch, first_key, kv_head",
        ("dk",),
    ),
    rounded_up(
        "compressed_gradients_rounded_up",
        "rows of the gradients of compressed keys and values",
        "(entry * key_rows + first_key + keys)",
        ("dk", "dv"),
    ),
    Mutant(
        "compressed_gradients_read_rounded_up",
        "the gradients of compressed rows are looked for at the start divided by the stride, rounded up",
        PACKED,
        ("dk", "dv"),
        (
            Edit(
                POOL,
                "first_row = rows_before + first_token // COMPRESSION_STRIDE",
                "first_row = rows_before + (first_token + COMPRESSION_STRIDE - 1) // COMPRESSION_STRIDE",
            ),
        ),
    ),
    Mutant(
        "importance_of_rows_rounded_up",
        "blocks of packed sequences are ranked by compressed keys from the start divided by the stride, rounded up",
        CONTESTED_PACKED,
        ("selection",),
        (
            Edit(
                SELECTION,
                "row_base(k_ptr, batch, first_row // COMPRESSION_STRIDE, kv_head",
                "row_base(k_ptr, batch, (first_row + COMPRESSION_STRIDE - 1) // COMPRESSION_STRIDE, kv_head",
            ),
        ),
    ),
    # The far end of the queries that see a key
    Mutant(
        "last_viewer_of_a_key_forgotten",
        "the last query that sees a tile's last key is left out of dK and dV where it begins a tile of queries",
        FAR_END,
        ("dk", "dv"),
        (Edit(BANDED_BACKWARD, "return key + band.WINDOW", "return key + band.WINDOW - 1"),),
    ),
    Mutant(
        "far_edge_of_the_viewers_unmasked",
        "a tile of queries of which some no longer see a key is taken for one that sees all",
        FAR_END,
        ("dk", "dv"),
        (
            Edit(
                BANDED_BACKWARD,
                "end_full = (tl.minimum(end_viewer(tile * KEY_BLOCK, band), tokens_kv) - offset) // QUERY_BLOCK",
                "end_full = tl.cdiv(tl.minimum(end_viewer(tile * KEY_BLOCK, band), tokens_kv) - offset, QUERY_BLOCK)",
            ),
        ),
    ),
    # The future within a tile
    Mutant(
        "importance_of_the_future_within_a_tile",
        "a compressed block that the last token of a tile sees counts for all of them",
        CONTESTED,
        ("selection",),
        (Edit(SELECTION, "(last_key[:, None] <= positions[None, :])", "(last_key[:, None] <= last_position)"),),
    ),
    Mutant(
        "future_compressed_block_within_a_tile",
        "a tile of compressed blocks of which some query sees none of the last is not masked",
        COMPRESSED_FORWARD,
        ("o_cmp", "lse_cmp"),
        (
            Edit(
                BANDED,
                "end_full = end_visible(queries.first, band) // KEY_BLOCK",
                "end_full = tl.cdiv(end_visible(queries.first, band), KEY_BLOCK)",
            ),
        ),
    ),
    Mutant(
        "future_key_of_the_window_within_a_tile",
        "a tile of keys that the first of its queries sees in part is not masked",
        WINDOW_FORWARD,
        ("o_win", "lse_win"),
        (
            Edit(
                BANDED,
                "end_full = end_visible(queries.first, band) // KEY_BLOCK",
                "end_full = tl.cdiv(end_visible(queries.first, band), KEY_BLOCK)",
            ),
        ),
    ),
)

EQUIVALENT = (
    Equivalent(
        "last_viewer_forgotten_where_no_tile_begins",
        "the far end of the queries that see a key in the window's backward is one query short",
        "with tiles of 16 the last query that sees a tile's last key begins a tile only if w is 2 more than a multiple "
        "of 16; otherwise the tile that it lies in is visited for the queries before it. A mutant has such a window",
        FAR_END_INSIDE_A_TILE,
        (Edit(BANDED_BACKWARD, "return key + band.WINDOW", "return key + band.WINDOW - 1"),),
    ),
    Equivalent(
        "viewers_beyond_the_end_visited",
        "the far end of the queries that see a key is not cut at the end of the sequence",
        "queries out of range are loaded as zeros and contribute nothing: the bound saves steps",
        FAR_END,
        (
            Edit(
                BANDED_BACKWARD,
                "end = tl.cdiv(tl.minimum(end_viewer(last_key, band), tokens_kv) - offset, QUERY_BLOCK)",
                "end = tl.cdiv(end_viewer(last_key, band) - offset, QUERY_BLOCK)",
            ),
        ),
    ),
    Equivalent(
        "future_keys_of_a_tile_loaded",
        "the scores of a tile's tokens are computed from compressed keys after its last token, too",
        "what a token does not see is masked again before it is summed: the bound saves loads",
        CONTESTED,
        (
            Edit(
                SELECTION,
                "(compressed >= 0) & (last_key <= last_position)",
                "(compressed >= 0) & (last_key < tokens_kv)",
            ),
        ),
    ),
    Equivalent(
        "local_part_computed_again_for_the_compressed_branch",
        "the window's kernel computes the local blocks again although the compressed branch alone is recomputed",
        "nothing reads the part: the condition saves a launch",
        replace(LOCAL_RECOMPUTED, recompute=("cmp",)),
        (Edit(ATTENTION, 'and ("slc" in recompute or "win" in recompute)', "and recompute"),),
    ),
)
