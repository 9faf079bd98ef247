"""Mistakes in the schedule in which the window's kernels do the selected branch's local blocks."""

from __future__ import annotations

from dataclasses import replace

from tests.mutants.model import Check, Edit, Mutant

WINDOW, WINDOW_BACKWARD = "kernels/banded.py", "kernels/banded_backward.py"
QUERY_MAJOR = "kernels/selected_query_major.py"
MERGE = "kernels/selected_key_major_merge.py"
ATTENTION = "operator.py"

# Two local blocks end a selection of four; the queries are at the end of one block and the beginning of the next.
FORWARD = Check("local", 5, tokens_kv=67, local_in_window=True)
BACKWARD = replace(FORWARD, gradients=True)
TOKENS = replace(FORWARD, query_major="both")
TOKENS_BACKWARD = replace(TOKENS, gradients=True)

MUTANTS = (
    Mutant(
        "local_blocks_done_twice",
        "the inverted index keeps the local blocks that the window's kernel has done",
        FORWARD,
        ("o_slc", "lse_slc"),
        (Edit("kernels/inverted_index.py", "last_block -= left_out", "last_block -= 0"),),
    ),
    Mutant(
        "local_blocks_done_twice_token_by_token",
        "the query-major kernel does the local blocks again",
        TOKENS,
        ("o_slc", "lse_slc"),
        (Edit(QUERY_MAJOR, "blocks -= done", "blocks -= 0"),),
    ),
    Mutant(
        "own_block_alone_for_local_blocks",
        "the window's kernel takes a token's own block alone for its local blocks",
        FORWARD,
        ("o_slc", "lse_slc"),
        (Edit(WINDOW, "(position // SELECTION_BLOCK - (LOCAL_BLOCKS - 1))", "(position // SELECTION_BLOCK)"),),
    ),
    Mutant(
        "keys_between_local_and_window_forgotten",
        "the window's kernel ends where the local blocks begin",
        FORWARD,
        ("o_win", "lse_win"),
        (
            Edit(
                WINDOW,
                "range(first, end):\n        keys",
                "range(first, end if band.KEYS == LOCAL else first):\n        keys",
            ),
        ),
    ),
    Mutant(
        "local_part_not_normalised",
        "the part of o for the local blocks is not divided by the sum of its weights",
        FORWARD,
        ("o_slc",),
        (
            Edit(
                WINDOW,
                "normaliser = 1.0 / tl.where(state.row_sum == 0.0, 1.0, state.row_sum)",
                "normaliser = 1.0 + 0.0 * state.row_sum",
            ),
        ),
    ),
    Mutant(
        "local_part_weighed_as_one_token_by_token",
        "the query-major kernel begins with the local part as if its weights summed to 1",
        TOKENS,
        ("o_slc",),
        (Edit(QUERY_MAJOR, "acc = scale_rows(acc, row_sum[:, None])", "acc = acc"),),
    ),
    Mutant(
        "local_maximum_not_merged",
        "the merge takes its maximum from the other parts alone, and the local part's weight overflows",
        replace(FORWARD, altered="sharp"),
        ("o_slc",),
        (
            Edit(MERGE, "row_max, row_sum = local_max, local_sum", "row_sum = tl.exp2(local_max) * local_sum"),
            Edit(MERGE, "tl.exp2(row_max - reference) * row_sum", "tl.exp2(-reference) * row_sum"),
        ),
    ),
    Mutant(
        "local_dq_with_the_delta_of_the_window",
        "dq of the local blocks subtracts the window's delta",
        BACKWARD,
        ("dq",),
        (
            Edit(
                WINDOW_BACKWARD,
                "ds += slc_p * (dp - slc.delta[:, None])\n        dq",
                "ds += slc_p * (dp - stats.delta[:, None])\n        dq",
            ),
        ),
    ),
    Mutant(
        "local_dk_of_every_key_of_the_window",
        "dK and dV of the local blocks count queries whose local blocks do not have the key",
        BACKWARD,
        ("dk", "dv"),
        (
            Edit(
                WINDOW_BACKWARD,
                "is_visible(rows + queries.offset, tile.keys, part_of(band, LOCAL))",
                "is_visible(rows + queries.offset, tile.keys, band)",
            ),
        ),
    ),
    Mutant(
        "last_viewers_of_a_local_block_forgotten",
        "dK and dV of a local block lack the queries of the block after it",
        BACKWARD,
        ("dk", "dv"),
        (
            Edit(
                WINDOW_BACKWARD,
                "(key // SELECTION_BLOCK + LOCAL_BLOCKS) *",
                "(key // SELECTION_BLOCK + LOCAL_BLOCKS - 1) *",
            ),
        ),
    ),
    Mutant(
        "local_gradients_twice",
        "the selected branch's backward keeps the local blocks that the window's has done",
        TOKENS_BACKWARD,
        ("dq", "dk", "dv"),
        (Edit(ATTENTION, "without_local=bool(local_in_window)", "without_local=False"),),
    ),
    Mutant(
        "local_gradients_forgotten",
        "neither branch's backward does the local blocks",
        BACKWARD,
        ("dq", "dk", "dv"),
        (
            Edit(
                ATTENTION,
                "selected=where_local(slc, lists) if local_in_window",
                "selected=where_local(slc, lists) if False",
            ),
        ),
    ),
)
