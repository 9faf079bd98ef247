"""Mistakes in the indexer's loss: its teacher, its student, their masks, its mean, and its gradients."""

from __future__ import annotations

from dataclasses import replace

from tests.mutants.model import Check, Edit, Mutant

# A block that is full, and one that is not.
LOSS = Check("indexer", 3, tokens_kv=25)
GRADIENTS = replace(LOSS, gradients=True)
NAN = replace(LOSS, kind="nan")
# Rows of NaN behind the last sequence.
PACKED = Check("indexer", (3, 0, 5), altered="padded", gradients=True)
LATE_PACKED = Check("indexer", (2, 0, 3), gradients=True)
ALL_HEADS = Check("indexer for all heads", 3, tokens_kv=25, gradients=True)
# Of four lists of seven slots, in pieces of 16, the third has two pieces.
PIECES = replace(GRADIENTS, tokens=7)
# More slots in a list than are in a tile.
TILES = replace(GRADIENTS, tokens=17, values=(("alignment_backward", "PIECE", 32),))
FILE = "kernels/alignment.py"
TEACHER = ("alignment_loss", "dq_idx", "dk_idx")


def _mutant(name: str, mistake: str, check: Check, killed_by: tuple[str, ...], old: str, new: str) -> Mutant:
    return Mutant(name, mistake, check, killed_by, (Edit(FILE, old, new),))


