"""What several kernel descriptions share: tunables, constraints on tiles, and common sizes.

float32 products do not run on the matrix units. Their operands live in registers, so their tiles are small.
"""

from __future__ import annotations

import sympy

from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.branches import backward_order
from nsa_gen.lowering.parts import Kernel, Resources, Tunable
from nsa_gen.spec import Spec

FP32 = 4
#: Rows of a product: the matrix units need at least 16, and more than 128 rarely make a program faster.
FEWEST_ROWS, MOST_ROWS = 16, 128


def tile(spec: Spec, symbol: sympy.Symbol, largest: int = 128) -> Tunable:
    """The tunable for the rows of a tile, which is a constexpr argument."""
    most = 32 if spec.dtype == "float32" else largest
    return Tunable(symbol.name, tuple(size for size in (16, 32, 64, 128, 256) if size <= most))


def launch(warps: tuple[int, ...] = (4, 8), stages: tuple[int, ...] = (1, 2, 3)) -> tuple[Tunable, ...]:
    """The tunables for the warps of a program and the depth of its pipeline."""
    return Tunable("num_warps", warps), Tunable("num_stages", stages)


def key_tile(spec: Spec) -> Tunable:
    """The tunable for the keys of a selected block that are processed at a time."""
    assert spec.selection is not None
    keys = tile(spec, s.KEY_BLOCK)
    return Tunable(keys.name, tuple(size for size in keys.values if size <= spec.selection.block))


def token_tile(spec: Spec, fewest_rows: int = FEWEST_ROWS) -> tuple[Tunable, tuple[sympy.Basic, ...]]:
    """The tunable for the tokens of a tile, and its constraints. Rows are the heads of a token that follow one list."""
    rows = s.TOKEN_BLOCK * s.LIST_ROWS
    most = 32 if spec.dtype == "float32" else MOST_ROWS
    tile = Tunable(s.TOKEN_BLOCK.name, (1, 2, 4, 8, 16, 32, 64, 128))
    return tile, (sympy.Ge(rows, fewest_rows), sympy.Le(rows, s.maximum(most, s.LIST_ROWS)))


def height_rule(height: sympy.Expr) -> sympy.Basic:
    """The constraint that each warp has at least 16 rows to itself; up to 4 warps are always allowed.

    Otherwise two warps share rows and exchange probabilities through shared memory. Measured on an H100: dk and dv of
    compressed blocks take 45 ms with 4 warps on 64 rows, and 77 ms or more with 8.
    """
    return sympy.Le(16 * s.NUM_WARPS, s.maximum(64, height))


def same_height_rule(rows: sympy.Expr, keys: sympy.Expr) -> sympy.Basic:
    """The constraint on two products in one loop: if the one of `rows` rows is below 64, so is the one of `keys` rows.

    Hopper's own matrix instruction takes 64 rows and is asynchronous. Seen with Triton 3.6 on an H100, with 32 queries
    and 64 keys: that instruction is still reading a tile when the loop overwrites the tile with the next one. The
    pipeliner takes the tile's first use, in a product of 32 rows, for its only use.
    """
    return sympy.Or(sympy.Ge(rows, 64), sympy.Lt(keys, 64))


# Two accumulators may spill a little. By measurement, that costs less than a tile small enough to avoid it.
TWO_ACCUMULATORS = sympy.Rational(4, 5)

# Common sizes.

QK_V = s.PAD_QK + s.PAD_V
SCORES = s.SCORES_STAGED * s.QUERY_BLOCK * s.KEY_BLOCK
Q_BYTES = s.B * s.T * s.Hq * s.Dk * s.E
O_BYTES = s.B * s.T * s.Hq * s.Dv * s.E
KEY_BYTES = s.B * s.T * s.Hkv * s.Dk * s.E
KV_BYTES = s.B * s.T * s.Hkv * (s.Dk + s.Dv) * s.E
LSE_BYTES = s.B * s.T * s.Hq * FP32


def dq_bytes(spec: Spec, branch: str) -> sympy.Expr:
    """Bytes of dq that a branch moves.

    A branch reads the float32 sum of the branches before it, and writes a new sum. The last branch writes dq itself.
    """
    order = backward_order(spec)
    read = 0 if branch == order[0] else FP32
    written = s.E if branch == order[-1] else FP32
    return s.B * s.T * s.Hq * s.Dk * (read + written)


def rows_tunables(most: int = 32) -> tuple[Tunable, ...]:
    """The tunables of a kernel without products: rows processed at a time, at most `most`, and launch options."""
    rows = tuple(size for size in (4, 8, 16, 32) if size <= most)
    return Tunable(s.ROW_BLOCK.name, rows), Tunable("num_warps", (4,)), Tunable("num_stages", (1,))


def elementwise(
    name: str, module: str, branch: str, direction: str, purpose: str, moved: sympy.Expr, tunables: tuple[Tunable, ...]
) -> Kernel:
    """A kernel without products. Its floor is the time to move its bytes."""
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
