"""The attention kernels that a spec needs, with their tunables, constraints and symbolic costs.

Costs are those of one call with B sequences of T tokens. In a causal branch over K keys, a token sees K / 2 of them on
average, so there are T * K / 2 pairs.

Sizes with a ``_padded`` suffix are those that the matrix units process. The floor uses the true sizes.
"""

from __future__ import annotations

import dataclasses

import sympy

from nsa_gen.lowering import banded, selected
from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.alignment import alignment_kernels
from nsa_gen.lowering.branches import sunk_branches
from nsa_gen.lowering.common import KV_BYTES, LSE_BYTES, O_BYTES, Q_BYTES, elementwise, rows_tunables
from nsa_gen.lowering.parts import Kernel, Tunable
from nsa_gen.lowering.selection import selection_kernels
from nsa_gen.spec import Spec


def attention_kernels(spec: Spec) -> tuple[Kernel, ...]:
    """The kernels of every branch and of the combination, in launch order: first the forward's, then the backward's."""
    forward: list[Kernel] = []
    backward: list[Kernel] = []
    if spec.selection and spec.selection.indices == "computed" and not spec.compression:
        forward += selection_kernels(spec)
    for band in banded.bands(spec):
        forward.append(banded.forward_kernel(spec, band))
        backward += banded.backward_kernels(spec, band)
        if band.branch == "cmp" and spec.selection and spec.selection.indices == "computed":
            forward += selection_kernels(spec)
    if spec.selection:
        forward += selected.forward_kernels(spec)
        backward += selected.backward_kernels(spec)
    combined = spec.combine.gate != "none" or len(spec.branches) > 1
    backward.insert(0, _delta(whole=not combined))
    if sunk_branches(spec):
        backward.append(_sink_gradient())
    if spec.combine.joint:
        forward.append(_merge_joint())
    if combined:
        forward.append(_combine(spec, "forward"))
        backward.insert(0, _combine(spec, "backward"))
    for kernel in alignment_kernels(spec):
        (forward if kernel.direction == "forward" else backward).append(kernel)
    forward.append(_padding("pad_outputs", "forward", O_BYTES))
    backward.append(_padding("pad_gradients", "backward", Q_BYTES + KV_BYTES))
    return tuple(forward + backward) if "backward" in spec.passes else tuple(forward)


def _combine(spec: Spec, direction: str) -> Kernel:
    branches = len(spec.branches)
    gates = s.B * s.T * s.Hq * branches * s.E
    if direction == "forward":
        purpose, moved = "gated sum of the branches", (branches + 1) * O_BYTES + gates
    else:
        purpose = "delta of each branch and gradients of the gates"
        moved = (branches + 1) * O_BYTES + 2 * gates + branches * LSE_BYTES
    return elementwise(f"combine_{direction}", "combine", "all", direction, purpose, moved, rows_tunables())


def _padding(name: str, direction: str, most_bytes: sympy.Expr) -> Kernel:
    """A kernel of packed calls, for the rows that pad the batch: few bytes in most calls, ``most_bytes`` at worst."""
    launch = (Tunable("num_warps", (8,)), Tunable("num_stages", (1,)))
    purpose = "rows after the last packed sequence"
    kernel = elementwise(name, "padding", "all", direction, purpose, most_bytes, launch)
    return dataclasses.replace(kernel, whole=False, function="pad_rows")


def _delta(*, whole: bool) -> Kernel:
    kernel = elementwise(
        "attention_delta", "combine", "all", "backward", "delta of one branch",
        2 * O_BYTES + LSE_BYTES, rows_tunables(),
    )  # fmt: skip
    return dataclasses.replace(kernel, whole=whole)


def _merge_joint() -> Kernel:
    purpose = "one softmax over the selected blocks and the window"
    moved = 3 * (O_BYTES + LSE_BYTES)
    return elementwise("merge_joint", "combine", "joint", "forward", purpose, moved, rows_tunables())


def _sink_gradient() -> Kernel:
    tiles = (Tunable(s.ROW_BLOCK.name, (16, 32, 64)), Tunable("num_warps", (4,)), Tunable("num_stages", (1,)))
    purpose = "gradient of a sink, for each tile of tokens"
    return elementwise("sink_gradient", "sink", "all", "backward", purpose, 3 * LSE_BYTES, tiles)
