"""Branches of a spec: which read raw keys and values, by what names, and in which order gradients are computed."""

from __future__ import annotations

from nsa_gen.spec import Spec

BACKWARD_ORDER = ("cmp", "win", "slc")
"""First what writes dk and dv of every key, then what adds to them."""


def backward_order(spec: Spec) -> tuple[str, ...]:
    """Branches in the order of their backward."""
    return tuple(branch for branch in BACKWARD_ORDER if branch in spec.branches)


def raw_readers(spec: Spec) -> tuple[str, ...]:
    """Branches that read raw keys and values: all but a compression branch that is given its compressed ones."""
    return tuple(branch for branch in spec.branches if not (branch == "cmp" and spec.external))


def kv_names(spec: Spec, branch: str) -> tuple[str, str]:
    """Names of the arguments that hold a branch's raw keys and values; without output, those of compressed keys."""
    if branch == "cmp" and "cmp" not in spec.branches:
        branch = "slc"  # they score the selection's keys
    if spec.kv == "shared" or branch == raw_readers(spec)[0]:
        return "k", "v"
    return f"k_{branch}", f"v_{branch}"


def sunk_branches(spec: Spec) -> tuple[str, ...]:
    """Branches whose softmax has a sink."""
    members = {"slc": spec.selection, "win": spec.window}
    return tuple(name for name, member in members.items() if member is not None and member.sink == "learned")


def sink_name(branch: str) -> str:
    """Name of the argument that is the sink of a branch's softmax."""
    return f"sink_{branch}"


def selected_lists(spec: Spec) -> int:
    """Lists of selected blocks that attention reads for a token: one for each KV head, or each query head.

    A list that every head shares is read by each KV head's program.
    """
    return max(spec.scopes, spec.heads.kv)
