"""Kernels of attention to each token's selected blocks, and of the inverted index that the key-major kernels read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import sympy

from nsa_gen.hardware import Gpu
from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.common import (
    FP32,
    KV_BYTES,
    LSE_BYTES,
    O_BYTES,
    Q_BYTES,
    QK_V,
    TWO_ACCUMULATORS,
    dq_bytes,
    elementwise,
    height_rule,
    key_tile,
    launch,
    rows_tunables,
    same_height_rule,
    token_tile,
)
from nsa_gen.lowering.parts import Config, Decision, Kernel, Resources, Tunable
from nsa_gen.lowering.sharing import local_in_window
from nsa_gen.lowering.space import modelled_seconds
from nsa_gen.spec import Spec

# The window's kernels may process a token's local blocks. Those blocks have slots in any case.
_SELECTED_KEYS = s.SLC_OWN * s.SLC_BLOCK
_SELECTED_PAIRS = s.B * s.T * s.Hq * _SELECTED_KEYS
_SLOTS = s.B * s.T * s.LISTS * s.SLC_COUNT
_OWN_SLOTS = s.B * s.T * s.LISTS * s.SLC_OWN
_INDEX_BYTES = _SLOTS * 4

KEY_MAJOR_FORWARD, KEY_MAJOR_DQ, CHUNK_TOKENS = "KEY_MAJOR_FORWARD", "KEY_MAJOR_DQ", "CHUNK_TOKENS"
LOCAL_IN_WINDOW = s.LOCAL_IN_WINDOW.name
#: Most bytes of parts that the key-major kernels of one chunk write, by default. At run time, `workspace_of` in
#: `runtime/sizes.py` sets the bound of a call, which is lower except for long calls.
WORKSPACE_BYTES = 2**31
#: A schedule that needs more memory is chosen only if its modelled time is below this share of the other's.
_CLEARLY = 0.85
#: Most rows per program of the merges. With more rows there are fewer programs, which hide less of the latency of
#: loading parts: 32 rows take 6 to 20% longer than 16 on an H200.
_MERGED_ROWS = 16
#: Small, so that a short sequence on the interpreter still has several chunks.
_FEWEST_CHUNK_TOKENS = 64

# Bytes of shared memory for the token numbers that a pipeline prefetches.
_INDEX_BUFFERS = 1024
# Key tiles in shared memory if the products have 16 rows. The tile in use is in registers.
_BUFFERS = s.maximum(1, s.NUM_STAGES - 1)
# A block is read in tiles of KEY_BLOCK keys. Each tile yields its own part of o or dq for every slot.
_PARTS = s.SLC_BLOCK / s.KEY_BLOCK
_O_PARTS = _OWN_SLOTS * s.LIST_HEADS * s.Dv * s.E
_DQ_PARTS = _OWN_SLOTS * s.LIST_HEADS * s.Dk * s.E


def decisions(spec: Spec) -> tuple[Decision, ...]:
    """The decisions for selected attention: query-major or key-major, for o and for dq, and the tokens of a chunk.

    dk and dv are always key-major: a block sums over the tokens that selected it. If the window contains the local
    blocks, its kernels load their tiles in any case, so another decision is whether the window's kernels process them.
    """
    if spec.selection is None:
        return ()
    choices = [Tunable(KEY_MAJOR_FORWARD, (0, 1))]
    if "backward" in spec.passes:
        choices.append(Tunable(KEY_MAJOR_DQ, (0, 1)))
    if local_in_window(spec):
        choices.append(Tunable(LOCAL_IN_WINDOW, (0, 1)))
    chunk = Tunable(CHUNK_TOKENS, (_FEWEST_CHUNK_TOKENS, *(2**power for power in range(7, 18))), size=True)
    return (Decision("selected_attention", (*choices, chunk)),)


def choose_schedule(
    spec: Spec,
    kernels: Sequence[Kernel],
    sizes: Mapping[sympy.Symbol, int],
    configs: Mapping[str, Config],
    gpu: Gpu | None,
) -> Config:
    """The cost model's choice for a device, given the kernels' configurations; without a device, key-major."""
    named = {kernel.name: kernel for kernel in kernels}

    def seconds(*names: str, local: int = 0) -> float:
        if gpu is None:
            return 0.0
        call = {**sizes, s.LOCAL_IN_WINDOW: local}
        return sum(modelled_seconds(named[name], call, gpu)(configs[name].mapping()) for name in names)

    # Near a tie choose query-major, which needs no index and no workspace.
    key_major = seconds("selected_forward_key_major", "merge_outputs")
    values = {KEY_MAJOR_FORWARD: int(key_major <= _CLEARLY * seconds("selected_forward"))}
    if "backward" in spec.passes:
        # Key-major dq adds one product and its parts to the kernel of dk and dv, which runs in any case.
        one_more = seconds("selected_backward_dkdv") / 4
        values[KEY_MAJOR_DQ] = int(one_more + seconds("merge_dq") <= _CLEARLY * seconds("selected_backward_dq"))
    if local_in_window(spec):
        # Near a tie leave the local blocks to the selected branch: a part of o for them needs workspace, too.
        affected = ["window_forward", *_running(values)]
        values[LOCAL_IN_WINDOW] = int(seconds(*affected, local=1) < _CLEARLY * seconds(*affected))
    values[CHUNK_TOKENS] = _FEWEST_CHUNK_TOKENS if gpu is None else _chunk_tokens(spec, sizes, configs)
    return Config("selected_attention", tuple(values.items()))


def _running(values: Mapping[str, int]) -> list[str]:
    """The kernels of the branch that a schedule runs and whose time depends on the number of blocks."""
    forward = ["selected_forward_key_major", "merge_outputs"] if values[KEY_MAJOR_FORWARD] else ["selected_forward"]
    if KEY_MAJOR_DQ not in values:
        return forward
    dq = "merge_dq" if values[KEY_MAJOR_DQ] else "selected_backward_dq"
    return [*forward, "selected_backward_dkdv", "merge_dkdv", dq]


def _chunk_tokens(spec: Spec, sizes: Mapping[sympy.Symbol, int], configs: Mapping[str, Config]) -> int:
    """The largest power of two of tokens whose parts of o or dq fit in the workspace."""
    assert spec.selection is not None
    users = {"selected_forward_key_major": spec.head_dim.v, "selected_backward_dkdv": spec.head_dim.qk}
    widest = max(
        width * (spec.selection.block // configs[name].mapping()[s.KEY_BLOCK.name])
        for name, width in users.items()
        if name in configs
    )
    token_bytes = spec.selection.count * spec.heads.query * widest * sizes[s.E]
    tokens = max(WORKSPACE_BYTES // token_bytes, 1)
    (chunk,) = (tunable for tunable in decisions(spec)[0].tunables if tunable.name == CHUNK_TOKENS)
    return max((size for size in chunk.values if size <= tokens), default=chunk.values[0])


def forward_kernels(spec: Spec) -> list[Kernel]:
    """The kernels of o and lse of the branch, for both schedules."""
    return [*_index_kernels(), _selected_forward(spec), _selected_forward_key_major(spec), _merge_outputs()]


def backward_kernels(spec: Spec) -> list[Kernel]:
    """The kernels of the branch's gradients, in launch order."""
    return [_selected_backward_dkdv(spec), _merge_dkdv(), _merge_dq(spec), _selected_backward_dq(spec)]


