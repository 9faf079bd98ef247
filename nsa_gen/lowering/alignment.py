"""The kernels of the indexer's loss, which aligns its softmax with attention to the selected tokens."""

from __future__ import annotations

import dataclasses

import sympy

from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.common import (
    FEWEST_ROWS,
    FP32,
    KEY_BYTES,
    LSE_BYTES,
    Q_BYTES,
    elementwise,
    height_rule,
    key_tile,
    launch,
    same_height_rule,
)
from nsa_gen.lowering.parts import Kernel, Resources, Tunable
from nsa_gen.spec import Spec

_CHOICES = s.B * s.T * s.SCOPES
_PAIRS = s.SLC_COUNT * s.SLC_BLOCK
_INDEX_BYTES = (_CHOICES + s.B * s.T) * s.DIM_INDEX * s.E
#: The loss, the lse of the index scores, and the sum of the teacher's weights, in float32 for each token and choice.
_ROW_BYTES = 3 * FP32 * _CHOICES


def aligns(spec: Spec) -> bool:
    """Whether the package has the indexer's loss, which only training uses."""
    return spec.index_dim > 0 and "backward" in spec.passes


def alignment_kernels(spec: Spec) -> list[Kernel]:
    """The kernels of the loss and its gradient. They run only in calls that ask for the loss."""
    return [_forward(spec), _mean(), _backward(spec)] if aligns(spec) else []


def _forward(spec: Spec) -> Kernel:
    pairs = _CHOICES * _PAIRS
    teacher = 2 * s.B * s.T * s.LISTS * s.SELECTED_ROWS * _PAIRS * s.PAD_QK
    keys = (s.B * s.T * s.LISTS * s.PAD_QK + _CHOICES * s.DIM_INDEX) * _PAIRS * s.E
    return Kernel(
        name="alignment_forward",
        module="alignment",
        branch="all",
        direction="forward",
        purpose="the indexer's loss of each token, and its gradient by index queries",
        schedule="query_major: one token and scope per program; one pass over the selected blocks",
        tunables=(key_tile(spec), *launch(stages=(1, 2))),
        constraints=(),
        resources=Resources(
            shared_memory=(s.SELECTED_ROWS + s.NUM_STAGES * s.KEY_BLOCK) * s.PAD_QK * s.E,
            registers=s.KEY_BLOCK * (s.SELECTED_ROWS + 2 * s.DIM_INDEX) + s.PAD_QK * s.KEY_BLOCK / 2,
            # Products with index keys do not run on the matrix units.
            flops=teacher + 6 * pairs * s.DIM_INDEX * sympy.Integer(16) ** (2 - s.E / 2),
            traffic=keys + Q_BYTES + _INDEX_BYTES + _ROW_BYTES,
            streamed=s.KEY_BLOCK,
            height=s.SELECTED_ROWS,
        ),
        useful_flops=2 * s.B * s.T * s.Hq * _PAIRS * s.Dk + 6 * pairs * s.DIM_INDEX,
        compulsory_bytes=Q_BYTES + KEY_BYTES + LSE_BYTES + _INDEX_BYTES + _ROW_BYTES,
        whole=False,
    )


def _mean() -> Kernel:
    tiles = (Tunable(s.ROW_BLOCK.name, (1024,)), Tunable("num_warps", (4,)), Tunable("num_stages", (1,)))
    purpose = "mean of the indexer's loss over each sequence"
    kernel = elementwise("alignment_mean", "alignment", "all", "forward", purpose, FP32 * _CHOICES, tiles)
    return dataclasses.replace(
        kernel, whole=False, resources=dataclasses.replace(kernel.resources, registers=s.ROW_BLOCK)
    )


def _backward(spec: Spec) -> Kernel:
    slots = s.B * s.T * s.LISTS * s.SLC_COUNT
    rows = slots * (s.LIST_HEADS * s.PAD_QK + s.DIM_INDEX) * s.E
    tokens = (16, 32) if spec.dtype == "float32" else (16, 32, 64)
    flops = 2 * slots * s.SLC_BLOCK * (s.LIST_HEADS * s.PAD_QK + 2 * s.DIM_INDEX)
    return Kernel(
        name="alignment_backward",
        module="alignment",
        branch="all",
        direction="backward",
        purpose="gradient of the indexer's loss by index keys",
        schedule="key_major: a program holds a block's keys and gathers its tokens, head by head",
        tunables=(
            Tunable(s.PIECE.name, (FEWEST_ROWS, 32, 64, 128, 256, 512)),
            Tunable(s.TOKEN_BLOCK.name, tokens),
            key_tile(spec),
            *launch(stages=(1, 2)),
        ),
        constraints=(
            sympy.Ge(s.PIECE, s.TOKEN_BLOCK),
            height_rule(s.TOKEN_BLOCK),
            same_height_rule(s.TOKEN_BLOCK, s.KEY_BLOCK),
        ),
        resources=Resources(
            shared_memory=(s.KEY_BLOCK + s.NUM_STAGES * s.TOKEN_BLOCK) * (s.PAD_QK + s.DIM_INDEX) * s.E,
            registers=s.KEY_BLOCK * (s.DIM_INDEX + 3 * s.TOKEN_BLOCK) + s.TOKEN_BLOCK * s.PAD_QK / 2,
            flops=flops,
            traffic=rows * s.SLC_BLOCK / s.KEY_BLOCK
            + slots / s.PIECE * s.SLC_BLOCK * (s.PAD_QK * s.E + s.DIM_INDEX * (s.E + 2 * FP32)),
            streamed=s.TOKEN_BLOCK,
            height=s.minimum(s.TOKEN_BLOCK, s.KEY_BLOCK),
            memory=s.B * s.T * s.Hkv * s.DIM_INDEX * FP32,
        ),
        useful_flops=flops,
        compulsory_bytes=Q_BYTES + KEY_BYTES + LSE_BYTES + 2 * _INDEX_BYTES + _ROW_BYTES,
        whole=False,
    )
