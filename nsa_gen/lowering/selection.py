"""The kernels that score blocks (by compressed keys, mean keys or index keys) and choose the blocks of each token."""

from __future__ import annotations

import dataclasses

import sympy

from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.common import FEWEST_ROWS, FP32, KEY_BYTES, LSE_BYTES, Q_BYTES, height_rule, launch, token_tile
from nsa_gen.lowering.heads import power_of_two
from nsa_gen.lowering.parts import Kernel, Resources, Tunable
from nsa_gen.spec import Spec

#: The most values that a thread holds of the best blocks, and of the blocks that it examines.
_LONGEST_LIST = 32
#: Most keys of a tile. Several small programs share a multiprocessor: the products of one overlap the exponentials of
#: another.
_MOST_KEYS = 64
#: Compressed keys of a selection block.
_RATIO = s.SLC_BLOCK / s.CMP_STRIDE


def _score_bytes(choices: sympy.Expr) -> sympy.Expr:
    """Bytes of a float for each token, selection and candidate. They are written once and read twice."""
    return FP32 * s.B * choices * s.T**2 / (2 * s.SLC_BLOCK)


_SCORE_BYTES = _score_bytes(s.LISTS)


def selection_kernels(spec: Spec) -> list[Kernel]:
    """The kernels that choose blocks, in launch order."""
    assert spec.selection is not None
    free = free_slots(spec)
    if not free:
        return [_select_blocks(spec, free)]
    if spec.selection.index_dim:
        scorer = [_index_scores(spec)]
    else:
        scorer = [_mean_keys(spec), _mean_scores()] if spec.selection.scores == "mean" else [_block_scores(spec)]
    return [*scorer, _select_blocks(spec, free)]


def free_slots(spec: Spec) -> int:
    """Slots that are not forced: the highest-ranked blocks fill them."""
    assert spec.selection is not None
    return spec.selection.count - spec.selection.initial - spec.selection.local


def _block_scores(spec: Spec) -> Kernel:
    rows, keys = s.TOKEN_BLOCK * s.LIST_ROWS, s.BLOCK_TILE * _RATIO
    block_tile = Tunable(s.BLOCK_TILE.name, (1, 2, 4, 8, 16, 32, 64))
    most_keys = 32 if spec.dtype == "float32" else _MOST_KEYS
    tokens, constraints = token_tile(spec)
    # One more step than the blocks need loads the keys that reach into the first blocks.
    pairs = s.B * s.LISTS * s.LIST_ROWS * s.T * (s.T / (2 * s.CMP_STRIDE) + keys)
    return Kernel(
        name="block_scores",
        module="selection",
        branch="slc",
        direction="forward",
        purpose="importance of selection blocks",
        schedule="scores recomputed from the saved lse; keys are the rows of the products",
        tunables=(tokens, block_tile, *launch(stages=(1, 2))),
        # The keys of a block stay in one tile, however many they are.
        constraints=(
            *constraints,
            sympy.Ge(keys, FEWEST_ROWS),
            sympy.Le(keys, s.maximum(most_keys, _RATIO)),
            height_rule(keys),
        ),
        resources=Resources(
            shared_memory=(rows + s.NUM_STAGES * keys) * s.PAD_QK * s.E,
            # The products, and the lse of a column, which each of the eight threads of a warp that share it holds.
            registers=rows * (keys + 8 * s.NUM_WARPS),
            flops=2 * pairs * s.PAD_QK,
            traffic=pairs / rows * s.PAD_QK * s.E + Q_BYTES + _SCORE_BYTES,
            streamed=keys,
            height=keys,
        ),
        useful_flops=2 * s.B * s.Hq * s.T**2 / (2 * s.CMP_STRIDE) * s.Dk,
        compulsory_bytes=Q_BYTES + s.B * s.T / s.CMP_STRIDE * s.Hkv * s.Dk * s.E + LSE_BYTES,
    )


#: Bytes of the means of the selection's keys, in float32.
_MEAN_BYTES = s.B * s.T / s.SLC_BLOCK * s.Hkv * s.Dk * FP32


#: Tokens of a block that are added at a time. There is one choice, so that every kernel computes bit-identical means.
_BLOCK_TOKENS = Tunable(s.TOKEN_BLOCK.name, (FEWEST_ROWS,))


def _mean_keys(spec: Spec) -> Kernel:
    moved = KEY_BYTES + _MEAN_BYTES
    return Kernel(
        name="mean_keys",
        module="mean_keys",
        branch="slc",
        direction="forward",
        purpose="mean key of each selection block",
        schedule="one program per block; one pass over its tokens",
        tunables=(_BLOCK_TOKENS, *launch(warps=(4,), stages=(1, 2, 3))),
        constraints=(),
        resources=Resources(
            shared_memory=sympy.Integer(0),
            # The sums and, in fp32, the tokens that are added to them.
            registers=2 * s.TOKEN_BLOCK * s.PAD_QK,
            flops=sympy.Integer(0),
            traffic=moved,
            streamed=s.TOKEN_BLOCK,
            height=sympy.Integer(64),
            programs=s.B * s.Hkv * s.T / s.SLC_BLOCK,
            memory=moved,
        ),
        useful_flops=sympy.Integer(0),
        compulsory_bytes=moved,
    )


def append_means(spec: Spec) -> Kernel:
    """The kernel of mean keys, from the cache, of the blocks that new tokens complete: one every SLC_BLOCK tokens."""
    moved = (KEY_BYTES + _MEAN_BYTES) / s.T
    return dataclasses.replace(
        _mean_keys(spec),
        name="append_means",
        function="append_means",
        direction="decode",
        purpose="mean keys of the blocks that new tokens complete",
        resources=dataclasses.replace(_mean_keys(spec).resources, traffic=moved, programs=s.B * s.Hkv, memory=moved),
        compulsory_bytes=moved,
    )