def _selected_forward(spec: Spec) -> Kernel:
    return Kernel(
        name="selected_forward",
        module="selected_query_major",
        branch="slc",
        direction="forward",
        purpose="attention of each token to its selected blocks",
        schedule="query_major: one token per program; rows are its group's heads",
        choice=(KEY_MAJOR_FORWARD, 0),
        tunables=(key_tile(spec), *launch(stages=(1, 2))),
        constraints=(),
        resources=Resources(
            shared_memory=(s.SELECTED_ROWS * (s.PAD_QK + s.SCORES_STAGED * s.KEY_BLOCK) + _BUFFERS * s.KEY_BLOCK * QK_V)
            * s.E,
            registers=s.SELECTED_ROWS * (s.PAD_V + sympy.Rational(3, 2) * s.KEY_BLOCK),
            flops=2 * s.B * s.T * s.LISTS * s.SELECTED_ROWS * _SELECTED_KEYS * QK_V,
            traffic=s.B * s.T * s.LISTS * _SELECTED_KEYS * QK_V * s.E + Q_BYTES + O_BYTES,
            streamed=s.KEY_BLOCK,
            height=s.SELECTED_ROWS,
        ),
        useful_flops=2 * _SELECTED_PAIRS * (s.Dk + s.Dv),
        compulsory_bytes=Q_BYTES + KV_BYTES + O_BYTES + LSE_BYTES + _INDEX_BYTES,
    )


