"""Mistakes in a decode step that is one launch."""

from __future__ import annotations

from dataclasses import replace

from nsa_gen.lowering.decode_step import ALWAYS
from nsa_gen.verification.inference import Scenario, Step
from tests.mutants.inference import ONE_TOKEN
from tests.mutants.model import CacheCheck, Edit, Mutant

FILE = "kernels/decode_step.py"
ONE_LAUNCH = (("decode_launches", "MOST_ROUNDS", ALWAYS),)
STEP = replace(ONE_TOKEN, values=ONE_LAUNCH)
LONG = CacheCheck("cached", Scenario(1, 320, 16, (Step("fill", (300,)), Step("decode", (1,)))), ONE_LAUNCH)
LONGER = CacheCheck("cached", Scenario(1, 660, None, (Step("fill", (640,)), Step("decode", (1,)))), ONE_LAUNCH)
TIED = CacheCheck(
    "cached", Scenario(1, 260, None, (Step("fill", (200,)), Step("decode", (1,))), kind="ties"), ONE_LAUNCH
)


def _mutant(name: str, mistake: str, check: CacheCheck, killed_by: tuple[str, ...], old: str, new: str) -> Mutant:
    return Mutant(name, mistake, check, killed_by, (Edit(FILE, old, new),))


MUTANTS: tuple[Mutant, ...] = (
    _mutant(
        "step_window_one_key_too_long", "in a step in one launch the window has w + 1 keys", STEP, ("o_win",),
        "tl.maximum(asked.position - WINDOW + 1, 0)", "tl.maximum(asked.position - WINDOW, 0)",
    ),
    _mutant(
        "step_without_first_tiles", "in a step in one launch each program leaves out its first tile", STEP,
        ("o_win",), "return tiles * share // shares,", "return tiles * share // shares + 1,",
    ),
    _mutant(
        "step_without_last_compressed_blocks", "in a step in one launch the last tile of compressed blocks is left out",
        LONG, ("o_cmp",), "tl.minimum(end_tile, tiles_before)", "tl.minimum(end_tile, tiles_before - 1)",
    ),
    _mutant(
        "step_sums_importance_twice", "in a step in one launch the second program sums importance twice", LONGER,
        ("selection",), "sums_ptr + summed, importance", "sums_ptr + summed, (1 + split) * importance",
    ),
    _mutant(
        "step_ties_to_the_higher_block", "in a step in one launch equal importances go to the higher block", TIED,
        ("selection",), "(blocks[None, :] < blocks[:, None])", "(blocks[None, :] > blocks[:, None])",
    ),
    _mutant(
        "step_chooses_one_block_too_few", "in a step in one launch one slot that is not forced stays empty", LONG,
        ("selection",), "rank < FREE_BLOCKS", "rank < FREE_BLOCKS - 1",
    ),
    _mutant(
        "step_gate_of_another_branch", "in a step in one launch every branch has the first one's gate", STEP, ("o",),
        "stride_gh + branches[:, None], used_rows", "stride_gh + 0 * branches[:, None], used_rows",
    ),
    _mutant(
        "step_parts_of_another_branch", "in a step in one launch the parts of selected blocks are the window's", STEP,
        ("o_win",), "store_part(slc, parts, branch_rows", "store_part(slc, parts, 2 * branch_rows",
    ),
    _mutant(
        "step_window_overwritten", "in a step in one launch a window that came first is stored again, empty",
        STEP, ("o_win",), "if not window_first:", "if window_first | (late > 0):",
    ),
    _mutant(
        "step_lse_of_all_branches", "in a step in one launch a branch's lse is the sum of all", STEP, ("lse_win",),
        "tl.sum(tl.where(own[:, None], lse, 0.0), 0)", "tl.sum(lse, 0)",
    ),
)  # fmt: skip
