"""Mistakes in selected attention block by block: the inverted index, which keys a token sees, the parts of outputs."""

from __future__ import annotations

from dataclasses import replace

from tests.mutants.model import Check, Edit, Mutant

INDEX, LISTS, MERGE = (
    "kernels/inverted_index.py",
    "kernels/selected_key_major_lists.py",
    "kernels/selected_key_major_merge.py",
)
FORWARDS, BACKWARDS = "kernels/selected_key_major_forward.py", "kernels/selected_key_major_backward.py"

# Chunks of 6 and 5 tokens.
FORWARD = Check("selected", 11, tokens_kv=41, chunk_tokens=6)
BACKWARD = replace(FORWARD, gradients=True)
# The forward needs no index, and the backward makes it.
BACKWARD_ALONE = replace(BACKWARD, query_major="forward")
TWICE = Check("selected", 40, tokens_kv=60, gradients=True, twice=True)
# All tokens select the same three blocks: lists of 9 slots, of which two of the second entry are cut, after 16 slots.
BATCH = Check("selected", 9, tokens_kv=41, kind="hot", batch=2, gradients=True)
COUNTS = Check("selected", 8, tokens_kv=48, altered="counts")
NAN = Check("selected", 14, tokens_kv=32, kind="nan")
# The last sequence begins inside a chunk.
PACKED = Check("selected", (9, 0, 16), chunk_tokens=13)
GROUPED = Check("grouped", 6, tokens_kv=70)
GROUPED_BACKWARD = replace(GROUPED, gradients=True, query_major="forward")

O_LSE = ("o_slc", "lse_slc")
GRADIENTS = ("dq", "dk", "dv")


def unmasked(file: str) -> Edit:
    """Tokens see their own block's keys after them."""
    return Edit(file, "first_position + tokens)[:, None]", "first_position + tokens + SELECTION_BLOCK)[:, None]")


def in_both(old: str, new: str) -> tuple[Edit, Edit]:
    """The same mistake in the forward and in the backward."""
    return Edit(FORWARDS, old, new), Edit(BACKWARDS, old, new)


