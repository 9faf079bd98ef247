"""Decode in one launch: which specs have this kernel, and which calls use it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nsa_gen.lowering.branches import sunk_branches
from nsa_gen.lowering.hopper import HOPPER
from nsa_gen.lowering.parts import Config, Decision, Kernel, Tunable
from nsa_gen.lowering.selection import free_slots
from nsa_gen.spec import Spec

if TYPE_CHECKING:
    from nsa_gen.hardware import Gpu
    from nsa_gen.lowering.plan import Plan

NAME, MOST_ROUNDS, FEWEST_PROGRAMS = "decode_launches", "MOST_ROUNDS", "FEWEST_PROGRAMS"
_THREE = ("decode_compressed", "decode_select", "decode_attend")
#: More tiles of compressed blocks than any program has. As the limit, it means that one launch serves every call.
ALWAYS = 2**16
#: Most tiles of compressed blocks per program with which one launch is faster than three. On an H200 it takes 0.6 of
#: the time of three with one tile, 0.75 with two, and 0.93 with four.
_ROUNDS = 4
#: Fewest programs per list with which one launch is faster. With two, it took 0.96 and 1.1 of the time.
_PROGRAMS = 4
#: Most selection blocks from which each program selects: in caches of more, three launches are faster.
MOST_BLOCKS = 1536


def decode_step_fits(spec: Spec) -> bool:
    """Whether decode has a kernel with all steps: the three branches of NSA, each KV head with its own selection."""
    selection, compression = spec.selection, spec.compression
    if "decode" not in spec.passes or selection is None or compression is None or spec.window is None:
        return False
    chosen = selection.indices == "computed" and selection.scores == "compression" and free_slots(spec) > 0
    alone = not spec.combine.joint and not sunk_branches(spec)
    return chosen and alone and selection.pool == "sum" and compression.output and spec.scopes == spec.heads.kv


def decisions(spec: Spec) -> tuple[Decision, ...]:
    """The decision which calls of decode use this kernel.

    They have at most MOST_ROUNDS tiles of compressed blocks per program (0 means never), and at least FEWEST_PROGRAMS
    programs per list.
    """
    if not decode_step_fits(spec):
        return ()
    rounds = Tunable(MOST_ROUNDS, (0, 1, 2, 4, 8, ALWAYS), size=True, least=0)
    return (Decision(NAME, (rounds, Tunable(FEWEST_PROGRAMS, (8, 4, 2, 1))), (HOPPER,), ("decode",)),)


def choose(spec: Spec, target: str) -> dict[str, Config]:
    """The default of that decision on an architecture or on the interpreter, by the decision's name."""
    rounds = _ROUNDS if target == HOPPER else 0
    values = ((MOST_ROUNDS, rounds), (FEWEST_PROGRAMS, _PROGRAMS))
    return {each.name: Config(each.name, values) for each in decisions(spec)}


def programs_per_list(plan: Plan, gpu: Gpu, tokens: int, batch: int) -> int:
    """Programs that share a list if a step is one launch, for caches of `tokens` tokens; 0 if it is three launches.

    This is the rule of a package's `step_splits`, with the defaults of a GPU.
    """
    if not plan.decode_steps:
        return 0
    assert plan.selected is not None and plan.overlap is not None
    splits = min(plan.most_step_splits, gpu.sm_count // (batch * plan.lists))
    block, configs = plan.selected.size("BLOCK"), plan.defaults[gpu.target]
    limits = configs[NAME].mapping()
    if splits < limits[FEWEST_PROGRAMS] or tokens > MOST_BLOCKS * block:
        return 0
    tile = configs["decode_step"].mapping()["KEY_BLOCK"] // plan.overlap.ratio * block
    rounds = math.ceil(math.ceil(tokens / tile) / splits)
    return splits if rounds <= limits[MOST_ROUNDS] else 0


def kernels_of_call(plan: Plan, gpu: Gpu, tokens: int, batch: int) -> list[Kernel]:
    """The kernels that a forward and backward, and a decode step after `tokens` tokens, launch on a GPU by default."""
    running = [kernel for kernel in plan.kernels if plan.runs(kernel, gpu.target)]
    if programs_per_list(plan, gpu, tokens, batch):
        running = [kernel for kernel in running if kernel.name not in _THREE]
        running.append(plan.kernel("decode_step"))
    return running
