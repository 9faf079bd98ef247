"""The kernels that choose each token's blocks from the compressed scores."""

from __future__ import annotations

import sympy

from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.common import FEWEST_ROWS, FP32, LSE_BYTES, Q_BYTES, height_rule, launch, token_tile
from nsa_gen.lowering.heads import power_of_two
from nsa_gen.lowering.plan import Kernel, Resources, Tunable
from nsa_gen.spec import Spec

#: Most values that a thread keeps of the best blocks, and of the blocks it looks at.
_LONGEST_LIST = 32
#: Keys of a tile: several small programs on a multiprocessor overlap one's products with another's exponentials.
_MOST_KEYS = 64
#: Compressed keys of a selection block.
_RATIO = s.SLC_BLOCK / s.CMP_STRIDE
#: A float for each token, KV head and candidate: written once, read twice.
_SCORE_BYTES = FP32 * s.B * s.Hkv * s.T**2 / (2 * s.SLC_BLOCK)


def selection_kernels(spec: Spec) -> list[Kernel]:
    """The kernels that choose blocks, in the order in which they run."""
    free = _free_slots(spec)
    return [_block_scores(spec), _select_blocks(free)] if free else [_select_blocks(free)]


def _free_slots(spec: Spec) -> int:
    """Slots that blocks win by their importance: those that are not forced."""
    assert spec.selection is not None
    return spec.selection.count - spec.selection.initial - spec.selection.local


def _block_scores(spec: Spec) -> Kernel:
    rows, keys = s.TOKEN_BLOCK * s.GROUP_ROWS, s.BLOCK_TILE * _RATIO
    block_tile = Tunable(s.BLOCK_TILE.name, (1, 2, 4, 8, 16, 32, 64))
    most_keys = 32 if spec.dtype == "float32" else _MOST_KEYS
    tokens, constraints = token_tile(spec)
    # A step more than the blocks need brings in the keys that reach into the first ones.
    pairs = s.B * s.Hkv * s.GROUP_ROWS * s.T * (s.T / (2 * s.CMP_STRIDE) + keys)
    return Kernel(
        name="block_scores",
        module="selection",
        branch="slc",
        direction="forward",
        purpose="importance of selection blocks",
        schedule="scores recomputed from the saved lse; keys are the rows of the products",
        tunables=(tokens, block_tile, *launch(stages=(1, 2))),
        # The keys of a block stay together, however many they are.
        constraints=(
            *constraints,
            sympy.Ge(keys, FEWEST_ROWS),
            sympy.Le(keys, sympy.Max(most_keys, _RATIO)),
            height_rule(keys),
        ),
        resources=Resources(
            shared_memory=(rows + s.NUM_STAGES * keys) * s.PAD_QK * s.E,
            # The products, and the lse: the threads that share a column hold it each, eight in a warp.
            registers=rows * (keys + 8 * s.NUM_WARPS),
            flops=2 * pairs * s.PAD_QK,
            traffic=pairs / rows * s.PAD_QK * s.E + Q_BYTES + _SCORE_BYTES,
            streamed=keys,
            height=keys,
        ),
        useful_flops=2 * s.B * s.Hq * s.T**2 / (2 * s.CMP_STRIDE) * s.Dk,
        compulsory_bytes=Q_BYTES + s.B * s.T / s.CMP_STRIDE * s.Hkv * s.Dk * s.E + LSE_BYTES,
    )


def _select_blocks(free: int) -> Kernel:
    index_bytes = s.B * s.T * s.Hkv * (s.SLC_COUNT + 1) * 4
    longest = min(power_of_two(free), _LONGEST_LIST) if free else 0
    read = 2 * _SCORE_BYTES if free else 0
    return Kernel(
        name="select_blocks",
        module="selection",
        branch="slc",
        direction="forward",
        purpose="the top n selection blocks by importance",
        schedule="a thread a token; sorted list in registers",
        tunables=(Tunable(s.TOKEN_BLOCK.name, (32, 64, 128)), *launch(warps=(1, 2, 4), stages=(1,))),
        # A token or two a thread, where a warp has 32 threads.
        constraints=(
            sympy.Ge(s.TOKEN_BLOCK, 32 * s.NUM_WARPS),
            sympy.Le(s.TOKEN_BLOCK, 64 * s.NUM_WARPS),
        ),
        resources=Resources(
            shared_memory=sympy.Integer(0),
            registers=s.TOKEN_BLOCK * (64 + 2 * longest),
            flops=sympy.Integer(0),
            # Neighbouring tokens are read together: wider rows make better use of the memory.
            traffic=read * (1 + 4 / s.TOKEN_BLOCK) + index_bytes,
            streamed=sympy.Integer(1),
            height=sympy.Integer(64),
        ),
        useful_flops=sympy.Integer(0),
        compulsory_bytes=index_bytes,
    )