def _mean_scores() -> Kernel:
    # fp32 products do not run on the matrix units. Their operands live in registers: tiles are small in every dtype.
    pairs = s.B * s.LISTS * s.T * (s.T / (2 * s.SLC_BLOCK) + s.BLOCK_TILE / 2)
    tiles = (16, 32, 64)
    return Kernel(
        name="mean_scores",
        module="selection",
        branch="slc",
        direction="forward",
        purpose="scores of selection blocks: the queries times the mean keys",
        schedule="a group's queries are summed first; blocks are the rows of the products",
        tunables=(Tunable(s.TOKEN_BLOCK.name, tiles), Tunable(s.BLOCK_TILE.name, tiles), *launch(stages=(1, 2))),
        constraints=(
            sympy.Le(s.TOKEN_BLOCK * s.BLOCK_TILE, 2048),
            sympy.Ge(s.TOKEN_BLOCK * s.BLOCK_TILE, 64 * s.NUM_WARPS),
        ),
        resources=Resources(
            shared_memory=(s.TOKEN_BLOCK + s.NUM_STAGES * s.BLOCK_TILE) * s.PAD_QK * FP32,
            registers=s.TOKEN_BLOCK * (s.PAD_QK + 2 * s.BLOCK_TILE) + s.BLOCK_TILE * s.PAD_QK / 2,
            # The model uses the rate of the spec's dtype. fp32 products run at a sixteenth of the bfloat16 rate.
            flops=2 * pairs * s.PAD_QK * sympy.Integer(16) ** (2 - s.E / 2),
            traffic=pairs / s.TOKEN_BLOCK * s.PAD_QK * FP32 + Q_BYTES + _SCORE_BYTES,
            streamed=s.BLOCK_TILE,
            height=s.BLOCK_TILE,
        ),
        useful_flops=s.B * s.LISTS * s.T**2 / s.SLC_BLOCK * s.Dk,
        compulsory_bytes=Q_BYTES + _MEAN_BYTES,
    )


def _index_scores(spec: Spec) -> Kernel:
    # A tile has one token of each of its blocks, so a maximum is one instruction and no thread waits for another.
    pairs = s.B * s.SCOPES * s.T * (s.T / 2 + s.BLOCK_TILE * s.SLC_BLOCK / 2)
    queries = s.B * s.T * s.SCOPES * s.DIM_INDEX * s.E
    rows = (16, 32) if spec.dtype == "float32" else (16, 32, 64, 128)
    return Kernel(
        name="index_scores",
        module="selection",
        branch="slc",
        direction="forward",
        purpose="scores of selection blocks: the largest product of the index query with their index keys",
        schedule="queries stay; one token of every block of a tile at a time",
        tunables=(
            Tunable(s.TOKEN_BLOCK.name, rows),
            Tunable(s.BLOCK_TILE.name, (16, 32) if spec.dtype == "float32" else (16, 32, 64)),
            *launch(),
        ),
        constraints=(height_rule(s.TOKEN_BLOCK),),
        resources=Resources(
            shared_memory=(s.TOKEN_BLOCK + s.NUM_STAGES * s.BLOCK_TILE) * s.DIM_INDEX * s.E,
            registers=s.TOKEN_BLOCK * 2 * s.BLOCK_TILE + s.BLOCK_TILE * s.DIM_INDEX / 2,
            flops=2 * pairs * s.DIM_INDEX,
            traffic=pairs / s.TOKEN_BLOCK * s.DIM_INDEX * s.E + queries + _score_bytes(s.SCOPES),
            streamed=s.BLOCK_TILE,
            height=s.TOKEN_BLOCK,
        ),
        useful_flops=s.B * s.SCOPES * s.T**2 * s.DIM_INDEX,
        compulsory_bytes=queries + s.B * s.T * s.DIM_INDEX * s.E,
    )


def _select_blocks(spec: Spec, free: int) -> Kernel:
    assert spec.selection is not None
    index_bytes = s.B * s.T * s.LISTS * (s.SLC_COUNT + 1) * 4
    longest = min(power_of_two(free), _LONGEST_LIST) if free else 0
    read = 2 * _SCORE_BYTES if free else 0
    return Kernel(
        name="select_blocks",
        module="selection",
        branch="slc",
        direction="forward",
        purpose=f"the top n selection blocks by {'importance' if spec.selection.scores == 'compression' else 'score'}",
        schedule="one thread per token; sorted list in registers",
        tunables=(Tunable(s.TOKEN_BLOCK.name, (32, 64, 128)), *launch(warps=(1, 2, 4), stages=(1,))),
        # One or two tokens per thread, if a warp has 32 threads.
        constraints=(
            sympy.Ge(s.TOKEN_BLOCK, 32 * s.NUM_WARPS),
            sympy.Le(s.TOKEN_BLOCK, 64 * s.NUM_WARPS),
        ),
        resources=Resources(
            shared_memory=sympy.Integer(0),
            registers=s.TOKEN_BLOCK * (64 + 2 * longest),
            flops=sympy.Integer(0),
            # Neighbouring tokens are read together, so wider rows use the memory better.
            traffic=read * (1 + 4 / s.TOKEN_BLOCK) + index_bytes,
            streamed=sympy.Integer(1),
            height=sympy.Integer(64),
        ),
        useful_flops=sympy.Integer(0),
        compulsory_bytes=index_bytes,
    )
