"""Mistakes in the choice of blocks by an indexer."""

from __future__ import annotations

from nsa_gen.verification.inference import Scenario, Step
from tests.mutants.model import CacheCheck, Check, Edit, Mutant

CHECK = Check("indexer", 8, tokens_kv=126)
NAN = Check("indexer", 6, tokens_kv=110, kind="nan")
PACKED = Check("indexer", (23, 86))
CACHED = CacheCheck("cached indexer", Scenario(1, 320, 16, (Step("fill", (300,)), Step("decode", (2,))), seed=2))
SELECTION, DECODE, APPEND = "kernels/selection.py", "kernels/decode_select.py", "kernels/append.py"


def _mutant(
    name: str,
    mistake: str,
    check: Check | CacheCheck,
    file: str,
    old: str,
    new: str,
) -> Mutant:
    return Mutant(name, mistake, check, ("selection",), (Edit(file, old, new),))


MUTANTS = (
    _mutant(
        "index_scores_of_the_first_token", "a block's score is the product with its first token",
        CHECK, SELECTION, "blocks * SELECTION_BLOCK + member, stride_kt", "blocks * SELECTION_BLOCK, stride_kt",
    ),
    _mutant(
        "index_scores_of_all_but_the_last_token", "the last token of a block has no part in its score",
        CHECK, SELECTION, "for member in range(0, SELECTION_BLOCK):", "for member in range(0, SELECTION_BLOCK - 1):",
    ),
    _mutant(
        "index_queries_of_the_first_scope", "every KV head chooses by the first one's index queries",
        CHECK, SELECTION, "q_base = row_base(q_ptr, batch, first_row, scope,",
        "q_base = row_base(q_ptr, batch, first_row, 0,",
    ),
    _mutant(
        "index_scores_of_what_is_known", "a maximum passes over products that are NaN",
        NAN, SELECTION, "tl.maximum(scores, products, propagate_nan=tl.PropagateNan.ALL)",
        "tl.where(products > scores, products, scores)",
    ),
    _mutant(
        "packed_index_keys_of_the_batch", "index keys of a packed sequence are those of the batch's first tokens",
        PACKED, SELECTION, "keys = row_base(k_ptr, batch, first_row, 0,", "keys = row_base(k_ptr, batch, 0, 0,",
    ),
    _mutant(
        "decoded_index_scores_of_the_first_token", "in decode a block's score is the product with its first token",
        CACHED, DECODE, "blocks * SELECTION_BLOCK + member, competing",
        "blocks * SELECTION_BLOCK + 0 * member, competing",
    ),
    _mutant(
        "decoded_index_queries_of_the_first_scope", "in decode every KV head chooses by the first one's index queries",
        CACHED, DECODE, "q_base = row_base(q_ptr, batch, token, scope,", "q_base = row_base(q_ptr, batch, token, 0,",
    ),
    _mutant(
        "index_keys_in_one_row", "every index key is written to the first row of the cache",
        CACHED, APPEND,
        "rows = token_rows(table_ptr, table_width, capacity, batch, start + numbers, valid, PAGE_SIZE)",
        "rows = (start + numbers).to(tl.int64) * 0",
    ),
)  # fmt: skip
