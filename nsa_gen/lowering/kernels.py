"""The attention kernels a spec needs, with their tunables, constraints and symbolic costs.

Costs count one call of B sequences of T tokens. A causal branch over K keys a token sees T * K / 2 pairs on average.
Sizes with a ``_padded`` suffix are what the matrix units process; the floor uses the true ones.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import sympy

from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.program import Kernel, Resources, Tunable
from nsa_gen.spec import Spec

_FP32 = 4
#: Rows of a product: the matrix units take at least 16, and one program rarely gains beyond 128.
_FEWEST_ROWS, _MOST_ROWS = 16, 128


@dataclass(frozen=True)
class _Band:
    """A branch whose visible keys are one moving range: pairs of (query, key) it must and does compute."""

    op: str
    module: str
    branch: str
    keys: str
    pairs: sympy.Expr
    computed_pairs: sympy.Expr
    key_rows: sympy.Expr


def attention_kernels(spec: Spec) -> tuple[Kernel, ...]:
    """Kernels of every branch and of the combination, in the order in which forward and then backward launch them."""
    forward: list[Kernel] = []
    backward: list[Kernel] = []
    for band in _bands(spec):
        forward.append(_banded_forward(spec, band))
        backward += [_banded_backward_dq(spec, band), _banded_backward_dkdv(spec, band)]
        if band.branch == "cmp" and spec.selection and spec.selection.indices == "computed":
            forward.append(_select_blocks(spec))
    if spec.selection:
        forward.append(_selected_forward(spec))
        backward += [_index_keys(), _selected_backward_dq(spec), _selected_backward_dkdv(spec)]
    combined = spec.combine.gate != "none" or len(spec.branches) > 1
    backward.insert(0, _delta(whole=not combined))
    if combined:
        forward.append(_combine(spec, "forward"))
        backward.insert(0, _combine(spec, "backward"))
    return tuple(forward + backward) if "backward" in spec.passes else tuple(forward)


def _bands(spec: Spec) -> list[_Band]:
    bands = []
    if spec.compression:
        rows = s.B * s.T / s.CMP_STRIDE
        pairs = s.B * s.Hq * s.T**2 / (2 * s.CMP_STRIDE)
        # A query tile computes whole key tiles up to the staircase's highest step.
        edge = s.B * s.Hq * s.T * (s.QUERY_BLOCK / s.CMP_STRIDE + s.KEY_BLOCK) / 2
        bands.append(_Band("compressed", "compressed_attention", "cmp", "compressed blocks", pairs, pairs + edge, rows))
    if spec.window:
        pairs = s.B * s.Hq * s.T * s.WINDOW
        computed = s.B * s.Hq * s.T * (s.WINDOW + s.QUERY_BLOCK + s.KEY_BLOCK)
        bands.append(_Band("window", "window_attention", "win", "raw keys", pairs, computed, s.B * s.T))
    return bands


# Tunables. float32 products run on the ordinary units, whose operands live in registers: small tiles only.


def _tile(spec: Spec, symbol: sympy.Symbol, largest: int = 128) -> Tunable:
    most = 32 if spec.dtype == "float32" else largest
    return Tunable(symbol.name, tuple(size for size in (16, 32, 64, 128, 256) if size <= most))


def _launch(warps: tuple[int, ...] = (4, 8), stages: tuple[int, ...] = (1, 2, 3)) -> tuple[Tunable, ...]:
    return Tunable("num_warps", warps), Tunable("num_stages", stages)


def _key_tile(spec: Spec) -> Tunable:
    assert spec.selection is not None
    tile = _tile(spec, s.KEY_BLOCK)
    return Tunable(tile.name, tuple(size for size in tile.values if size <= spec.selection.block))


def _token_tile(spec: Spec, fewest_rows: int = _FEWEST_ROWS) -> tuple[Tunable, tuple[sympy.Basic, ...]]:
    rows = s.TOKEN_BLOCK * s.GROUP_ROWS
    most = 32 if spec.dtype == "float32" else _MOST_ROWS
    tile = Tunable(s.TOKEN_BLOCK.name, (1, 2, 4, 8, 16, 32, 64, 128))
    return tile, (sympy.Ge(rows, fewest_rows), sympy.Le(rows, sympy.Max(most, s.GROUP_ROWS)))


def _height_rule(height: sympy.Expr) -> sympy.Basic:
    """No more warps than rows of 16: else two warps share rows, and exchange probabilities through shared memory.

    Measured on an H100: dk and dv of compressed blocks 45 ms with 4 warps on 64 rows, 77 ms and more with 8.
    """
    return sympy.Le(16 * s.NUM_WARPS, sympy.Max(64, height))


# A pair of accumulators may spill a little: measured, that costs less than the smaller tile that would avoid it.
_TWO_ACCUMULATORS = sympy.Rational(4, 5)

# Sizes that recur.

_QK_V = s.PAD_QK + s.PAD_V
_SCORES = s.SCORES_STAGED * s.QUERY_BLOCK * s.KEY_BLOCK
_Q_BYTES = s.B * s.T * s.Hq * s.Dk * s.E
_O_BYTES = s.B * s.T * s.Hq * s.Dv * s.E
_KV_BYTES = s.B * s.T * s.Hkv * (s.Dk + s.Dv) * s.E
_LSE_BYTES = s.B * s.T * s.Hq * _FP32


def _banded_forward(spec: Spec, band: _Band) -> Kernel:
    kv_bytes = band.key_rows * s.Hkv * (s.Dk + s.Dv) * s.E
    return Kernel(
        name=f"{band.op}_forward",
        module=band.module,
        branch=band.branch,
        direction="forward",
        purpose=f"attention of query tiles to {band.keys}",
        schedule="query tiles stream key tiles",
        tunables=(_tile(spec, s.QUERY_BLOCK), _tile(spec, s.KEY_BLOCK), *_launch()),
        constraints=(_height_rule(s.QUERY_BLOCK),),
        resources=Resources(
            # An edge tile's values are stored again without what must not leak from invisible keys.
            shared_memory=(s.QUERY_BLOCK * s.PAD_QK + s.KEY_BLOCK * (s.NUM_STAGES * _QK_V + s.PAD_V) + _SCORES) * s.E,
            registers=s.QUERY_BLOCK * (s.PAD_V + sympy.Rational(3, 2) * s.KEY_BLOCK),
            flops=2 * band.computed_pairs * _QK_V,
            traffic=band.computed_pairs / s.QUERY_BLOCK * _QK_V * s.E + _Q_BYTES + _O_BYTES,
            streamed=s.KEY_BLOCK,
            height=s.QUERY_BLOCK,
        ),
        useful_flops=2 * band.pairs * (s.Dk + s.Dv),
        compulsory_bytes=_Q_BYTES + kv_bytes + _O_BYTES + _LSE_BYTES,
    )


def _banded_backward_dq(spec: Spec, band: _Band) -> Kernel:
    kv_bytes = band.key_rows * s.Hkv * (s.Dk + s.Dv) * s.E
    return Kernel(
        name=f"{band.op}_backward_dq",
        module=band.module,
        branch=band.branch,
        direction="backward",
        purpose=f"dq of attention to {band.keys}",
        schedule="query tiles stream key tiles",
        tunables=(_tile(spec, s.QUERY_BLOCK), _tile(spec, s.KEY_BLOCK), *_launch()),
        constraints=(_height_rule(s.QUERY_BLOCK),),
        resources=Resources(
            shared_memory=(s.QUERY_BLOCK * _QK_V + s.NUM_STAGES * s.KEY_BLOCK * _QK_V + _SCORES) * s.E,
            registers=s.QUERY_BLOCK * (s.PAD_QK + 3 * s.KEY_BLOCK),
            flops=2 * band.computed_pairs * (2 * s.PAD_QK + s.PAD_V),
            traffic=band.computed_pairs / s.QUERY_BLOCK * _QK_V * s.E + _Q_BYTES * 2 + _O_BYTES,
            streamed=s.KEY_BLOCK,
            height=s.QUERY_BLOCK,
        ),
        useful_flops=2 * band.pairs * s.Dk,
        compulsory_bytes=2 * _Q_BYTES + kv_bytes + _O_BYTES + 2 * _LSE_BYTES,
    )


def _banded_backward_dkdv(spec: Spec, band: _Band) -> Kernel:
    kv_bytes = band.key_rows * s.Hkv * (s.Dk + s.Dv) * s.E
    tunables = [_tile(spec, s.QUERY_BLOCK), _tile(spec, s.KEY_BLOCK)]
    traffic = band.computed_pairs / s.KEY_BLOCK * _QK_V * s.E + 2 * kv_bytes
    programs = sympy.oo
    if band.branch == "cmp":
        # Few key tiles, of very unequal work: the group's heads are shared out, and the shares added up.
        group = spec.heads.group
        tunables.append(Tunable(s.HEAD_SPLITS.name, tuple(split for split in (1, 2, 4, 8, 16, 32) if split <= group)))
        traffic += (s.HEAD_SPLITS - 1) * band.key_rows * s.Hkv * (s.Dk + s.Dv) * _FP32 * 3
        programs = band.key_rows / s.KEY_BLOCK * s.Hkv * s.HEAD_SPLITS
    return Kernel(
        name=f"{band.op}_backward_dkdv",
        module=band.module,
        branch=band.branch,
        direction="backward",
        purpose=f"dk and dv of {band.keys}",
        schedule="key tiles stream the query tiles of the group's heads",
        # Two groups of 4 warps on 128 rows: 71 ms where one on 64 rows takes 45 (H100, 64 heads on 4, 65536 tokens).
        tunables=(*tunables, *_launch(warps=(4,))),
        constraints=(_height_rule(s.KEY_BLOCK),),
        resources=Resources(
            shared_memory=(s.KEY_BLOCK * _QK_V + s.NUM_STAGES * s.QUERY_BLOCK * _QK_V + 2 * _SCORES) * s.E,
            registers=s.KEY_BLOCK * (_TWO_ACCUMULATORS * _QK_V + 3 * s.QUERY_BLOCK),
            flops=2 * band.computed_pairs * 2 * _QK_V,
            traffic=traffic,
            streamed=s.QUERY_BLOCK,
            height=s.KEY_BLOCK,
            programs=programs,
        ),
        useful_flops=2 * band.pairs * (2 * s.Dk + 2 * s.Dv),
        compulsory_bytes=_Q_BYTES + 2 * kv_bytes + _O_BYTES + 2 * _LSE_BYTES,
    )


def _select_blocks(spec: Spec) -> Kernel:
    assert spec.selection is not None
    shortest_list = max(16, 2 ** (spec.selection.count - 1).bit_length())
    list_length = sympy.Max(shortest_list, s.BLOCK_TILE)
    rows = s.TOKEN_BLOCK * s.GROUP_ROWS
    # Every selection block reads the compressed blocks that overlap it; those on a border are read twice.
    tiles = s.B * s.Hkv * s.T**2 / (2 * s.SLC_BLOCK) * s.OVERLAPS
    token_tile, constraints = _token_tile(spec)
    # A tile wider than the list would lengthen the list, and sorting costs more than what wider products save.
    block_tile = Tunable(s.BLOCK_TILE.name, tuple(size for size in (16, 32, 64) if size <= shortest_list))
    return Kernel(
        name="select_blocks",
        module="selection",
        branch="slc",
        direction="forward",
        purpose="importance of selection blocks and the top n of them",
        schedule="scores recomputed from the saved lse; running sorted list",
        tunables=(token_tile, block_tile, *_launch()),
        constraints=constraints,
        resources=Resources(
            shared_memory=(rows + s.NUM_STAGES * s.BLOCK_TILE) * s.PAD_QK * s.E + s.TOKEN_BLOCK * list_length * 8,
            registers=rows * s.BLOCK_TILE * 3 + s.TOKEN_BLOCK * list_length * 6,
            flops=2 * tiles * s.GROUP_ROWS * s.PAD_QK,
            traffic=tiles / s.TOKEN_BLOCK * s.PAD_QK * s.E + _Q_BYTES,
            streamed=s.BLOCK_TILE,
            height=rows,
        ),
        useful_flops=2 * s.B * s.Hq * s.T**2 / (2 * s.CMP_STRIDE) * s.Dk,
        compulsory_bytes=_Q_BYTES
        + s.B * s.T / s.CMP_STRIDE * s.Hkv * s.Dk * s.E
        + _LSE_BYTES
        + s.B * s.T * s.Hkv * (s.SLC_COUNT + 1) * 4,
    )


_SELECTED_KEYS = s.SLC_COUNT * s.SLC_BLOCK
_SELECTED_PAIRS = s.B * s.T * s.Hq * _SELECTED_KEYS
_INDEX_BYTES = s.B * s.T * s.Hkv * s.SLC_COUNT * 4


def _selected_forward(spec: Spec) -> Kernel:
    return Kernel(
        name="selected_forward",
        module="selected_attention",
        branch="slc",
        direction="forward",
        purpose="attention of each token to its selected blocks",
        schedule="query_major: one token a program, its group's heads are the rows",
        tunables=(_key_tile(spec), *_launch(stages=(1, 2))),
        constraints=(),
        resources=Resources(
            shared_memory=(
                s.SELECTED_ROWS * (s.PAD_QK + s.SCORES_STAGED * s.KEY_BLOCK) + s.NUM_STAGES * s.KEY_BLOCK * _QK_V
            )
            * s.E,
            registers=s.SELECTED_ROWS * (s.PAD_V + sympy.Rational(3, 2) * s.KEY_BLOCK),
            flops=2 * s.B * s.T * s.Hkv * s.SELECTED_ROWS * _SELECTED_KEYS * _QK_V,
            traffic=s.B * s.T * s.Hkv * _SELECTED_KEYS * _QK_V * s.E + _Q_BYTES + _O_BYTES,
            streamed=s.KEY_BLOCK,
            height=s.SELECTED_ROWS,
        ),
        useful_flops=2 * _SELECTED_PAIRS * (s.Dk + s.Dv),
        compulsory_bytes=_Q_BYTES + _KV_BYTES + _O_BYTES + _LSE_BYTES + _INDEX_BYTES,
    )


def _selected_backward_dq(spec: Spec) -> Kernel:
    return Kernel(
        name="selected_backward_dq",
        module="selected_attention",
        branch="slc",
        direction="backward",
        purpose="dq of attention to selected blocks",
        schedule="query_major: one token a program, its group's heads are the rows",
        tunables=(_key_tile(spec), *_launch(stages=(1, 2))),
        constraints=(),
        resources=Resources(
            shared_memory=(
                s.SELECTED_ROWS * (_QK_V + s.SCORES_STAGED * s.KEY_BLOCK) + s.NUM_STAGES * s.KEY_BLOCK * _QK_V
            )
            * s.E,
            registers=s.SELECTED_ROWS * (s.PAD_QK + 3 * s.KEY_BLOCK),
            flops=2 * s.B * s.T * s.Hkv * s.SELECTED_ROWS * _SELECTED_KEYS * (2 * s.PAD_QK + s.PAD_V),
            traffic=s.B * s.T * s.Hkv * _SELECTED_KEYS * _QK_V * s.E + 2 * _Q_BYTES + _O_BYTES,
            streamed=s.KEY_BLOCK,
            height=s.SELECTED_ROWS,
        ),
        useful_flops=2 * _SELECTED_PAIRS * s.Dk,
        compulsory_bytes=2 * _Q_BYTES + _KV_BYTES + _O_BYTES + 2 * _LSE_BYTES + _INDEX_BYTES,
    )


def _selected_backward_dkdv(spec: Spec) -> Kernel:
    rows = s.TOKEN_BLOCK * s.GROUP_ROWS
    token_tile, constraints = _token_tile(spec)
    return Kernel(
        name="selected_backward_dkdv",
        module="selected_attention",
        branch="slc",
        direction="backward",
        purpose="dk and dv of selected blocks",
        schedule="key_major: a block gathers the tokens of its inverted list",
        tunables=(token_tile, _key_tile(spec), *_launch(warps=(2, 4, 8))),
        constraints=(*constraints, _height_rule(s.KEY_BLOCK)),
        resources=Resources(
            shared_memory=(s.KEY_BLOCK * (_QK_V + 2 * s.SCORES_STAGED * rows) + s.NUM_STAGES * rows * _QK_V) * s.E,
            registers=s.KEY_BLOCK * (_TWO_ACCUMULATORS * _QK_V + 3 * rows),
            flops=2 * s.B * s.T * s.Hkv * s.GROUP_ROWS * _SELECTED_KEYS * 2 * _QK_V,
            traffic=s.B * s.T * s.Hkv * s.GROUP_ROWS * _SELECTED_KEYS / s.KEY_BLOCK * _QK_V * s.E + 2 * _KV_BYTES,
            streamed=rows,
            height=s.KEY_BLOCK,
        ),
        useful_flops=2 * _SELECTED_PAIRS * (2 * s.Dk + 2 * s.Dv),
        compulsory_bytes=_Q_BYTES + 2 * _KV_BYTES + _O_BYTES + 2 * _LSE_BYTES + 2 * _INDEX_BYTES,
    )


def _elementwise(
    name: str, module: str, branch: str, direction: str, purpose: str, moved: sympy.Expr, tunables: tuple[Tunable, ...]
) -> Kernel:
    """A kernel without products: its bytes are its floor."""
    zero = sympy.Integer(0)
    tiled = tunables[0].name == s.ROW_BLOCK.name
    registers = 4 * s.ROW_BLOCK * s.PAD_V if tiled else zero
    return Kernel(
        name=name,
        module=module,
        branch=branch,
        direction=direction,
        purpose=purpose,
        schedule="one pass",
        tunables=tunables,
        constraints=(),
        resources=Resources(
            shared_memory=zero,
            registers=registers,
            flops=zero,
            traffic=moved * (1 + 1 / s.ROW_BLOCK) if tiled else moved,
            streamed=sympy.Integer(1),
            height=sympy.Integer(64),
        ),
        useful_flops=zero,
        compulsory_bytes=moved,
    )


def _rows_tunables() -> tuple[Tunable, ...]:
    return Tunable(s.ROW_BLOCK.name, (4, 8, 16, 32)), Tunable("num_warps", (4,)), Tunable("num_stages", (1,))


def _index_keys() -> Kernel:
    launch = (Tunable("num_warps", (1,)), Tunable("num_stages", (1,)))
    return _elementwise(
        "index_keys", "selected_attention", "slc", "backward", "list of each slot, for the inverted index",
        2 * _INDEX_BYTES, launch,
    )  # fmt: skip


def _combine(spec: Spec, direction: str) -> Kernel:
    branches = len(spec.branches)
    gates = s.B * s.T * s.Hq * branches * s.E
    if direction == "forward":
        purpose, moved = "gated sum of the branches", (branches + 1) * _O_BYTES + gates
    else:
        purpose = "delta of each branch and gradients of the gates"
        moved = (branches + 1) * _O_BYTES + 2 * gates + branches * _LSE_BYTES
    return _elementwise(f"combine_{direction}", "combine", "all", direction, purpose, moved, _rows_tunables())


def _delta(*, whole: bool) -> Kernel:
    kernel = _elementwise(
        "attention_delta", "combine", "all", "backward", "delta of one branch",
        2 * _O_BYTES + _LSE_BYTES, _rows_tunables(),
    )  # fmt: skip
    return dataclasses.replace(kernel, whole=whole)
