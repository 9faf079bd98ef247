"""Mistakes in one softmax over selection and window: keys that count twice or not at all, the merge, its sink."""

from __future__ import annotations

from dataclasses import replace

from nsa_gen.verification.inference import Scenario, Step
from tests.mutants.model import CacheCheck, Check, Edit, Mutant

MERGE, JOINT, DECODE = "kernels/combine.py", "kernels/joint.py", "kernels/decode_attend.py"
TOKEN_BY_TOKEN, INDEX = "kernels/selected_query_major.py", "kernels/inverted_index.py"
FORWARD_PARTS, BACKWARD_PARTS = "kernels/selected_key_major_forward.py", "kernels/selected_key_major_backward.py"

# Queries whose window begins within a block that they also select.
FORWARD = Check("joint", 5, tokens_kv=67)
GRADIENTS = replace(FORWARD, gradients=True)
CACHE = CacheCheck("cached joint", Scenario(2, 60, None, (Step("fill", (41, 20)), Step("decode", (2, 1)))))
OUTPUTS = ("o", "lse_joint")
SHIFT = "first_position -= WINDOW"

MUTANTS = (
    Mutant(
        "joint_keys_twice",
        "block by block, selected attention also sees the window's keys",
        FORWARD,
        OUTPUTS,
        (Edit(FORWARD_PARTS, SHIFT, "first_position -= 0"),),
    ),
    Mutant(
        "joint_keys_twice_token_by_token",
        "token by token, selected attention also sees the window's keys",
        replace(FORWARD, query_major="forward"),
        OUTPUTS,
        (Edit(TOKEN_BY_TOKEN, "position -= WINDOW", "position -= 0", times=2),),
    ),
    Mutant(
        "joint_first_key_of_the_window_twice",
        "selected attention sees the window's first key, too",
        FORWARD,
        OUTPUTS,
        (Edit(FORWARD_PARTS, SHIFT, "first_position -= WINDOW - 1"),),
    ),
    Mutant(
        "joint_without_the_key_before_the_window",
        "selected attention leaves out the key before the window, too",
        replace(FORWARD, query_major="forward"),
        OUTPUTS,
        (Edit(TOKEN_BY_TOKEN, "position -= WINDOW", "position -= WINDOW + 1", times=2),),
    ),
    Mutant(
        "joint_without_the_block_that_the_window_begins_in",
        "a block that is partly in the window is taken for the window's",
        FORWARD,
        OUTPUTS,
        (
            Edit(
                INDEX,
                "(blocks * SELECTION_BLOCK <= position - WINDOW)",
                "((blocks + 1) * SELECTION_BLOCK <= position - WINDOW)",
            ),
        ),
    ),
    Mutant(
        "joint_gradients_of_keys_twice",
        "dk and dv of selected blocks also count the window's keys",
        GRADIENTS,
        ("dq", "dk", "dv"),
        (Edit(BACKWARD_PARTS, SHIFT, "first_position -= 0"),),
    ),
    Mutant(
        "joint_dq_of_keys_twice",
        "token by token, dq of selected blocks also counts the window's keys",
        replace(GRADIENTS, query_major="both"),
        ("dq",),
        (Edit(TOKEN_BY_TOKEN, "position -= WINDOW", "position -= WINDOW // 2", times=2),),
    ),
    Mutant(
        "joint_as_a_mean_of_both",
        "the merge weighs both outputs alike",
        FORWARD,
        ("o",),
        (Edit(MERGE, "(weight_slc * normaliser)[:, None]", "(weight_win * normaliser)[:, None]"),),
    ),
    Mutant(
        "joint_lse_of_the_larger",
        "the merged lse is the larger of both",
        FORWARD,
        OUTPUTS,
        (Edit(MERGE, "total = weight_slc + weight_win", "total = tl.maximum(weight_slc, weight_win)"),),
    ),
    Mutant(
        "joint_sink_twice",
        "the sink weighs once for each of the joint branches",
        FORWARD,
        OUTPUTS,
        (Edit(MERGE, "total += tl.exp2((sink - reference)", "total += 2.0 * tl.exp2((sink - reference)"),),
    ),
    Mutant(
        "joint_sink_of_the_first_head",
        "every head has the first head's sink",
        FORWARD,
        OUTPUTS,
        (Edit(MERGE, "tl.load(sink_ptr + at.rows % QUERY_HEADS)", "tl.load(sink_ptr + at.rows * 0)"),),
    ),
    Mutant(
        "joint_dq_of_the_window_lost",
        "dq of the window is not added to that of selected blocks",
        GRADIENTS,
        ("dq",),
        (Edit(JOINT, "chunk_tokens, dq_before=before)", "chunk_tokens, dq_before=dq_before)"),),
    ),
    Mutant(
        "decode_of_joint_keys_twice",
        "decode's selected blocks also count the window's keys",
        CACHE,
        OUTPUTS,
        (Edit(DECODE, "visible = wanted & (keys < window_start)", "visible = wanted & (keys <= position)"),),
    ),
    Mutant(
        "decode_of_the_window_alone",
        "decode's softmax begins again with the window",
        CACHE,
        OUTPUTS,
        (Edit(DECODE, "win = slc  # one softmax", "win = empty_softmax(HEAD_ROWS)"),),
    ),
)
