"""The kernels that choose each token's blocks from the compressed scores."""

from __future__ import annotations

import sympy

from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.common import LSE_BYTES, Q_BYTES, launch, token_tile
from nsa_gen.lowering.program import Kernel, Resources, Tunable
from nsa_gen.spec import Spec


def selection_kernels(spec: Spec) -> list[Kernel]:
    """The kernels that choose blocks, in the order in which they run."""
    return [_select_blocks(spec)]


def _select_blocks(spec: Spec) -> Kernel:
    assert spec.selection is not None
    shortest_list = max(16, 2 ** (spec.selection.count - 1).bit_length())
    list_length = sympy.Max(shortest_list, s.BLOCK_TILE)
    rows = s.TOKEN_BLOCK * s.GROUP_ROWS
    # Every selection block reads the compressed blocks that overlap it; those on a border are read twice.
    tiles = s.B * s.Hkv * s.T**2 / (2 * s.SLC_BLOCK) * s.OVERLAPS
    tokens, constraints = token_tile(spec)
    # A tile wider than the list would lengthen the list, and sorting costs more than what wider products save.
    block_tile = Tunable(s.BLOCK_TILE.name, tuple(size for size in (16, 32, 64) if size <= shortest_list))
    return Kernel(
        name="select_blocks",
        module="selection",
        branch="slc",
        direction="forward",
        purpose="importance of selection blocks and the top n of them",
        schedule="scores recomputed from the saved lse; running sorted list",
        tunables=(tokens, block_tile, *launch()),
        constraints=constraints,
        resources=Resources(
            shared_memory=(rows + s.NUM_STAGES * s.BLOCK_TILE) * s.PAD_QK * s.E + s.TOKEN_BLOCK * list_length * 8,
            registers=rows * s.BLOCK_TILE * 3 + s.TOKEN_BLOCK * list_length * 6,
            flops=2 * tiles * s.GROUP_ROWS * s.PAD_QK,
            traffic=tiles / s.TOKEN_BLOCK * s.PAD_QK * s.E + Q_BYTES,
            streamed=s.BLOCK_TILE,
            height=rows,
        ),
        useful_flops=2 * s.B * s.Hq * s.T**2 / (2 * s.CMP_STRIDE) * s.Dk,
        compulsory_bytes=Q_BYTES
        + s.B * s.T / s.CMP_STRIDE * s.Hkv * s.Dk * s.E
        + LSE_BYTES
        + s.B * s.T * s.Hkv * (s.SLC_COUNT + 1) * 4,
    )
