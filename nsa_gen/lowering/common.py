"""What the descriptions of several kernels share: tunables, rules that tiles keep, and sizes that recur.

float32 products run on the ordinary units, whose operands live in registers: their tiles are small.
"""

from __future__ import annotations

import sympy

from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.branches import backward_order
from nsa_gen.lowering.parts import Kernel, Resources, Tunable
from nsa_gen.spec import Spec

FP32 = 4
#: Rows of a product: the matrix units take at least 16, and one program rarely gains beyond 128.
FEWEST_ROWS, MOST_ROWS = 16, 128


def tile(spec: Spec, symbol: sympy.Symbol, largest: int = 128) -> Tunable:
    """Rows of a tile that a constexpr argument sets."""
    most = 32 if spec.dtype == "float32" else largest
    return Tunable(symbol.name, tuple(size for size in (16, 32, 64, 128, 256) if size <= most))


def launch(warps: tuple[int, ...] = (4, 8), stages: tuple[int, ...] = (1, 2, 3)) -> tuple[Tunable, ...]:
    """Warps of a program and depth of its pipeline."""
    return Tunable("num_warps", warps), Tunable("num_stages", stages)


def key_tile(spec: Spec) -> Tunable:
    """Keys of a selected block that are handled at a time."""
    assert spec.selection is not None
    keys = tile(spec, s.KEY_BLOCK)
    return Tunable(keys.name, tuple(size for size in keys.values if size <= spec.selection.block))


def token_tile(spec: Spec, fewest_rows: int = FEWEST_ROWS) -> tuple[Tunable, tuple[sympy.Basic, ...]]:
    """Tokens whose heads of one group make the rows of a product, and the rules that keep the rows legal."""
    rows = s.TOKEN_BLOCK * s.LIST_ROWS
    most = 32 if spec.dtype == "float32" else MOST_ROWS
    tile = Tunable(s.TOKEN_BLOCK.name, (1, 2, 4, 8, 16, 32, 64, 128))
    return tile, (sympy.Ge(rows, fewest_rows), sympy.Le(rows, s.maximum(most, s.LIST_ROWS)))


def height_rule(height: sympy.Expr) -> sympy.Basic:
    """No more warps than rows of 16: else two warps share rows, and exchange probabilities through shared memory.

    Measured on an H100: dk and dv of compressed blocks 45 ms with 4 warps on 64 rows, 77 ms and more with 8.
    """
    return sympy.Le(16 * s.NUM_WARPS, s.maximum(64, height))


def same_height_rule(rows: sympy.Expr, keys: sympy.Expr) -> sympy.Basic:
    """Products of `rows` and of `keys` rows in one loop: both on Hopper's own matrix instruction (64 rows) or neither.

    Seen with Triton 3.6 on an H100, 32 queries and 64 keys: the instruction of 64 rows runs on while the loop loads the
    next tile over the one it reads, because the pipeliner takes the tile's first use, of 32 rows, for its only one.
    """
    return sympy.Or(sympy.Ge(rows, 64), sympy.Lt(keys, 64))


# A pair of accumulators may spill a little: measured, that costs less than the smaller tile that would avoid it.
TWO_ACCUMULATORS = sympy.Rational(4, 5)

# Sizes that recur.

QK_V = s.PAD_QK + s.PAD_V
SCORES = s.SCORES_STAGED * s.QUERY_BLOCK * s.KEY_BLOCK
Q_BYTES = s.B * s.T * s.Hq * s.Dk * s.E
O_BYTES = s.B * s.T * s.Hq * s.Dv * s.E
KEY_BYTES = s.B * s.T * s.Hkv * s.Dk * s.E
KV_BYTES = s.B * s.T * s.Hkv * (s.Dk + s.Dv) * s.E
LSE_BYTES = s.B * s.T * s.Hq * FP32


def dq_bytes(spec: Spec, branch: str) -> sympy.Expr:
    """Bytes that a branch moves of dq: it reads the float32 sum of those before it, and the last writes dq itself."""
    order = backward_order(spec)
    read = 0 if branch == order[0] else FP32
    written = s.E if branch == order[-1] else FP32
    return s.B * s.T * s.Hq * s.Dk * (read + written)


def rows_tunables(most: int = 32) -> tuple[Tunable, ...]:
    """Rows that a kernel without products handles at a time, at most so many."""
    rows = tuple(size for size in (4, 8, 16, 32) if size <= most)
    return Tunable(s.ROW_BLOCK.name, rows), Tunable("num_warps", (4,)), Tunable("num_stages", (1,))


def elementwise(
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
            traffic=moved / s.ROW_BLOCK if tiled else moved / 1000,
            streamed=sympy.Integer(1),
            height=sympy.Integer(64),
            memory=moved,
        ),
        useful_flops=zero,
        compulsory_bytes=moved,
    )
