"""Mistakes in the forward of the three attentions: masks, scale, softmax, NaN."""

from __future__ import annotations

from tests.mutants.model import Check, Edit, Mutant

WINDOW = Check("window", 23)
WINDOW_NAN = Check("window", 23, kind="nan")
WINDOW_ALIGNED = Check("window", 5, tokens_kv=23)
WINDOW_FAR = Check("window", 18, altered="far")
# Keys a multiple of the blocks: what a mask should have kept out lies inside the tensors.
SELECTED = Check("selected", 12, tokens_kv=48, query_major="both")
SELECTED_NAN = Check("selected", 14, tokens_kv=32, kind="nan", query_major="both")
SELECTED_COUNTS = Check("selected", 8, tokens_kv=48, altered="counts", query_major="both")
COMPRESSED = Check("compressed", 22)

SCALE_OF_HEAD_DIM = "(0.25 / 0.37)"
"""The scale that `scale: auto` would give, 1 / sqrt(16), over the 0.37 that the specs here say."""


def forgotten_scale(branch: str, file: str, old: str, check: Check, times: int = 1) -> Mutant:
    """1/sqrt(Dk) instead of the spec's scale in the forward of one branch."""
    return Mutant(
        f"scale_forgotten_{branch}",
        f"`{branch}`: 1/sqrt(Dk) where the spec gives another scale",
        check,
        (f"o_{branch}", f"lse_{branch}"),
        (Edit(file, old, old.replace("dot_rows(q, k)", f"dot_rows(q, k) * {SCALE_OF_HEAD_DIM}"), times),),
    )


