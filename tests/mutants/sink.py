"""Mistakes in the sink of a branch's softmax: its weight, its rescaling, its gradient, and whom it reaches."""

from __future__ import annotations

from dataclasses import replace

from nsa_gen.verification.inference import Scenario, Step
from tests.mutants.model import CacheCheck, Check, Edit, Mutant

DEVICE, WINDOW, GRADIENT = "kernels/primitives.py", "kernels/banded.py", "kernels/sink.py"
OPERATOR, DECODE = "operator.py", "kernels/decode_attend.py"
TOKEN_BY_TOKEN, MERGE = "kernels/selected_query_major.py", "kernels/selected_key_major_merge.py"

FORWARD = Check("sink", 23)
GRADIENTS = replace(FORWARD, gradients=True)
SELECTED = Check("selected with a sink", 23)
# Rows of NaN behind the last sequence, and a last tile of each sequence that is not full.
PADDED = Check("sink", (17, 0, 5), altered="padded", gradients=True)
LOCAL = Check("sink and local", 5, tokens_kv=67, local_in_window=True)
CACHE = CacheCheck("cached sink", Scenario(2, 60, None, (Step("fill", (30, 4)), Step("decode", (2, 1)))))

MUTANTS = (
    Mutant(
        "sink_scaled",
        "the sink is taken for a product of q and k, and scaled",
        FORWARD,
        ("o_win", "lse_win"),
        (Edit(DEVICE, "sink *= LOG2_E", "sink *= SCALE_LOG2"),),
    ),
    Mutant(
        "sink_in_base_2",
        "the sink, a natural logit, is added to base-2 weights as it is",
        FORWARD,
        ("o_win", "lse_win"),
        (Edit(DEVICE, "sink *= LOG2_E", "sink *= 1.0"),),
    ),
    Mutant(
        "sink_leaves_the_accumulator",
        "the accumulator is not rescaled where the sink is the new maximum",
        FORWARD,
        ("o_win",),
        (Edit(DEVICE, "acc = scale_rows(state.acc, rescale[:, None])\n    return", "acc = state.acc\n    return"),),
    ),
    Mutant(
        "sink_leaves_the_sum",
        "the sum of the weights is not rescaled where the sink is the new maximum",
        FORWARD,
        ("o_win", "lse_win"),
        (Edit(DEVICE, "state.row_sum * rescale + tl.exp2(sink", "state.row_sum + tl.exp2(sink"),),
    ),
    Mutant(
        "sink_of_the_first_head",
        "every head has the first head's sink",
        FORWARD,
        ("o_win", "lse_win"),
        (Edit(WINDOW, "tl.load(sink_ptr + head)", "tl.load(sink_ptr)"),),
    ),
    Mutant(
        "sink_in_the_local_part",
        "the selected branch's local blocks have a sink of weight one",
        LOCAL,
        ("o_slc", "lse_slc"),
        (
            Edit(
                WINDOW,
                "tl.store(local_sum_ptr + row_offsets, state.row_sum, mask=in_range)",
                "tl.store(local_sum_ptr + row_offsets, state.row_sum + 1.0, mask=in_range)",
            ),
        ),
    ),
    Mutant(
        "sink_gradient_without_the_gate",
        "the sink's gradient takes the branch's output for the operator's",
        GRADIENTS,
        ("dsink_win",),
        (Edit(GRADIENT, "(sink[None, :] - lse) * LOG2_E) * gate", "(sink[None, :] - lse) * LOG2_E)"),),
    ),
    Mutant(
        "sink_gradient_of_the_other_sign",
        "the sink's gradient lacks its minus",
        GRADIENTS,
        ("dsink_win",),
        (Edit(GRADIENT, "-tl.sum(part, 0)", "tl.sum(part, 0)"),),
    ),
    Mutant(
        "sink_gradient_of_the_first_tile_of_rows_alone",
        "one tile of rows alone has a part in the sink's gradient",
        replace(GRADIENTS, tokens=37),
        ("dsink_win",),
        (Edit(GRADIENT, "sink_gradient_kernel[(tiles,)](", "parts = parts[:1]\n    sink_gradient_kernel[(1,)]("),),
    ),
    Mutant(
        "sink_gradient_of_rows_that_pad_the_batch",
        "rows behind the last sequence have a part in the sink's gradient",
        PADDED,
        ("dsink_win",),
        (Edit(GRADIENT, "in_range &= rows < tl.load(cu_seqlens + num_sequences)", "in_range &= rows >= 0"),),
    ),
    Mutant(
        "sink_gradient_of_other_tokens_gates",
        "the sink's gradient takes every token's gate from the batch's first sequence",
        replace(GRADIENTS, batch=2),
        ("dsink_win",),
        (Edit(GRADIENT, "batches = (rows // tokens)[:, None]", "batches = (rows * 0)[:, None]"),),
    ),
    Mutant(
        "recomputed_without_the_sink",
        "the backward computes the window's output again with a sink of zero",
        replace(GRADIENTS, recompute=("win",)),
        ("dq", "dk", "dv", "dsink_win"),
        (
            Edit(
                OPERATOR,
                'if "win" in recompute:\n        o_win, lse_win = window_forward(q, k, v, sink_win, ',
                'if "win" in recompute:\n        o_win, lse_win = window_forward(q, k, v, 0 * sink_win, ',
            ),
        ),
    ),
    Mutant(
        "decode_without_a_sink",
        "decode's softmax of the window has no sink",
        CACHE,
        ("o", "lse_win"),
        (Edit(DECODE, "if sink is not None:", "if False:"),),
    ),
    Mutant(
        "decode_with_the_sinks_of_the_first_group",
        "decode takes the sinks of the first KV head's group for every group's",
        CACHE,
        ("o", "lse_win"),
        (Edit(DECODE, "tl.load(sink_ptr + list_number * LIST_HEADS + heads", "tl.load(sink_ptr + heads"),),
    ),
    Mutant(
        "selected_sink_left_out_token_by_token",
        "token by token, selected attention has no sink",
        replace(SELECTED, query_major="forward"),
        ("o", "lse_slc"),
        (
            Edit(
                TOKEN_BY_TOKEN,
                'mask=in_group, other=float("-inf"))\n    acc, row_max',
                'mask=heads < 0, other=float("-inf"))\n    acc, row_max',
            ),
        ),
    ),
    Mutant(
        "selected_sink_in_every_part",
        "block by block, the sink weighs once for each part that there may be",
        SELECTED,
        ("o", "lse_slc"),
        (
            Edit(
                MERGE,
                "row_sum + tl.exp2(sink - reference)",
                "row_sum + SELECTION_COUNT * PARTS * tl.exp2(sink - reference)",
            ),
        ),
    ),
    Mutant(
        "selected_sink_of_the_first_head",
        "block by block, every head has the first head's sink",
        SELECTED,
        ("o", "lse_slc"),
        (Edit(MERGE, "tl.load(sink_ptr + rows % QUERY_HEADS)", "tl.load(sink_ptr + rows * 0)"),),
    ),
    Mutant(
        "decode_with_the_windows_sink_for_selection",
        "decode's softmax of selected blocks has the window's sink",
        replace(CACHE, spec="cached sinks"),
        ("o", "lse_slc"),
        (Edit(DECODE, "load_sink(sink_slc_ptr", "load_sink(sink_win_ptr"),),
    ),
)
