"""Mistakes in the sink of the window's softmax: its weight, its rescaling, its gradient, and whom it reaches."""

from __future__ import annotations

from dataclasses import replace

from nsa_gen.verification.inference import Scenario, Step
from tests.mutants.model import CacheCheck, Check, Edit, Mutant

DEVICE, WINDOW, BACKWARD = "kernels/primitives.py", "kernels/banded.py", "kernels/banded_backward.py"
OPERATOR, DECODE = "operator.py", "kernels/decode_attend.py"

FORWARD = Check("sink", 23)
GRADIENTS = replace(FORWARD, gradients=True)
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
        (
            Edit(
                BACKWARD,
                "p = tl.exp2((sink - stats.lse) * LOG2_E) * stats.gate",
                "p = tl.exp2((sink - stats.lse) * LOG2_E)",
            ),
        ),
    ),
    Mutant(
        "sink_gradient_of_the_other_sign",
        "the sink's gradient lacks its minus",
        GRADIENTS,
        ("dsink_win",),
        (Edit(BACKWARD, "part = -tl.sum(", "part = tl.sum("),),
    ),
    Mutant(
        "sink_gradient_of_the_last_tile_of_rows_alone",
        "every tile of rows writes its part of the sink's gradient to the same place",
        replace(GRADIENTS, tokens=37),
        ("dsink_win",),
        (
            Edit(BACKWARD, "tl.num_programs(0) + tl.program_id(0)) * QUERY_HEADS", "tl.num_programs(0)) * QUERY_HEADS"),
            Edit(BACKWARD, "new_parts = q.new_zeros if sequences.packed else q.new_empty", "new_parts = q.new_zeros"),
        ),
    ),
    Mutant(
        "sink_gradient_of_programs_without_rows",
        "parts that no program writes, those of packed calls without rows, are not cleared",
        PADDED,
        ("dsink_win",),
        (Edit(BACKWARD, "new_parts = q.new_zeros if sequences.packed else q.new_empty", "new_parts = q.new_empty"),),
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
)
