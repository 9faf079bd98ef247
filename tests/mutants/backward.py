"""Mistakes in the gradients of attention and of the gates, and in adding the branches up."""

from __future__ import annotations

from dataclasses import replace

from tests.mutants.model import Check, Edit, Mutant

WINDOW = Check("window", 21, gradients=True)
SELECTED = Check("selected", 12, tokens_kv=32, gradients=True, query_major="both")
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
                "kernels/banded_backward.py",
                "        head = first_head + step // head_steps\n",
                "        head = first_head + step // head_steps\n        dk = scale_rows(dk, step % head_steps != 0)\n",
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
                "kernels/banded_backward.py",
                "        head = first_head + step // head_steps\n",
                "        head = first_head + step // head_steps\n        dv = scale_rows(dv, step % head_steps != 0)\n",
            ),
        ),
    ),
    Mutant(
        "delta_omitted_in_dq",
        "ds = p dp, without delta, in dQ",
        WINDOW,
        ("dq",),
        (
            Edit(
                "kernels/banded_backward.py",
                "ds = p * (dp - stats.delta[:, None])\n        dq",
                "ds = p * dp\n        dq",
            ),
        ),
    ),
    Mutant(
        "delta_omitted_in_dk",
        "ds = p dp, without delta, in dK",
        WINDOW,
        ("dk",),
        (
            Edit(
                "kernels/banded_backward.py",
                "ds = p * (dp - stats.delta[:, None])\n        p =",
                "ds = p * dp\n        p =",
            ),
        ),
    ),
    Mutant(
        "scale_folded_twice_in_dq",
        "dQ is scaled twice",
        WINDOW,
        ("dq",),
        (Edit("kernels/banded_backward.py", "scale_rows(dq, SCALE)", "scale_rows(dq, SCALE * SCALE)"),),
    ),
    Mutant(
        "scale_folded_twice_in_probabilities",
        "the scores of the backward are scaled twice",
        WINDOW,
        ("dq", "dk", "dv"),
        (Edit("kernels/primitives.py", "tl.fma(scores, SCALE_LOG2, -lse", "tl.fma(scores, 0.37 * SCALE_LOG2, -lse"),),
    ),
    Mutant(
        "window_of_the_backward_one_too_narrow",
        "dK and dV miss the last query that sees a key",
        WINDOW,
        ("dk", "dv"),
        (
            Edit(
                "kernels/banded_backward.py",
                "p = tl.where(is_visible(rows + queries.offset, tile.keys, band), p, 0.0)",
                "p = tl.where(is_visible(rows + queries.offset + 1, tile.keys, band), p, 0.0)",
            ),
        ),
    ),
    Mutant(
        "delta_omitted_in_dq_of_the_selection",
        "ds = p dp, without delta, in dQ of the selected branch, token by token",
        SELECTED,
        ("dq",),
        (Edit("kernels/selected_query_major.py", "ds = p * (dp - delta[:, None])", "ds = p * dp"),),
    ),
    Mutant(
        "dq_of_the_first_selected_block",
        "dQ of the selected branch, token by token, has the keys of the first block in the place of every other",
        SELECTED,
        ("dq",),
        (
            Edit(
                "kernels/selected_query_major.py",
                "k, dq)\n        block = load_block(indices_base, (step + 1) // TILES_PER_BLOCK, blocks)",
                "k, dq)\n        block = load_block(indices_base, 0, blocks)",
            ),
        ),
    ),
    Mutant(
        "overlapping_block_forgotten",
        "a token's gradient comes from one of the compressed blocks it is in",
        COMPRESSED,
        ("dk", "dv"),
        (Edit("kernels/compression_pool.py", "range(0, COMPRESSION_BLOCK // COMPRESSION_STRIDE)", "range(0, 1)"),),
    ),
    # Branches and gates
    Mutant(
        "gates_in_the_wrong_order",
        "the selected and the window branch are combined by each other's gate",
        FULL_FORWARD,
        ("o",),
        (Edit("kernels/combine.py", "(gates + branch, at.valid)[:,", "(gates + (3 - branch) % 3, at.valid)[:,"),),
    ),
    Mutant(
        "gate_gradient_without_sigmoid",
        "the gradient of the selected branch's gate is that of the gate's value, not of its logit",
        FULL,
        ("dgates",),
        (Edit("kernels/combine.py", "* gate * (1.0 - gate)", "* (gate * (1.0 - gate) if branch != 1 else 1.0)"),),
    ),
    Mutant(
        "gate_omitted_in_dv",
        "dV of the window is that of an ungated branch",
        FULL,
        ("dv",),
        (
            Edit(
                "kernels/banded_backward.py",
                "        dv = add_product(tl.trans(p), do, dv)\n",
                "        ungated = gated_probabilities(\n"
                "            products, stats.lse[:, None], 1.0, is_visible(rows + queries.offset, tile.keys, band)\n"
                "        )\n"
                "        dv = add_product(tl.trans(ungated), do, dv)\n",
            ),
        ),
    ),
    Mutant(
        "delta_of_another_branch",
        "the window's gradients take the selected branch's delta",
        FULL,
        ("dq", "dk"),
        (Edit("operator.py", "deltas[2]", "deltas[1]"),),
    ),
    Mutant(
        "dq_of_the_window_overwrites",
        "the window's dQ overwrites that of the compressed branch",
        FULL,
        ("dq",),
        (Edit("operator.py", "sequences, dq_before=dq)", "sequences)"),),
    ),
    Mutant(
        "dk_of_the_compression_overwrites",
        "what compression adds to dK and dV overwrites what the other branches gave",
        FULL,
        ("dk", "dv"),
        (Edit("operator.py", ", dk_before=dk, dv_before=dv", ""),),
    ),
)
