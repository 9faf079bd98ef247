"""Mistakes in selected attention block by block: pieces and chunks of the inverted index, and the gradients.

A piece is 16 slots here.
"""

from __future__ import annotations

from dataclasses import replace

from tests.mutants.key_major import (
    BACKWARD,
    BACKWARD_ALONE,
    BACKWARDS,
    BATCH,
    FORWARD,
    GRADIENTS,
    MERGE,
    O_LSE,
    in_both,
)
from tests.mutants.model import Check, Edit, Mutant

# All tokens select the first blocks: lists of 36 slots and fewer, the first over three pieces; and lists of 16 slots.
LONG = Check("selected", 36, tokens_kv=48, kind="hot", gradients=True)
ALIGNED = Check("selected", 16, tokens_kv=48, kind="hot", gradients=True)
FULL = Check("full", 4, tokens_kv=20, gradients=True)
FULL_CHUNKS = replace(FULL, chunk_tokens=2)

MUTANTS = (
    # Pieces
    Mutant(
        "lists_cut_between_pieces_not_merged",
        "dK and dV of a list lack what pieces after its first found",
        LONG,
        ("dk", "dv"),
        (Edit(BACKWARDS, "if pieces > 1:", "if pieces < 1:"),),
    ),
    Mutant(
        "long_list_merged_at_each_piece",
        "what a list's third piece found is added by the second piece's program and by its own",
        LONG,
        ("dk", "dv"),
        (Edit(MERGE, "if continues & second & (key", "if continues & (key"),),
    ),
    Mutant(
        "third_piece_of_a_list_forgotten",
        "dK and dV of a list lack what its third piece found",
        LONG,
        ("dk", "dv"),
        (Edit(MERGE, "        piece += 1\n", "        piece += 2\n"),),
    ),
    Mutant(
        "first_piece_overwritten_by_the_others",
        "what later pieces of a list found takes the place of what the first found",
        LONG,
        ("dk", "dv"),
        (
            Edit(
                MERGE,
                "gradient = tl.load(pointers, mask=mask, other=0.0)",
                "gradient = tl.zeros(pointers.shape, dtype=tl.float32)",
            ),
        ),
    ),
    Mutant(
        "list_at_the_start_of_a_piece_without_an_owner",
        "a list that begins where a piece does is left to the piece before it",
        ALIGNED,
        ("dk", "dv"),
        (Edit(BACKWARDS, "if (start == first) & (key == key_before):", "if (start == first) & (start > 0):"),),
    ),
    # Chunks
    Mutant(
        "later_chunks_forgotten",
        "tokens after the first chunk are left out",
        BACKWARD,
        (*O_LSE, *GRADIENTS),
        in_both("for chunk in range(layout.chunks):", "for chunk in range(1):"),
    ),
    Mutant(
        "dk_of_the_last_chunk",
        "what a chunk adds to dK and dV overwrites what the chunks before it found",
        BACKWARD,
        ("dk", "dv"),
        (
            Edit(BACKWARDS, "in_range, dk, dk_ptr)", "in_range, dk)"),
            Edit(BACKWARDS, "in_range, dv, dv_ptr)", "in_range, dv)"),
        ),
    ),
    Mutant(
        "queries_of_the_first_chunk",
        "the queries of every chunk are those of the first, at their positions",
        FORWARD,
        O_LSE,
        in_both("first_token = first_chunk_row - tl.cast", "first_token = 0 - tl.cast"),
    ),
    Mutant(
        "delta_of_the_first_chunk",
        "do, lse and delta of every chunk are those of the first",
        BACKWARD,
        GRADIENTS,
        (
            Edit(
                BACKWARDS,
                "first_head_row = first_chunk_row * QUERY_HEADS + kv_head",
                "first_head_row = 0 * QUERY_HEADS + kv_head",
            ),
        ),
    ),
    Mutant(
        "gates_of_the_first_chunk",
        "the gates of every chunk are those of the first",
        FULL_CHUNKS,
        GRADIENTS,
        (Edit(BACKWARDS, "queries.first_token + tokens, heads", "tokens, heads"),),
    ),
    Mutant(
        "empty_slots_of_the_first_chunk",
        "slots that select nothing are known by the first chunk's number in every chunk",
        FORWARD,
        O_LSE,
        in_both("layout.no_key(chunk)", "layout.no_key(0)"),
    ),
    Mutant(
        "slots_of_the_first_chunk_merged",
        "which slots left parts is looked up in the first chunk for every chunk",
        BACKWARD_ALONE,
        ("dq",),
        (
            Edit(
                MERGE,
                "slot_keys_ptr += tl.cast(chunk, tl.int64)",
                "slot_keys_ptr += tl.cast(0 * chunk, tl.int64)",
                times=2,
            ),
        ),
    ),
    # Gradients
    Mutant(
        "dk_of_the_first_batch_entry",
        "dK and dV of every entry of the batch are added to the first's",
        BATCH,
        ("dk", "dv"),
        (
            Edit(
                BACKWARDS,
                "key_rows = (tl.cast(batch, tl.int64) * tokens_kv + first_row",
                "key_rows = (tl.cast(0 * batch, tl.int64) * tokens_kv + first_row",
            ),
        ),
    ),
    Mutant(
        "merged_dk_of_the_first_batch_entry",
        "what later pieces of a list found is added to dK and dV of the first entry of the batch",
        BATCH,
        ("dk", "dv"),
        (
            Edit(
                MERGE,
                "key_rows = tl.cast(batch, tl.int64) * tokens_kv + first_row",
                "key_rows = tl.cast(0 * batch, tl.int64) * tokens_kv + first_row",
            ),
        ),
    ),
    Mutant(
        "dq_parts_without_the_scale",
        "dQ of the selected branch lacks the scale",
        BACKWARD,
        ("dq",),
        (Edit(BACKWARDS, "        dq = scale_rows(dq, SCALE)\n", ""),),
    ),
    Mutant(
        "dk_without_the_scale",
        "dK of the selected branch lacks the scale",
        BACKWARD,
        ("dk",),
        (Edit(BACKWARDS, "scale_rows(sums.dk, SCALE), sums.dv", "sums.dk, sums.dv"),),
    ),
    Mutant(
        "delta_omitted_in_the_selection",
        "ds = p dp, without delta, in dQ and dK of the selected branch",
        BACKWARD,
        ("dq", "dk"),
        (Edit(BACKWARDS, "ds = p * (dot_rows(do, tile.v) - stats.delta[:, None])", "ds = p * dot_rows(do, tile.v)"),),
    ),
    Mutant(
        "gate_omitted_in_the_selection",
        "the gradients of the selected branch are those of an ungated one",
        FULL,
        GRADIENTS,
        (
            Edit(
                BACKWARDS,
                "gated_probabilities(dot_rows(q, tile.k), stats.lse[:, None], stats.gate[:, None], visible)",
                "gated_probabilities(dot_rows(q, tile.k), stats.lse[:, None], 1.0, visible)",
            ),
        ),
    ),
    Mutant(
        "dq_of_the_selection_overwrites",
        "the selected branch's dQ overwrites that of the other branches",
        FULL,
        ("dq",),
        (Edit(BACKWARDS, "slot_keys, dq, dq_before)", "slot_keys, dq, None)"),),
    ),
)