MUTANTS = (
    # Which keys a query sees
    Mutant(
        "selected_diagonal_unmasked",
        "no causal mask inside the query's own selected block",
        SELECTED,
        ("o_slc", "lse_slc"),
        (
            Edit(
                "kernels/selected_query_major.py",
                "return keys, valid & (keys <= position)",
                "return keys, valid & (keys >= 0)",
            ),
        ),
    ),
    Mutant(
        "window_sees_one_future_key",
        "the window ends one key late",
        WINDOW,
        ("o_win", "lse_win"),
        (
            Edit(
                "kernels/banded.py",
                "return visible & (keys[None, :] < end_visible(positions, band)[:, None])",
                "return visible & (keys[None, :] <= end_visible(positions, band)[:, None])",
            ),
        ),
    ),
    Mutant(
        "window_one_too_wide",
        "w + 1 keys in the window",
        WINDOW,
        ("o_win", "lse_win"),
        (
            Edit(
                "kernels/banded.py",
                "position - band.WINDOW + 1",
                "position - band.WINDOW",
            ),
        ),
    ),
    Mutant(
        "window_one_too_narrow",
        "w - 1 keys in the window",
        WINDOW,
        ("o_win", "lse_win"),
        (
            Edit(
                "kernels/banded.py",
                "position - band.WINDOW + 1",
                "position - band.WINDOW + 2",
            ),
        ),
    ),
    Mutant(
        "compressed_block_seen_early",
        "a compressed block is visible one token before its last one",
        COMPRESSED,
        ("o_cmp", "lse_cmp"),
        (
            Edit(
                "kernels/banded.py",
                "visible_blocks(position, band.BLOCK",
                "visible_blocks(position + 1, band.BLOCK",
            ),
        ),
    ),
    Mutant(
        "empty_slot_read_as_block_0",
        "-1 in the caller's indices is read as block 0",
        SELECTED,
        ("o_slc", "lse_slc"),
        (
            Edit(
                "kernels/selected_query_major.py",
                "    valid = (block >= 0) & (block <= position // SELECTION_BLOCK)\n",
                "    block = tl.maximum(block, 0)\n    valid = block <= position // SELECTION_BLOCK\n",
            ),
        ),
    ),
    Mutant(
        "counts_ignored",
        "slots beyond the caller's counts are used",
        SELECTED_COUNTS,
        ("o_slc", "lse_slc"),
        (
            Edit(
                "kernels/selected_query_major.py",
                "count = tl.minimum(tl.load(counts_ptr + offset), SELECTION_COUNT)",
                "count = SELECTION_COUNT",
            ),
        ),
    ),
    Mutant(
        "query_offset_forgotten",
        "with more keys than queries, query r is taken to be at position r",
        WINDOW_ALIGNED,
        ("o_win", "lse_win"),
        (
            Edit(
                "kernels/banded.py",
                "first_position = tile * QUERY_BLOCK + tokens_kv - tokens_q",
                "first_position = tile * QUERY_BLOCK",
            ),
        ),
    ),
    # The scale
    forgotten_scale("cmp", "kernels/banded.py", "products = dot_rows(q, k)\n", COMPRESSED),
    forgotten_scale("slc", "kernels/selected_query_major.py", "dot_rows(q, k), float", SELECTED),
    forgotten_scale("win", "kernels/banded.py", "products = dot_rows(q, k)\n", WINDOW),
    Mutant(
        "poisoned_values_not_gone_through_again",
        "o keeps the NaN of a value that its query does not see",
        WINDOW_NAN,
        ("o_win",),
        (Edit("kernels/banded.py", "if not all_finite(state.acc):", "if tl.num_programs(0) < 0:"),),
    ),
    # Softmax
    Mutant(
        "accumulator_not_rescaled",
        "the accumulator keeps its scale when the running maximum moves",
        WINDOW,
        ("o_win",),
        (Edit("kernels/banded.py", "acc = scale_rows(state.acc, rescale[:, None])", "acc = state.acc"),),
    ),
    Mutant(
        "row_sum_not_rescaled",
        "the running sum keeps its scale when the running maximum moves",
        WINDOW,
        ("o_win", "lse_win"),
        (Edit("kernels/primitives.py", "row_sum * rescale + tl.sum(p, 1)", "row_sum + tl.sum(p, 1)"),),
    ),
    Mutant(
        "probabilities_rounded_before_the_sum",
        "p is rounded to bfloat16 before it is summed, in a float32 operator",
        WINDOW,
        ("o_win", "lse_win"),
        (
            Edit(
                "kernels/primitives.py",
                "SCALE_LOG2, -reference[:, None]))\n    rescale",
                "SCALE_LOG2, -reference[:, None])).to(tl.bfloat16).to(tl.float32)\n    rescale",
            ),
        ),
    ),
    Mutant(
        "lse_in_base_2",
        "lse is a logarithm in base 2",
        WINDOW,
        ("lse_win",),
        (Edit("kernels/primitives.py", "row_max * LN_2 + tl.log(divisor)", "row_max + tl.log2(divisor)"),),
    ),
    Mutant(
        "lse_of_nothing_is_zero",
        "lse is 0, not -inf, where a query sees no key",
        COMPRESSED,
        ("lse_cmp",),
        (Edit("kernels/primitives.py", 'tl.where(empty, float("-inf"), row_max', "tl.where(empty, 0.0, row_max"),),
    ),
    Mutant(
        "nothing_over_nothing",
        "0 / 0 where a query sees no key",
        COMPRESSED,
        ("o_cmp",),
        (Edit("kernels/primitives.py", "divisor = tl.where(empty, 1.0, row_sum)", "divisor = row_sum"),),
    ),
    Mutant(
        "minus_infinity_less_itself",
        "a tile without a visible key subtracts a maximum of -inf from -inf",
        COMPRESSED,
        ("o_cmp",),
        (Edit("kernels/primitives.py", 'tl.where(new_max == float("-inf"), 0.0, new_max)', "new_max"),),
    ),
    # NaN
    Mutant(
        "nan_leaks_in_the_window",
        "0 * NaN: a plain product with values that some rows of the tile do not see",
        WINDOW_NAN,
        ("o_win",),
        (
            Edit("kernels/banded.py", "    add_visible_values,\n", "    add_product,\n"),
            Edit("kernels/banded.py", "add_visible_values(p, visible, v, acc)", "add_product(p, v, acc)"),
        ),
    ),
    Mutant(
        "nan_leaks_in_the_selection",
        "values of a selected block are loaded where the query does not see them",
        SELECTED_NAN,
        ("o_slc",),
        (
            Edit(
                "kernels/selected_query_major.py",
                "v = load_v_rows(v_base, keys, stride_vt, visible)",
                "v = load_v_rows(v_base, keys, stride_vt, keys >= 0)",
                times=2,
            ),
        ),
    ),
    # Addresses
    Mutant(
        "row_offsets_in_32_bits",
        "row numbers are multiplied by the stride in 32 bits",
        WINDOW_FAR,
        ("o_win", "lse_win"),
        (Edit("kernels/primitives.py", "rows.to(tl.int64)[:, None] * stride", "rows[:, None] * stride", times=2),),
    ),
)
