"""Mistakes in who shares a choice of blocks, and in maxima in the place of sums."""

from __future__ import annotations

from nsa_gen.verification.inference import Scenario, Step
from tests.mutants.model import CacheCheck, Check, Edit, Mutant

HEADS = Check("means of heads", 6, tokens_kv=110)
BOTH = Check("means of heads", 9, tokens_kv=75, gradients=True)
ROWS = Check("means of heads", 6, tokens_kv=75, query_major="forward")
ALL = Check("means of all heads", 6, tokens_kv=110)
IMPORTANCE = Check("importance for all heads", 6, tokens_kv=110)
MAXIMA = Check("maxima", 8, tokens_kv=126)
UNKNOWN = Check("maxima", 3, tokens_kv=99, kind="nan")
STEPS = (Step("fill", (150,)), Step("decode", (2,)))
CACHED = CacheCheck("cached means of heads", Scenario(1, 200, 16, STEPS))
CACHED_ALL = CacheCheck("cached means of all heads", Scenario(1, 200, None, STEPS))
CACHED_MAXIMA = CacheCheck(
    "cached maxima", Scenario(1, 320, None, (Step("fill", (300,)), Step("decode", (2,))), seed=2)
)
SELECTION, LISTS = "kernels/selection.py", "kernels/selected_key_major_lists.py"
DECODE, PRIMITIVES = "kernels/decode_select.py", "kernels/primitives.py"


def _mutant(
    name: str,
    mistake: str,
    check: Check | CacheCheck,
    killed_by: tuple[str, ...],
    file: str,
    old: str,
    new: str,
    times: int = 1,
) -> Mutant:
    return Mutant(name, mistake, check, killed_by, (Edit(file, old, new, times),))


MUTANTS = (
    _mutant(
        "list_of_another_kv_head", "a head's blocks are those of the KV head of its number in a group",
        HEADS, ("o_slc",), PRIMITIVES, "return list_number // GROUP", "return list_number % 2",
    ),
    _mutant(
        "gathered_head_of_another_list", "block by block, a slot is taken for that of the next head of its group",
        BOTH, ("o", "dq", "dk", "dv"), LISTS, "// SELECTION_COUNT % GROUP", "// SELECTION_COUNT % GROUP * 0",
    ),
    _mutant(
        "every_head_reads_the_first_list", "token by token, every head follows the list of the first",
        ROWS, ("o",), "kernels/selected_query_major.py",
        "indices_base = indices_ptr + (row * LISTS + list_number) * SELECTION_COUNT",
        "indices_base = indices_ptr + (row * LISTS) * SELECTION_COUNT", times=2,
    ),
    _mutant(
        "scores_of_one_kv_head", "where all heads choose together the last KV head alone decides",
        ALL, ("selection",), SELECTION, "score += exact_product(", "score = exact_product(",
    ),
    _mutant(
        "importance_of_one_kv_head", "where all heads choose together the last KV head's importance decides",
        IMPORTANCE, ("selection",), SELECTION, "p += add_probabilities(", "p = add_probabilities(",
    ),
    _mutant(
        "maximum_is_a_sum", "a block's importance is the sum of its compressed blocks' probabilities",
        MAXIMA, ("selection",), SELECTION, "tl.reshape(tl.max(p, 1), (BLOCK_TILE, TOKEN_BLOCK))",
        "tl.reshape(tl.sum(p, 1), (BLOCK_TILE, TOKEN_BLOCK))",
    ),
    _mutant(
        "maximum_without_what_reaches_in", "compressed blocks that begin before a block do not count in its maximum",
        MAXIMA, ("selection",), SELECTION, "importance = tl.maximum(importance, carried)",
        "importance += 0.0 * carried",
    ),
    _mutant(
        "maximum_of_what_is_known", "a maximum passes over probabilities that are NaN",
        UNKNOWN, ("selection",), SELECTION, "return tl.where(p == p, p, float(\"inf\"))",
        "return tl.where(p == p, p, 0.0)",
    ),
    _mutant(
        "decoded_choice_of_the_first_head", "in decode every head is scored by the first head's queries",
        CACHED, ("selection",), DECODE, "batch, token, scope, mean_rows", "batch, token, scope * 0, mean_rows",
    ),
    _mutant(
        "decoded_maximum_is_a_sum", "in decode a block's importance is the sum of its compressed blocks' probabilities",
        CACHED_MAXIMA, ("selection",), DECODE, "tl.max(keep_unknown(p), 1)", "tl.sum(keep_unknown(p), 1)",
    ),
    _mutant(
        "decoded_maximum_without_what_reaches_in", "in decode compressed blocks that begin before a block do not count",
        CACHED_MAXIMA, ("selection",), DECODE, "members = FIRST_OVERLAP +", "members =",
    ),
    _mutant(
        "decoded_maximum_relative_to_its_tile", "probabilities of tiles with different references are compared",
        CACHED_MAXIMA, ("selection",), DECODE, "tl.exp2(reference - lse[:, None, None]) * relative", "relative",
    ),
    _mutant(
        "decoded_list_of_another_kv_head", "in decode a head reads the blocks of the first KV head",
        CACHED, ("o_slc",), "kernels/decode_attend.py", "kv_head_of(list_number)", "kv_head_of(list_number) * 0",
    ),
    _mutant(
        "decoded_choice_of_one_kv_head", "in decode the last KV head decides for all",
        CACHED_ALL, ("selection",), DECODE, "score += mean_scores(", "score = mean_scores(",
    ),
    _mutant(
        "decoded_choice_read_by_lists", "in decode each KV head looks for a list of its own where all share one",
        CACHED_ALL, ("o_slc",), "kernels/decode_attend.py",
        "choice_row = tl.cast(batch, tl.int64) * tokens + token", "choice_row = list_row // 2 * 0 + token * 0",
    ),
)  # fmt: skip
