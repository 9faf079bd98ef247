"""Decode in one launch: which specs have this kernel, and which calls use it."""

from __future__ import annotations

from nsa_gen.lowering.branches import sunk_branches
from nsa_gen.lowering.hopper import HOPPER
from nsa_gen.lowering.parts import Config, Decision, Tunable
from nsa_gen.lowering.selection import free_slots
from nsa_gen.spec import Spec

NAME, MOST_ROUNDS = "decode_launches", "MOST_ROUNDS"
#: More tiles of compressed blocks than any program has. As the limit, it means that one launch serves every call.
ALWAYS = 2**16
#: Most tiles of compressed blocks per program with which one launch is faster than three. On an H200 it takes 0.6 of
#: the time of three with one tile, 0.75 with two, and 0.93 with four.
_ROUNDS = 4


def decode_step_fits(spec: Spec) -> bool:
    """Whether decode has a kernel with all steps: the three branches of NSA, each KV head with its own selection."""
    selection, compression = spec.selection, spec.compression
    if "decode" not in spec.passes or selection is None or compression is None or spec.window is None:
        return False
    chosen = selection.indices == "computed" and selection.scores == "compression" and free_slots(spec) > 0
    alone = not spec.combine.joint and not sunk_branches(spec)
    return chosen and alone and selection.pool == "sum" and compression.output and spec.scopes == spec.heads.kv


def decisions(spec: Spec) -> tuple[Decision, ...]:
    """The decision up to how many tiles of compressed blocks per program decode uses this kernel; 0 means never."""
    if not decode_step_fits(spec):
        return ()
    return (
        Decision(NAME, (Tunable(MOST_ROUNDS, (0, 1, 2, 4, 8, ALWAYS), size=True, least=0),), (HOPPER,), ("decode",)),
    )


def choose(spec: Spec, target: str) -> dict[str, Config]:
    """The default of that decision on an architecture or on the interpreter, by the decision's name."""
    rounds = _ROUNDS if target == HOPPER else 0
    return {each.name: Config(each.name, ((MOST_ROUNDS, rounds),)) for each in decisions(spec)}