MUTANTS = (
    _mutant(
        "teacher_without_the_scale", "the teacher's logits are not scaled",
        GRADIENTS, TEACHER, "dot_rows(q, k), SCALE_LOG2,", "dot_rows(q, k), LOG2_E,",
    ),
    _mutant(
        "teacher_with_lse_in_base_2", "the teacher takes attention's lse for one in base 2",
        GRADIENTS, TEACHER, "-lse[:, None] * LOG2_E))", "-lse[:, None]))",
    ),
    _mutant(
        "teacher_of_unseen_tokens", "tokens that are not seen, and rows of no head, have weight in the teacher",
        GRADIENTS, TEACHER[:2], "return tl.where(seen, p, 0.0)", "return p",
    ),
    _mutant(
        "teacher_of_the_first_head", "the teacher of the loss is the first head of a scope",
        LOSS, TEACHER[:1], "in_list = heads < LIST_HEADS", "in_list = heads < 1",
    ),
    _mutant(
        "teacher_of_the_first_kv_head", "every KV head's teacher looks at the first one's keys",
        LOSS, TEACHER[:1], "kv_head_of(scope), stride_kb", "0 * kv_head_of(scope), stride_kb",
    ),
    _mutant(
        "teacher_of_one_kv_head_for_all", "where all heads choose together, the teacher is the first KV head's",
        ALL_HEADS, TEACHER[:2], "for kv_head in range(0, SCOPE_LISTS):", "for kv_head in range(0, 1):",
    ),
    _mutant(
        "loss_of_what_is_known", "the mean passes over losses that are NaN",
        NAN, TEACHER[:1], "tl.store(loss_ptr + choice, tl.where(empty, 0.0, loss))",
        "tl.store(loss_ptr + choice, tl.where(loss > 0.0, loss, 0.0))",
    ),
    _mutant(
        "student_of_unseen_tokens", "tokens that are not seen have the weight of a score of 0 in the student",
        GRADIENTS, TEACHER[:2], 'tl.where(visible, products, float("-inf"))', "products",
    ),
    _mutant(
        "student_sum_not_rescaled", "the student's sum is not rescaled where its maximum moves",
        GRADIENTS, TEACHER[:2], "index_sum = index_sum * rescale +", "index_sum = index_sum +",
    ),
    _mutant(
        "student_lse_in_base_2", "the lse of the index scores adds a logarithm in base 2",
        GRADIENTS, (TEACHER[0], TEACHER[2]), "index_max + tl.log(total)", "index_max + tl.log2(total)",
    ),
    _mutant(
        "student_keys_not_rescaled", "the gradient by index queries is not rescaled where the student's maximum moves",
        GRADIENTS, ("dq_idx",), "student_k = student_k * rescale +", "student_k = student_k +",
    ),
    _mutant(
        "loss_of_unnormalised_weights", "the teacher's weights are not divided by their sum in the loss",
        LOSS, TEACHER[:1], "(entropy - cross) / whole", "(entropy - cross)",
    ),
    _mutant(
        "loss_without_the_teachers_sum", "the logarithm of the teacher's weights is not that of its probabilities",
        LOSS, TEACHER[:1], " - tl.log(whole) + index_lse", " + index_lse",
    ),
    _mutant(
        "loss_of_the_last_tile", "the scores that the teacher weighs are those of the last tile of keys",
        LOSS, TEACHER[:1], "cross += tl.sum(", "cross = tl.sum(",
    ),
    _mutant(
        "loss_of_the_first_scope", "the mean leaves out scopes of the last queries",
        LOSS, TEACHER[:1], "end = tl.cast(tokens_q, tl.int64) * SCOPES", "end = tl.cast(tokens_q, tl.int64)",
    ),
    _mutant(
        "loss_by_scopes_too", "the mean is over queries and scopes",
        LOSS, TEACHER[:1], "tl.maximum(tokens_q, 1))", "tl.maximum(tokens_q, 1) / SCOPES)",
    ),
    _mutant(
        "packed_losses_of_the_first_rows", "every packed sequence's mean is of the batch's first tokens",
        LATE_PACKED, TEACHER[:1], "first_row = tl.load(cu_seqlens + sequence).to(tl.int64)",
        "first_row = tl.cast(0, tl.int64)",
    ),
    _mutant(
        "index_query_gradient_of_unnormalised_weights", "the teacher's weights are not divided by their sum in dq_idx",
        GRADIENTS, ("dq_idx",), "- teacher_k / whole", "- teacher_k",
    ),
    _mutant(
        "index_query_gradient_without_the_losses", "dq_idx does not know the gradient of the loss",
        GRADIENTS, ("dq_idx",), "(dq * weights[..., None, None])", "(dq + 0 * weights[..., None, None])",
    ),
    _mutant(
        "rows_behind_have_what_lies_there", "gradients of rows behind the last packed sequence are not written",
        PACKED, ("dq_idx",), "allocate = q.new_zeros if sequences.packed else q.new_empty", "allocate = q.new_empty",
    ),
    _mutant(
        "weights_of_the_first_sequence", "every packed sequence's loss has the gradient of the first one's",
        LATE_PACKED, ("dq_idx", "dk_idx"), "[sequence][None]", "[sequence * 0][None]",
    ),
    _mutant(
        "weights_of_the_whole_batch", "packed sequences have a mean over the tokens of the batch",
        LATE_PACKED, ("dq_idx", "dk_idx"), "bounds.diff().clamp(min=1)", "bounds.diff().sum().clamp(min=1)",
    ),
    _mutant(
        "index_key_gradient_of_the_future", "a block's index keys learn of queries before them",
        GRADIENTS, ("dk_idx",), "valid[:, None] & (keys[None, :] <= (first_position + tokens)[:, None])",
        "valid[:, None] & (keys[None, :] >= 0)",
    ),
    _mutant(
        "index_key_gradient_of_the_first_scope", "every KV head's index keys learn of the first one's index queries",
        GRADIENTS, ("dk_idx",), "gathered_rows(tokens, scopes, stride_it",
        "gathered_rows(tokens, scopes * 0, stride_it",
    ),
    _mutant(
        "index_key_gradient_without_the_student", "exponents of dk_idx lack the student's lse",
        GRADIENTS, ("dk_idx",), "tl.exp(index - index_lse[:, None])", "tl.exp(index)",
    ),
    _mutant(
        "index_key_gradient_of_unnormalised_weights", "the teacher's weights are not divided by their sum in dk_idx",
        GRADIENTS, ("dk_idx",), "teacher / tl.where(mass == 0.0, 1.0, mass)[:, None]", "teacher",
    ),
    _mutant(
        "index_key_gradient_of_the_first_head", "the teacher of dk_idx is the first head of each list",
        GRADIENTS, ("dk_idx",), "for head in range(0, LIST_HEADS):", "for head in range(0, 1):",
    ),
    _mutant(
        "index_key_gradient_without_the_losses", "dk_idx does not know the gradient of the loss",
        GRADIENTS, ("dk_idx",), "dk *= tl.load(weight_ptr + first_chunk_row + token)", "dk *= 1.0",
    ),
    _mutant(
        "index_key_gradient_of_the_last_slots", "a list's last tile of slots replaces what the others added",
        TILES, ("dk_idx",), "q_idx, dk, input_precision", "q_idx, 0 * dk, input_precision",
    ),
    _mutant(
        "index_key_gradient_of_the_first_piece", "later pieces of a list are not added",
        PIECES, ("dk_idx",), "if pieces > 1:", "if pieces > 1000:",
    ),
    _mutant(
        "index_key_gradient_of_the_last_piece", "a later piece of a list overwrites the first one's sum",
        PIECES, ("dk_idx",), "if (start == first) & (key == key_before):", "if (start == first) & (key < 0):",
    ),
    _mutant(
        "index_key_gradient_of_the_first_kv_head", "the other KV heads' parts of dk_idx are left out",
        GRADIENTS, ("dk_idx",), "dk.sum(2, keepdim=True)", "dk[:, :, :1]",
    ),
    _mutant(
        "student_whole_in_every_list", "where all heads choose together, each KV head's list adds the whole student",
        ALL_HEADS, ("dk_idx",), " * STUDENT_SHARE - teacher", " - teacher",
    ),
)  # fmt: skip