def _selected_forward_key_major(spec: Spec) -> Kernel:
    rows = s.TOKEN_BLOCK * s.LIST_ROWS
    buffers = s.minimum(s.NUM_STAGES, 2)
    tokens, constraints = token_tile(spec)
    return Kernel(
        name="selected_forward_key_major",
        module="selected_key_major_forward",
        branch="slc",
        direction="forward",
        purpose="parts of attention to selected blocks, one for each slot",
        schedule="key_major: a program holds a block's keys and gathers its tokens",
        choice=(KEY_MAJOR_FORWARD, 1),
        tunables=(_PIECE, tokens, key_tile(spec), *launch(stages=(1, 2, 3))),
        constraints=(*constraints, *_piece_rules(_FORWARD_ROWS), height_rule(rows)),
        resources=Resources(
            # v stays in shared memory. If the queries are pipelined, so do its finite elements and the places of the
            # others. The queries have at most two buffers beside stored probabilities, else one per stage.
            shared_memory=s.maximum(
                (
                    rows * (buffers * s.PAD_QK + (1 + s.SCORES_STAGED) * s.KEY_BLOCK)
                    + s.KEY_BLOCK * (s.PAD_QK + (1 + buffers) * s.PAD_V)
                )
                * s.E
                + _INDEX_BUFFERS,
                (rows * s.NUM_STAGES * s.PAD_QK + s.KEY_BLOCK * (s.PAD_QK + (1 + buffers) * s.PAD_V)) * s.E,
                # The output changes its layout through shared memory before its store.
                rows * (s.PAD_V * FP32 + s.KEY_BLOCK * s.E),
            ),
            registers=rows * (s.PAD_V + sympy.Rational(3, 2) * s.KEY_BLOCK),
            flops=2 * s.B * s.T * s.LISTS * s.LIST_ROWS * _SELECTED_KEYS * QK_V,
            traffic=_OWN_SLOTS * _PARTS * s.LIST_ROWS * s.PAD_QK * s.E
            + _OWN_SLOTS / s.PIECE * s.SLC_BLOCK * QK_V * s.E,
            streamed=rows,
            height=rows,
            memory=_SLOTS * s.LIST_HEADS * s.Dv * s.E * _PARTS,
            # Scores of full and of masked tiles, probabilities, the output, and its elements that are not finite.
            tensor_memory=sympy.Rational(5, 2) * s.KEY_BLOCK + 2 * s.PAD_V,
        ),
        useful_flops=2 * _SELECTED_PAIRS * (s.Dk + s.Dv),
        compulsory_bytes=Q_BYTES + KV_BYTES + O_BYTES + LSE_BYTES + _INDEX_BYTES,
    )


def _merge_outputs() -> Kernel:
    return _merge(
        "merge_outputs",
        "forward",
        "o and lse of each token from the parts of its slots",
        _O_PARTS + O_BYTES * (1 + s.LOCAL_IN_WINDOW),
        KEY_MAJOR_FORWARD,
    )


def _merge_dq(spec: Spec) -> Kernel:
    return _merge(
        "merge_dq",
        "backward",
        "dq of each token from the parts of its slots",
        _DQ_PARTS + dq_bytes(spec, "slc"),
        KEY_MAJOR_DQ,
    )


def _merge(name: str, direction: str, purpose: str, moved: sympy.Expr, choice: str) -> Kernel:
    tunables = rows_tunables(_MERGED_ROWS)
    kernel = elementwise(name, "selected_key_major_merge", "slc", direction, purpose, moved, tunables)
    return dataclasses.replace(kernel, choice=(choice, 1))


def _merge_dkdv() -> Kernel:
    launch = (Tunable("num_warps", (8,)), Tunable("num_stages", (1,)))
    pieces = _OWN_SLOTS * s.LIST_ROWS / _BACKWARD_ROWS
    kernel = elementwise(
        "merge_dkdv", "selected_key_major_merge", "slc", "backward", "sum of the parts of a long list's pieces",
        pieces * s.SLC_BLOCK * (s.Dk + s.Dv) * FP32, launch,
    )  # fmt: skip
    return dataclasses.replace(kernel, compulsory_bytes=2 * KV_BYTES)


def _selected_backward_dq(spec: Spec) -> Kernel:
    return Kernel(
        name="selected_backward_dq",
        module="selected_query_major",
        branch="slc",
        direction="backward",
        purpose="dq of attention to selected blocks",
        schedule="query_major: one token per program; rows are its group's heads",
        choice=(KEY_MAJOR_DQ, 0),
        tunables=(key_tile(spec), *launch(stages=(1, 2))),
        constraints=(),
        resources=Resources(
            shared_memory=(s.SELECTED_ROWS * (QK_V + s.SCORES_STAGED * s.KEY_BLOCK) + _BUFFERS * s.KEY_BLOCK * QK_V)
            * s.E,
            registers=s.SELECTED_ROWS * (s.PAD_QK + 3 * s.KEY_BLOCK),
            flops=2 * s.B * s.T * s.LISTS * s.SELECTED_ROWS * _SELECTED_KEYS * (2 * s.PAD_QK + s.PAD_V),
            traffic=s.B * s.T * s.LISTS * _SELECTED_KEYS * QK_V * s.E + Q_BYTES + O_BYTES + dq_bytes(spec, "slc"),
            streamed=s.KEY_BLOCK,
            height=s.SELECTED_ROWS,
        ),
        useful_flops=2 * _SELECTED_PAIRS * s.Dk,
        compulsory_bytes=Q_BYTES + KV_BYTES + O_BYTES + 2 * LSE_BYTES + _INDEX_BYTES + dq_bytes(spec, "slc"),
    )


