"""Kernels of the banded branches, in which each query sees one range of keys: compressed blocks and the window."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.common import (
    FP32,
    LSE_BYTES,
    O_BYTES,
    Q_BYTES,
    QK_V,
    SCORES,
    TWO_ACCUMULATORS,
    dq_bytes,
    height_rule,
    launch,
    same_height_rule,
    tile,
)
from nsa_gen.lowering.hopper import HOPPER, NEVER, banded_tokens, hopper_fits, token_limit
from nsa_gen.lowering.parts import Config, Decision, Kernel, Resources, Tunable
from nsa_gen.spec import Spec

HOPPER_TOKENS = "HOPPER_TOKENS"


def decisions(spec: Spec) -> tuple[Decision, ...]:
    """The decision how many query tokens a call needs to use Hopper's kernel; empty if the package lacks it."""
    if not hopper_fits(spec):
        return ()
    return (Decision("banded_attention", (token_limit(HOPPER_TOKENS, 11),), (HOPPER,)),)


def choose_schedule(spec: Spec, target: str) -> Config:
    """The default for that number of tokens, on an architecture or on the interpreter."""
    return Config("banded_attention", ((HOPPER_TOKENS, banded_tokens(spec) if target == HOPPER else NEVER),))


@dataclass(frozen=True)
class Band:
    """A branch in which each query sees one range of keys.

    `pairs` counts the (query, key) pairs that it must compute, `computed_pairs` those that its kernels do compute.
    Without `output` it is not a branch of its own: it has no values, and its lse is used only to choose blocks.
    """

    op: str
    branch: str
    keys: str
    pairs: sympy.Expr
    computed_pairs: sympy.Expr
    key_rows: sympy.Expr
    output: bool = True


def bands(spec: Spec) -> list[Band]:
    """The banded branches of a spec, in the order in which they run."""
    found = []
    if spec.compression:
        rows = s.B * s.T / s.CMP_STRIDE
        pairs = s.B * s.Hq * s.T**2 / (2 * s.CMP_STRIDE)
        # A query tile computes whole key tiles, up to the highest step of the staircase.
        edge = s.B * s.Hq * s.T * (s.QUERY_BLOCK / s.CMP_STRIDE + s.KEY_BLOCK) / 2
        output = spec.compression.output
        found.append(Band("compressed", "cmp", "compressed blocks", pairs, pairs + edge, rows, output))
    if spec.window:
        pairs = s.B * s.Hq * s.T * s.WINDOW
        computed = s.B * s.Hq * s.T * (s.WINDOW + s.QUERY_BLOCK + s.KEY_BLOCK)
        found.append(Band("window", "win", "raw keys", pairs, computed, s.B * s.T))
    return found


def forward_kernel(spec: Spec, band: Band) -> Kernel:
    """o and lse of a branch."""
    if not band.output:
        return _lse_kernel(spec, band)
    kv_bytes = band.key_rows * s.Hkv * (s.Dk + s.Dv) * s.E
    # The window's kernel may also write a part of o for the selected branch's local blocks.
    written = O_BYTES * (1 + s.LOCAL_IN_WINDOW) if band.branch == "win" else O_BYTES
    return Kernel(
        name=f"{band.op}_forward",
        module="banded",
        function="banded_forward",
        branch=band.branch,
        direction="forward",
        purpose=f"attention of query tiles to {band.keys}",
        schedule="a program holds a query tile and loops over key tiles",
        tunables=(tile(spec, s.QUERY_BLOCK), tile(spec, s.KEY_BLOCK), *launch()),
        constraints=(height_rule(s.QUERY_BLOCK),),
        resources=Resources(
            # The visibility mask of an edge tile is also an operand of a product: it carries a NaN to the queries that
            # see it.
            shared_memory=(
                s.QUERY_BLOCK * s.PAD_QK + s.NUM_STAGES * s.KEY_BLOCK * QK_V + s.QUERY_BLOCK * s.KEY_BLOCK + SCORES
            )
            * s.E,
            registers=s.QUERY_BLOCK * (s.PAD_V + sympy.Rational(3, 2) * s.KEY_BLOCK),
            flops=2 * band.computed_pairs * QK_V,
            traffic=band.computed_pairs / s.QUERY_BLOCK * QK_V * s.E + Q_BYTES + written,
            streamed=s.KEY_BLOCK,
            height=s.QUERY_BLOCK,
        ),
        useful_flops=2 * band.pairs * (s.Dk + s.Dv),
        compulsory_bytes=Q_BYTES + kv_bytes + written + LSE_BYTES,
    )


