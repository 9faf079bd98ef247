"""Mistakes in the gradients of attention and of the gates, and in adding the branches up."""

from __future__ import annotations

from dataclasses import replace

from tests.mutants.model import Check, Edit, Mutant

WINDOW = Check("window", 21, gradients=True)
SELECTED = Check("selected", 12, tokens_kv=32, gradients=True)
SELECTED_TWICE = replace(SELECTED, twice=True)
COMPRESSED = Check("compressed", 22, gradients=True)
FULL_FORWARD = Check("full", 4, tokens_kv=20)
FULL = replace(FULL_FORWARD, gradients=True)

MUTANTS = (
    Mutant(
        "dk_of_the_last_head",
        "dK of the group's last head instead of the group's sum",
        WINDOW,
        ("dk",),
        (
            Edit(
                "window_attention.py",
                "        head = kv_head * GROUP + group_head\n",
                "        head = kv_head * GROUP + group_head\n        dk = zero_qk_rows(KEY_BLOCK)\n",
            ),
        ),
    ),
    Mutant(
        "dv_of_the_last_head",
        "dV of the group's last head instead of the group's sum",
        WINDOW,
        ("dv",),
        (
            Edit(
                "window_attention.py",
                "        head = kv_head * GROUP + group_head\n",
                "        head = kv_head * GROUP + group_head\n        dv = zero_v_rows(KEY_BLOCK)\n",
            ),
        ),
    ),
    Mutant(
        "delta_omitted_in_dq",
        "ds = p dp, without delta, in dQ",
        WINDOW,
        ("dq",),
        (Edit("window_attention.py", "ds = p * (dp - delta[:, None])", "ds = p * dp"),),
    ),
    Mutant(
        "delta_omitted_in_dk",
        "ds = p dp, without delta, in dK",
        WINDOW,
        ("dk",),
        (Edit("window_attention.py", "ds = p * (dp - delta[None, :])", "ds = p * dp"),),
    ),
    Mutant(
        "scale_folded_twice_in_dq",
        "dQ is scaled twice",
        WINDOW,
        ("dq",),
        (Edit("window_attention.py", "scale_qk_rows(dq, SCALE)", "scale_qk_rows(dq, SCALE * SCALE)"),),
    ),
    Mutant(
        "scale_folded_twice_in_probabilities",
        "the scores of the backward are scaled twice",
        WINDOW,
        ("dq", "dk", "dv"),
        (Edit("primitives.py", "tl.exp2(scores * SCALE_LOG2 - lse", "tl.exp2(scores * 0.37 * SCALE_LOG2 - lse"),),
    ),
    Mutant(
        "window_of_the_backward_one_too_narrow",
        "dK and dV miss the last query that sees a key",
        WINDOW,
        ("dk", "dv"),
        (
            Edit(
                "window_attention.py",
                "visible &= keys[:, None] >= first_visible(queries + offset)[None, :]",
                "visible &= keys[:, None] > first_visible(queries + offset)[None, :]",
            ),
        ),
    ),
    Mutant(
        "last_entry_of_each_list_dropped",
        "dK and dV of a selected block miss the last token of its list",
        SELECTED,
        ("dk", "dv"),
        (
            Edit(
                "selected_attention.py",
                "list_end = tl.load(starts_ptr + list_row + 1)",
                "list_end = tl.load(starts_ptr + list_row + 1) - 1",
            ),
        ),
    ),
    Mutant(
        "empty_slot_listed_under_block_0",
        "-1 in the caller's indices enters the list of block 0",
        SELECTED,
        ("dk", "dv"),
        (
            Edit(
                "selected_attention.py",
                "    valid = (blocks >= 0) & (blocks <= position // SELECTION_BLOCK)\n",
                "    blocks = tl.maximum(blocks, 0)\n    valid = blocks <= position // SELECTION_BLOCK\n",
            ),
        ),
    ),
    Mutant(
        "lists_in_random_order",
        "the tokens of a block's list come in another order at each call, as atomics would have it",
        SELECTED_TWICE,
        ("determinism",),
        (
            Edit(
                "selected_attention.py",
                "    lists, entries = torch.sort(lists.flatten(), stable=True)\n",
                "    order = torch.randperm(lists.numel(), device=lists.device)\n"
                "    lists, places = torch.sort(lists.flatten()[order], stable=True)\n"
                "    entries = order[places]\n",
            ),
        ),
    ),
    Mutant(
        "overlapping_block_forgotten",
        "a token's gradient comes from one of the compressed blocks it is in",
        COMPRESSED,
        ("dk", "dv"),
        (Edit("compression.py", "range(0, COMPRESSION_BLOCK // COMPRESSION_STRIDE)", "range(0, 1)"),),
    ),
    # Branches and gates
    Mutant(
        "gates_in_the_wrong_order",
        "the selected and the window branch are combined by each other's gate",
        FULL_FORWARD,
        ("o",),
        (
            Edit(
                "combine.py", "gate_offsets + 1, valid)[:, None] * o_slc", "gate_offsets + 2, valid)[:, None] * o_slc"
            ),
            Edit(
                "combine.py", "gate_offsets + 2, valid)[:, None] * o_win", "gate_offsets + 1, valid)[:, None] * o_win"
            ),
        ),
    ),
    Mutant(
        "gate_gradient_without_sigmoid",
        "the gradient of the selected branch's gate is that of the gate's value, not of its logit",
        FULL,
        ("dgates",),
        (Edit("combine.py", "dgate_slc = delta_slc * gate_slc * (1.0 - gate_slc)", "dgate_slc = delta_slc"),),
    ),
    Mutant(
        "gate_omitted_in_dv",
        "dV of the window is that of an ungated branch",
        FULL,
        ("dv",),
        (
            Edit(
                "window_attention.py",
                "            dv = add_v_product(p, do, dv)\n",
                "            ungated = gated_probabilities(scores, lse[None, :], 1.0, visible)\n"
                "            dv = add_v_product(ungated, do, dv)\n",
            ),
        ),
    ),
    Mutant(
        "delta_of_another_branch",
        "the window's gradients take the selected branch's delta",
        FULL,
        ("dq", "dk"),
        (Edit("attention.py", "delta[2]", "delta[1]"),),
    ),
    Mutant(
        "dq_of_the_last_branch",
        "the window's dQ overwrites that of the other branches",
        FULL,
        ("dq",),
        (
            Edit(
                "attention.py",
                "accumulate_dq=True,\n        accumulate_dkdv=True,",
                "accumulate_dq=False,\n        accumulate_dkdv=True,",
            ),
        ),
    ),
    Mutant(
        "dk_of_the_compression_overwrites",
        "what compression adds to dK and dV overwrites what the other branches gave",
        FULL,
        ("dk", "dv"),
        (Edit("attention.py", "        accumulate=True,\n", "        accumulate=False,\n"),),
    ),
)
