"""Branches of a spec: which of them read raw keys and values, under which names, and the order of the backward."""

from __future__ import annotations

from nsa_gen.spec import Spec

BACKWARD_ORDER = ("cmp", "win", "slc", "joint")
"""Branches that write dk and dv of every key come before those that add to them. `joint` is win and slc together."""


def backward_order(spec: Spec) -> tuple[str, ...]:
    """Branches in the order of their backward; joint branches are listed separately."""
    present = {"cmp": spec.compression, "win": spec.window, "slc": spec.selection}
    return tuple(branch for branch in BACKWARD_ORDER if present.get(branch) is not None)


def raw_readers(spec: Spec) -> tuple[str, ...]:
    """Branches that read raw keys and values: all except a compression branch with compressed keys from the caller."""
    return tuple(branch for branch in spec.branches if not (branch == "cmp" and spec.external))


def kv_names(spec: Spec, branch: str) -> tuple[str, str]:
    """Names of the arguments that hold a branch's raw keys and values, also for compressed keys without output."""
    if branch == "cmp" and "cmp" not in spec.branches:
        branch = "slc"  # without output, compressed keys score the selection's keys
    if spec.kv == "shared" or branch == raw_readers(spec)[0]:
        return "k", "v"
    return f"k_{branch}", f"v_{branch}"


def sunk_branches(spec: Spec) -> tuple[str, ...]:
    """Branches whose softmax has a sink."""
    if spec.combine.joint:
        return ("joint",) if spec.combine.sink == "learned" else ()
    members = {"slc": spec.selection, "win": spec.window}
    return tuple(name for name, member in members.items() if member is not None and member.sink == "learned")


def sink_name(branch: str) -> str:
    """Name of the argument that is the sink of a branch's softmax."""
    return "sink" if branch == "joint" else f"sink_{branch}"


def selected_lists(spec: Spec) -> int:
    """Lists of selected blocks that attention reads for a token: one for each KV head, or each query head.

    A list that every head shares is read by each KV head's program.
    """
    return max(spec.scopes, spec.heads.kv)