MUTANTS = (
    # The index
    Mutant(
        "last_slot_of_each_list_dropped",
        "the last slot of a piece's share of a list is left out",
        BACKWARD_ALONE,
        GRADIENTS,
        (
            Edit(
                LISTS,
                "return tl.load(slots_ptr + positions, mask=positions < end, other=-1)",
                "return tl.load(slots_ptr + positions, mask=positions < end - 1, other=-1)",
            ),
        ),
    ),
    Mutant(
        "empty_slot_listed_under_block_0",
        "-1 in the caller's indices enters the list of block 0",
        BACKWARD_ALONE,
        GRADIENTS,
        (
            Edit(
                INDEX,
                "    valid = (blocks >= 0) & (blocks <= position // SELECTION_BLOCK)\n",
                "    blocks = tl.maximum(blocks, 0)\n    valid = in_range & (blocks <= position // SELECTION_BLOCK)\n",
            ),
        ),
    ),
    Mutant(
        "slots_beyond_the_counts_listed",
        "slots beyond the caller's counts enter the lists",
        COUNTS,
        O_LSE,
        (Edit(INDEX, "if counts_ptr is not None:", "if counts_ptr is not None and SLOT_TILE == 0:"),),
    ),
    Mutant(
        "lists_in_random_order",
        "the tokens of a block's list come in another order at each call, as atomics would have it",
        TWICE,
        ("determinism",),
        (
            Edit(
                INDEX,
                "    keys, slots = torch.sort(keys, stable=True)\n",
                "    order = torch.randperm(keys.numel(), device=keys.device)\n"
                "    keys, places = torch.sort(keys[order], stable=True)\n"
                "    slots = order[places]\n",
            ),
        ),
    ),
    Mutant(
        "lists_of_the_first_kv_head",
        "slots of every KV head enter the lists of the first",
        GROUPED,
        O_LSE,
        (Edit(INDEX, "kv_heads * block_rows + first_block", "first_block"),),
    ),
    Mutant(
        "lists_of_the_first_batch_entry",
        "slots of every entry of the batch enter the lists of the first",
        BATCH,
        (*O_LSE, *GRADIENTS),
        (Edit(INDEX, "first_block = batch * blocks_per_batch", "first_block = batch * 0"),),
    ),
    Mutant(
        "lists_shared_by_packed_sequences",
        "the last block of a packed sequence and the first of the next have one list",
        PACKED,
        O_LSE,
        (
            Edit(
                INDEX,
                "first_block = first_row // SELECTION_BLOCK + sequence",
                "first_block = first_row // SELECTION_BLOCK",
            ),
        ),
    ),
    Mutant(
        "lists_of_a_piece_taken_for_one",
        "all slots of a piece get the keys of its first list",
        FORWARD,
        O_LSE,
        (
            Edit(
                LISTS,
                "tl.where(keys == key, end, tl.minimum(positions, end))",
                "tl.where(keys >= key, end, tl.minimum(positions, end))",
            ),
        ),
    ),
    # Which keys a token sees
    Mutant(
        "key_major_diagonal_unmasked",
        "no causal mask inside the query's own selected block",
        FORWARD,
        O_LSE,
        (Edit(FORWARDS, "tile.keys[None, :] <= positions[:, None]", "None"),),
    ),
    Mutant(
        "key_major_diagonal_unmasked_in_the_backward",
        "no causal mask inside the query's own selected block, in the backward",
        BACKWARD,
        GRADIENTS,
        (unmasked(BACKWARDS),),
    ),
    Mutant(
        "edge_one_tile_short",
        "a tile of tokens the last of which sees all keys is taken for one that all see in full",
        FORWARD,
        O_LSE,
        (
            Edit(
                LISTS,
                "tl.cdiv(tl.sum(edge.to(tl.int32), 0), TOKEN_BLOCK)",
                "tl.sum(edge.to(tl.int32), 0) // TOKEN_BLOCK",
            ),
        ),
    ),
    Mutant(
        "edge_without_the_last_token",
        "a token that sees all keys of a block but the last is taken to see that one too",
        FORWARD,
        O_LSE,
        (Edit(LISTS, "slots // SLOTS_PER_TOKEN < last_key", "slots // SLOTS_PER_TOKEN < last_key - 1"),),
    ),
    Mutant(
        "key_major_query_offset_forgotten",
        "with more keys than queries, query r is taken to be at position r",
        FORWARD,
        O_LSE,
        in_both("first_token - first_row + sequence_kv - sequence_q", "first_token - first_row"),
    ),
    Mutant(
        "sequence_start_forgotten",
        "the position of a packed token is counted from the first sequence's start",
        PACKED,
        O_LSE,
        in_both("(first_token - first_row + sequence_kv", "(first_token + sequence_kv"),
    ),
    Mutant(
        "nan_leaks_from_a_block",
        "0 * NaN: a plain product with values that some tokens of a block's tile do not see",
        NAN,
        ("o_slc",),
        (Edit(FORWARDS, "add_values_until(p, positions, tile.keys, tile.v, acc)", "add_product(p, tile.v, acc)"),),
    ),
    # Parts of a block and of a group
    Mutant(
        "parts_of_a_block_read_its_first_keys",
        "every part of a block attends to the keys of the first part",
        GROUPED,
        O_LSE,
        (
            Edit(
                FORWARDS,
                "keys = block * SELECTION_BLOCK + part * KEY_BLOCK + tl",
                "keys = block * SELECTION_BLOCK + tl",
            ),
        ),
    ),
    Mutant(
        "parts_of_all_heads_in_one_row",
        "the heads of a group leave their parts in each other's rows",
        GROUPED,
        O_LSE,
        (
            Edit(
                FORWARDS,
                "* LIST_HEADS + list_heads\n    tl.store(parts.row_max",
                "* LIST_HEADS\n    tl.store(parts.row_max",
            ),
        ),
    ),
    Mutant(
        "parts_of_another_head",
        "the merge gives each head of a group the parts of another",
        GROUPED,
        O_LSE,
        (
            Edit(
                MERGE,
                "slots * PARTS * LIST_HEADS + heads % LIST_HEADS",
                "slots * PARTS * LIST_HEADS + LIST_HEADS - 1 - heads % LIST_HEADS",
            ),
        ),
    ),
    Mutant(
        "parts_of_the_first_kv_head",
        "the merge gives every head the parts of the first KV head's slots",
        GROUPED_BACKWARD,
        ("dq",),
        (Edit(MERGE, "(rows // QUERY_HEADS * LISTS + heads // LIST_HEADS)", "(rows // QUERY_HEADS * LISTS)"),),
    ),
    Mutant(
        "padding_rows_counted",
        "rows beyond the group's heads repeat its last head in dK and dV",
        GROUPED_BACKWARD,
        ("dk", "dv"),
        (
            Edit(
                BACKWARDS,
                "    valid = (slots >= 0) & (list_heads < LIST_HEADS)\n",
                "    list_heads = tl.minimum(list_heads, LIST_HEADS - 1)\n    valid = slots >= 0\n",
            ),
        ),
    ),
    # The merge of outputs
    Mutant(
        "scale_forgotten_slc_key_major",
        "`slc`: 1/sqrt(Dk) where the spec gives another scale, block by block",
        FORWARD,
        O_LSE,
        (
            Edit(
                FORWARDS,
                "softmax_tile(dot_rows(q, tile.k), tile",
                "softmax_tile(dot_rows(q, tile.k) * (0.25 / 0.37), tile",
            ),
        ),
    ),
    Mutant(
        "parts_averaged",
        "the parts of an output are averaged, whatever their share of the softmax",
        FORWARD,
        ("o_slc",),
        (
            Edit(
                MERGE,
                "o += (tl.exp2(max_part - reference) * sum_part * normaliser)[:, None] * o_part",
                "o += o_part / tl.maximum(tl.sum((sum_parts > 0.0).to(tl.float32), 1), 1.0)[:, None]",
            ),
        ),
    ),
    Mutant(
        "sums_of_parts_not_rescaled",
        "the sums of the parts are added up without regard for their maxima",
        FORWARD,
        O_LSE,
        (Edit(MERGE, "tl.sum(weights * sum_parts, 1)", "tl.sum(sum_parts, 1)"),),
    ),
    Mutant(
        "nothing_merged_with_nothing",
        "a token without any part subtracts a maximum of -inf from -inf",
        FORWARD,
        ("o_slc",),
        (Edit(MERGE, 'reference = tl.where(row_max == float("-inf"), 0.0, row_max)', "reference = row_max"),),
    ),
    Mutant(
        "parts_of_empty_slots_merged",
        "slots that select nothing, and left no part, are merged into o and lse",
        FORWARD,
        O_LSE,
        (
            Edit(MERGE, "written = wanted & (keys != no_key)", "written = wanted"),
            Edit(MERGE, "filled = in_range & (key != no_key)", "filled = in_range"),
        ),
    ),
    Mutant(
        "parts_of_empty_slots_added_to_dq",
        "slots that select nothing, and left no part, are added to dQ",
        BACKWARD_ALONE,
        ("dq",),
        (Edit(MERGE, "mask = (in_range & (key != no_key))[:, None]", "mask = in_range[:, None]"),),
    ),
    Mutant(
        "parts_of_another_slot_asked_for",
        "whether a part was left is asked of another slot of the token",
        GROUPED,
        O_LSE,
        (
            Edit(MERGE, "parts[None, :] // PARTS", "parts[None, :] % PARTS"),
            Edit(MERGE, "slots + index // PARTS", "slots + index % PARTS", times=2),
        ),
    ),
)
