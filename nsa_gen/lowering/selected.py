"""Kernels of attention to each token's selected blocks, and of the inverted index that its key-major ones walk."""

from __future__ import annotations

import sympy

from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.common import (
    KV_BYTES,
    LSE_BYTES,
    O_BYTES,
    Q_BYTES,
    QK_V,
    TWO_ACCUMULATORS,
    elementwise,
    height_rule,
    key_tile,
    launch,
    token_tile,
)
from nsa_gen.lowering.program import Kernel, Resources, Tunable
from nsa_gen.spec import Spec

_SELECTED_KEYS = s.SLC_COUNT * s.SLC_BLOCK
_SELECTED_PAIRS = s.B * s.T * s.Hq * _SELECTED_KEYS
_INDEX_BYTES = s.B * s.T * s.Hkv * s.SLC_COUNT * 4


def forward_kernels(spec: Spec) -> list[Kernel]:
    """o and lse of the branch."""
    return [_selected_forward(spec)]


def backward_kernels(spec: Spec) -> list[Kernel]:
    """Gradients of the branch, in the order in which they run."""
    return [_index_keys(), _selected_backward_dq(spec), _selected_backward_dkdv(spec)]


def _selected_forward(spec: Spec) -> Kernel:
    return Kernel(
        name="selected_forward",
        module="selected_attention",
        branch="slc",
        direction="forward",
        purpose="attention of each token to its selected blocks",
        schedule="query_major: one token a program, its group's heads are the rows",
        tunables=(key_tile(spec), *launch(stages=(1, 2))),
        constraints=(),
        resources=Resources(
            shared_memory=(
                s.SELECTED_ROWS * (s.PAD_QK + s.SCORES_STAGED * s.KEY_BLOCK) + s.NUM_STAGES * s.KEY_BLOCK * QK_V
            )
            * s.E,
            registers=s.SELECTED_ROWS * (s.PAD_V + sympy.Rational(3, 2) * s.KEY_BLOCK),
            flops=2 * s.B * s.T * s.Hkv * s.SELECTED_ROWS * _SELECTED_KEYS * QK_V,
            traffic=s.B * s.T * s.Hkv * _SELECTED_KEYS * QK_V * s.E + Q_BYTES + O_BYTES,
            streamed=s.KEY_BLOCK,
            height=s.SELECTED_ROWS,
        ),
        useful_flops=2 * _SELECTED_PAIRS * (s.Dk + s.Dv),
        compulsory_bytes=Q_BYTES + KV_BYTES + O_BYTES + LSE_BYTES + _INDEX_BYTES,
    )


def _selected_backward_dq(spec: Spec) -> Kernel:
    return Kernel(
        name="selected_backward_dq",
        module="selected_attention",
        branch="slc",
        direction="backward",
        purpose="dq of attention to selected blocks",
        schedule="query_major: one token a program, its group's heads are the rows",
        tunables=(key_tile(spec), *launch(stages=(1, 2))),
        constraints=(),
        resources=Resources(
            shared_memory=(s.SELECTED_ROWS * (QK_V + s.SCORES_STAGED * s.KEY_BLOCK) + s.NUM_STAGES * s.KEY_BLOCK * QK_V)
            * s.E,
            registers=s.SELECTED_ROWS * (s.PAD_QK + 3 * s.KEY_BLOCK),
            flops=2 * s.B * s.T * s.Hkv * s.SELECTED_ROWS * _SELECTED_KEYS * (2 * s.PAD_QK + s.PAD_V),
            traffic=s.B * s.T * s.Hkv * _SELECTED_KEYS * QK_V * s.E + 2 * Q_BYTES + O_BYTES,
            streamed=s.KEY_BLOCK,
            height=s.SELECTED_ROWS,
        ),
        useful_flops=2 * _SELECTED_PAIRS * s.Dk,
        compulsory_bytes=2 * Q_BYTES + KV_BYTES + O_BYTES + 2 * LSE_BYTES + _INDEX_BYTES,
    )


def _selected_backward_dkdv(spec: Spec) -> Kernel:
    rows = s.TOKEN_BLOCK * s.GROUP_ROWS
    tokens, constraints = token_tile(spec)
    return Kernel(
        name="selected_backward_dkdv",
        module="selected_attention",
        branch="slc",
        direction="backward",
        purpose="dk and dv of selected blocks",
        schedule="key_major: a block gathers the tokens of its inverted list",
        tunables=(tokens, key_tile(spec), *launch(warps=(2, 4, 8))),
        constraints=(*constraints, height_rule(s.KEY_BLOCK)),
        resources=Resources(
            shared_memory=(s.KEY_BLOCK * (QK_V + 2 * s.SCORES_STAGED * rows) + s.NUM_STAGES * rows * QK_V) * s.E,
            registers=s.KEY_BLOCK * (TWO_ACCUMULATORS * QK_V + 3 * rows),
            flops=2 * s.B * s.T * s.Hkv * s.GROUP_ROWS * _SELECTED_KEYS * 2 * QK_V,
            traffic=s.B * s.T * s.Hkv * s.GROUP_ROWS * _SELECTED_KEYS / s.KEY_BLOCK * QK_V * s.E + 2 * KV_BYTES,
            streamed=rows,
            height=s.KEY_BLOCK,
        ),
        useful_flops=2 * _SELECTED_PAIRS * (2 * s.Dk + 2 * s.Dv),
        compulsory_bytes=Q_BYTES + 2 * KV_BYTES + O_BYTES + 2 * LSE_BYTES + 2 * _INDEX_BYTES,
    )


def _index_keys() -> Kernel:
    launch = (Tunable("num_warps", (1,)), Tunable("num_stages", (1,)))
    return elementwise(
        "index_keys", "selected_attention", "slc", "backward", "list of each slot, for the inverted index",
        2 * _INDEX_BYTES, launch,
    )  # fmt: skip