#: Slots that one program processes. Long lists are divided among programs; short lists share one.
_PIECE = Tunable(s.PIECE.name, (16, 32, 64, 128, 256, 512, 1024, 2048))
#: Rows of a program beyond which its start and end cost little. With more rows, some multiprocessors would be idle at
#: the end, and more query rows would pass through the L2 cache at the same time. The backward has more rows, because it
#: writes dk and dv separately for each piece of a divided list.
_FORWARD_ROWS, _BACKWARD_ROWS = 1024, 2048


def _piece_rules(most_rows: int) -> tuple[sympy.Basic, ...]:
    most = s.maximum(most_rows, _PIECE.values[0] * s.LIST_ROWS)
    return sympy.Ge(s.PIECE, s.TOKEN_BLOCK), sympy.Le(s.PIECE * s.LIST_ROWS, most)


def _selected_backward_dkdv(spec: Spec) -> Kernel:
    rows = s.TOKEN_BLOCK * s.LIST_ROWS
    tokens, constraints = token_tile(spec)
    return Kernel(
        name="selected_backward_dkdv",
        module="selected_key_major_backward",
        branch="slc",
        direction="backward",
        purpose="dk and dv of selected blocks, and parts of dq",
        schedule="key_major: a program holds a block's keys and gathers its tokens",
        tunables=(_PIECE, tokens, key_tile(spec), *launch()),
        constraints=(
            *constraints,
            *_piece_rules(_BACKWARD_ROWS),
            height_rule(rows),
            same_height_rule(rows, s.KEY_BLOCK),
        ),
        resources=Resources(
            # Parts of dq change their layout through shared memory before their store; with few warps, a share of them
            # at a time.
            shared_memory=(
                s.KEY_BLOCK * (QK_V + 5 * s.SCORES_STAGED * rows)
                + s.NUM_STAGES * rows * QK_V
                + rows * s.PAD_QK * s.NUM_WARPS / 8
            )
            * s.E,
            # dq is computed after the scores. A pipeline also holds the addresses of the rows that it prefetches. What
            # does not fit is spilled in every step, and the spills pass through the L2 cache as the rows do.
            registers=s.KEY_BLOCK * (TWO_ACCUMULATORS * QK_V + 2 * rows)
            + rows * (s.PAD_QK / 4 + 80 * s.minimum(s.NUM_STAGES - 1, 1)),
            flops=2 * s.B * s.T * s.LISTS * s.LIST_ROWS * _SELECTED_KEYS * (3 * s.PAD_QK + 2 * s.PAD_V),
            traffic=_OWN_SLOTS * _PARTS * s.LIST_ROWS * QK_V * s.E
            + _OWN_SLOTS / s.PIECE * s.SLC_BLOCK * QK_V * (s.E + 2 * FP32)
            + 2 * KV_BYTES,
            streamed=rows,
            height=s.minimum(rows, s.KEY_BLOCK),
            memory=_SLOTS * s.LIST_HEADS * s.Dk * s.E * _PARTS,
        ),
        useful_flops=2 * _SELECTED_PAIRS * (2 * s.Dk + 2 * s.Dv),
        compulsory_bytes=Q_BYTES + 2 * KV_BYTES + O_BYTES + 2 * LSE_BYTES + 2 * _INDEX_BYTES,
    )


def _index_kernels() -> tuple[Kernel, Kernel]:
    """The kernels of the inverted index: the list of each slot, and the sort of few slots. torch.sort sorts many."""
    keys = (Tunable("num_warps", (1,)), Tunable("num_stages", (1,)))
    order = (Tunable("num_warps", (8,)), Tunable("num_stages", (1,)))
    return (
        elementwise(
            "index_keys", "inverted_index", "slc", "forward", "list of each slot, for the inverted index",
            2 * _INDEX_BYTES, keys,
        ),
        elementwise(
            "sort_slots", "inverted_index", "slc", "forward", "slots in the order of their lists, if they are few",
            3 * _INDEX_BYTES, order,
        ),
    )  # fmt: skip