def _lse_kernel(spec: Spec, band: Band) -> Kernel:
    """The lse of a branch without values."""
    return Kernel(
        name=f"{band.op}_lse",
        module="banded",
        function="banded_forward",
        branch=band.branch,
        direction="forward",
        purpose=f"lse of the scores of {band.keys}",
        schedule="a program holds a query tile and loops over key tiles",
        tunables=(tile(spec, s.QUERY_BLOCK), tile(spec, s.KEY_BLOCK), *launch()),
        constraints=(height_rule(s.QUERY_BLOCK),),
        resources=Resources(
            shared_memory=(s.QUERY_BLOCK + s.NUM_STAGES * s.KEY_BLOCK) * s.PAD_QK * s.E,
            registers=s.QUERY_BLOCK * sympy.Rational(3, 2) * s.KEY_BLOCK,
            flops=2 * band.computed_pairs * s.PAD_QK,
            traffic=band.computed_pairs / s.QUERY_BLOCK * s.PAD_QK * s.E + Q_BYTES,
            streamed=s.KEY_BLOCK,
            height=s.QUERY_BLOCK,
        ),
        useful_flops=2 * band.pairs * s.Dk,
        compulsory_bytes=Q_BYTES + band.key_rows * s.Hkv * s.Dk * s.E + LSE_BYTES,
    )


def backward_kernels(spec: Spec, band: Band) -> list[Kernel]:
    """The kernels of a branch's gradients, in launch order; none for a branch without output."""
    if not band.output:
        return []
    return [_dq_kernel(spec, band), _dkdv_kernel(spec, band)]


def _dq_kernel(spec: Spec, band: Band) -> Kernel:
    kv_bytes = band.key_rows * s.Hkv * (s.Dk + s.Dv) * s.E
    return Kernel(
        name=f"{band.op}_backward_dq",
        module="banded_backward",
        function="banded_backward_dq",
        branch=band.branch,
        direction="backward",
        purpose=f"dq of attention to {band.keys}",
        schedule="a program holds a query tile and loops over key tiles",
        tunables=(tile(spec, s.QUERY_BLOCK), tile(spec, s.KEY_BLOCK), *launch()),
        constraints=(height_rule(s.QUERY_BLOCK),),
        resources=Resources(
            # Without a pipeline, k is stored twice: once for each of the two products that read it.
            shared_memory=(
                s.QUERY_BLOCK * QK_V
                + s.KEY_BLOCK * (s.maximum(s.NUM_STAGES, 2) * s.PAD_QK + s.NUM_STAGES * s.PAD_V)
                + SCORES
            )
            * s.E,
            registers=s.QUERY_BLOCK * (s.PAD_QK + 3 * s.KEY_BLOCK),
            flops=2 * band.computed_pairs * (2 * s.PAD_QK + s.PAD_V),
            traffic=band.computed_pairs / s.QUERY_BLOCK * QK_V * s.E + Q_BYTES + O_BYTES + dq_bytes(spec, band.branch),
            streamed=s.KEY_BLOCK,
            height=s.QUERY_BLOCK,
        ),
        useful_flops=2 * band.pairs * s.Dk,
        compulsory_bytes=Q_BYTES + kv_bytes + O_BYTES + 2 * LSE_BYTES + dq_bytes(spec, band.branch),
    )


def _dkdv_kernel(spec: Spec, band: Band) -> Kernel:
    kv_bytes = band.key_rows * s.Hkv * (s.Dk + s.Dv) * s.E
    tunables = [tile(spec, s.QUERY_BLOCK), tile(spec, s.KEY_BLOCK)]
    traffic = band.computed_pairs / s.KEY_BLOCK * QK_V * s.E + 2 * kv_bytes
    programs = sympy.oo
    if band.branch == "cmp":
        # There are few key tiles, and their work is very unequal. So several programs split the group's heads, and the
        # partial sums are added up.
        group = spec.heads.group
        tunables.append(Tunable(s.HEAD_SPLITS.name, tuple(split for split in (1, 2, 4, 8, 16, 32) if split <= group)))
        traffic += (s.HEAD_SPLITS - 1) * band.key_rows * s.Hkv * (s.Dk + s.Dv) * FP32 * 3
        programs = band.key_rows / s.KEY_BLOCK * s.Hkv * s.HEAD_SPLITS
    return Kernel(
        name=f"{band.op}_backward_dkdv",
        module="banded_backward",
        function="banded_backward_dkdv",
        branch=band.branch,
        direction="backward",
        purpose=f"dk and dv of {band.keys}",
        schedule="a program holds a key tile and loops over query tiles of the group's heads",
        tunables=(*tunables, *launch()),
        constraints=(height_rule(s.QUERY_BLOCK), same_height_rule(s.QUERY_BLOCK, s.KEY_BLOCK)),
        resources=Resources(
            # Probabilities and gradients of scores are transposed through shared memory.
            shared_memory=(s.KEY_BLOCK * (QK_V + s.QUERY_BLOCK) + s.NUM_STAGES * s.QUERY_BLOCK * QK_V + 6 * SCORES)
            * s.E,
            registers=s.KEY_BLOCK * (TWO_ACCUMULATORS * QK_V + 2 * s.QUERY_BLOCK),
            flops=2 * band.computed_pairs * 2 * QK_V,
            traffic=traffic,
            streamed=s.QUERY_BLOCK,
            height=s.minimum(s.QUERY_BLOCK, s.KEY_BLOCK),
            programs=programs,
        ),
        useful_flops=2 * band.pairs * (2 * s.Dk + 2 * s.Dv),
        compulsory_bytes=Q_BYTES + 2 * kv_bytes + O_BYTES + 2 * LSE_BYTES,
    )
