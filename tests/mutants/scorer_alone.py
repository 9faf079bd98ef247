"""Mistakes where compressed keys have no output, and only choose blocks."""

from __future__ import annotations

from nsa_gen.verification.inference import Scenario, Step
from tests.mutants.model import CacheCheck, Check, Edit, Mutant

CHECK = Check("scorer alone", 9, tokens_kv=126)
BESIDE = Check("scorer alone, keys of each branch", 8, tokens_kv=110)
STEPS = (Step("fill", (150,)), Step("prefill", (3,)), Step("decode", (2,)))
CACHED = CacheCheck("cached scorer alone", Scenario(1, 200, 16, STEPS))
BANDED, OPERATOR = "kernels/banded.py", "operator.py"

MUTANTS = (
    Mutant(
        "lse_of_blocks_seen_late",
        "a compressed block is in the lse, which serves scores alone, four tokens after its last one",
        CHECK,
        ("selection",),
        (Edit(BANDED, "BLOCK=spec.COMPRESSION_BLOCK.value,", "BLOCK=spec.COMPRESSION_BLOCK.value + 4,"),),
    ),
    Mutant(
        "lse_of_the_last_tile",
        "without values the sum over tiles of compressed keys begins anew in each",
        CHECK,
        ("selection",),
        (
            Edit(
                BANDED, "state.row_max, state.row_sum)\n        acc", "state.row_max, 0.0 * state.row_sum)\n        acc"
            ),
        ),
    ),
    Mutant(
        "lse_of_the_first_head",
        "every head of a group is scored by the lse of the layer's first",
        CHECK,
        ("selection",),
        (Edit("kernels/selection.py", "* QUERY_HEADS + heads", "* QUERY_HEADS + heads * 0"),),
    ),
    Mutant(
        "compressed_keys_of_the_window",
        "the keys of the window are compressed where each branch has its own",
        BESIDE,
        ("selection",),
        (Edit(OPERATOR, "compress_keys(k, sequences)", "compress_keys(k_win, sequences)"),),
    ),
    Mutant(
        "cached_compressed_keys_of_the_window",
        "a cache compresses the keys of its last pair",
        CACHED,
        ("selection",),
        (
            Edit("kernels/append.py", 'pooling = (layer["k_cmp"], None)', "pooling = (None, None)"),
            Edit("kernels/append.py", "pooling = (None,) * len(pooling)", 'pooling = (layer["k_cmp"], None)'),
        ),
    ),
    Mutant(
        "decoded_lse_of_one_split",
        "in decode the lse of compressed keys is that of its largest part",
        CACHED,
        ("selection",),
        (Edit("kernels/decode_select.py", "tl.sum(weight * part_sum, 1)", "tl.max(weight * part_sum, 1)"),),
    ),
)
