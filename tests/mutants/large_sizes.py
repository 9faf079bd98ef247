"""Mistakes where a list has more slots, or a row more parts, than are handled at once.

Tiles are made small for it; `tests/operator/test_large_sizes.py` holds that small tiles alone are right.
"""

from __future__ import annotations

from tests.mutants.model import Check, Edit, Mutant

SLOTS = Check("selected", 9, tokens_kv=48)
HOT = Check("selected", 40, kind="hot", gradients=True, seed=7)
FILLED = Check("many slots filled", 40)
MERGE, INDEX = "kernels/selected_key_major_merge.py", "kernels/inverted_index.py"
TWO_SLOTS = Edit(INDEX, "(SLOTS_PER_TOKEN.value), 1024)", "(SLOTS_PER_TOKEN.value), 2)")
TWO_PARTS = Edit("kernels/selected_key_major_forward.py", "MOST_PARTS = 256", "MOST_PARTS = 2")

MUTANTS = (
    Mutant(
        "slots_of_the_first_tile",
        "every program of a token numbers the lists of its first tile of slots, of 2 here",
        SLOTS,
        ("o",),
        (TWO_SLOTS, Edit(INDEX, "tl.program_id(1) * SLOT_TILE + tl.arange", "tl.arange")),
    ),
    Mutant(
        "sum_of_parts_not_rescaled",
        "the sum over earlier parts of a row, 2 at a time here, keeps its scale when the running maximum moves",
        SLOTS,
        ("o", "lse_slc"),
        (TWO_PARTS, Edit(MERGE, "tl.exp2(row_max - reference) * row_sum", "row_sum")),
    ),
    Mutant(
        "maximum_of_the_last_parts",
        "the maximum over a row's parts is that of the last 2 that were looked at",
        SLOTS,
        ("lse_slc",),
        (
            TWO_PARTS,
            Edit(MERGE, "new_max = tl.maximum(row_max, tl.max(max_parts, 1))", "new_max = tl.max(max_parts, 1)"),
        ),
    ),
    Mutant(
        "gradients_of_the_first_keys_merged",
        "each program that adds up the parts of a block's dK and dV takes its first tile of keys, of 8 here",
        HOT,
        ("dk", "dv"),
        (
            Edit(MERGE, "min(SELECTION_BLOCK.value, 128)", "min(SELECTION_BLOCK.value, 8)"),
            Edit(MERGE, "tl.program_id(1) * KEY_TILE + tl.arange", "tl.arange"),
        ),
    ),
    Mutant(
        "slots_filled_in_the_first_tile",
        "slots behind the first 64 are not written",
        FILLED,
        ("selection",),
        (
            Edit(
                "kernels/selection.py",
                "slots = first_slot + tl.arange(0, SLOT_TILE)[None, :]",
                "slots = tl.arange(0, SLOT_TILE)[None, :]",
            ),
        ),
    ),
)
