"""The symbols of costs and constraints, named as in the papers of the field."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import sympy

from nsa_gen.lowering.branches import selected_lists
from nsa_gen.lowering.heads import HeadDim
from nsa_gen.spec import Spec

# Sizes of a call.
B, T = sympy.symbols("B T", positive=True, integer=True)
# Sizes of a spec. E is the number of bytes of an element.
Hq, Hkv, G, Dk, Dv, E = sympy.symbols("Hq Hkv G Dk Dv E", positive=True, integer=True)
CMP_BLOCK, CMP_STRIDE = sympy.symbols("l d", positive=True, integer=True)
SLC_BLOCK, SLC_COUNT = sympy.symbols("L n", positive=True, integer=True)
SLC_LOCAL = sympy.Symbol("n_local", nonnegative=True, integer=True)
# Of a schedule: 1 if the window's kernels process the local blocks, and the selected blocks per token that remain.
LOCAL_IN_WINDOW = sympy.Symbol("LOCAL_IN_WINDOW", nonnegative=True, integer=True)
SLC_OWN = SLC_COUNT - SLC_LOCAL * LOCAL_IN_WINDOW
# Lists of selected blocks that attention reads for a token, and query heads per list.
LISTS, LIST_HEADS = sympy.symbols("lists list_heads", positive=True, integer=True)
# Selections of blocks per token, and elements of an index query or key.
SCOPES, DIM_INDEX = sympy.symbols("S Di", positive=True, integer=True)
WINDOW = sympy.Symbol("w", positive=True, integer=True)
HIDDEN = sympy.Symbol("hidden", positive=True, integer=True)
# Of lowering: head dims, and query heads per list, padded for the matrix units.
PAD_QK, PAD_V, LIST_ROWS, SELECTED_ROWS = sympy.symbols(
    "Dk_padded Dv_padded G_padded G_rows", positive=True, integer=True
)
# Tunables.
QUERY_BLOCK, KEY_BLOCK, TOKEN_BLOCK, BLOCK_TILE, ROW_BLOCK, HEAD_SPLITS, PIECE = sympy.symbols(
    "QUERY_BLOCK KEY_BLOCK TOKEN_BLOCK BLOCK_TILE ROW_BLOCK HEAD_SPLITS PIECE", positive=True, integer=True
)
# Of a device: 1 if a product can read probabilities only from shared memory (Blackwell's tcgen05), else 0.
SCORES_STAGED = sympy.Symbol("scores_staged", nonnegative=True, integer=True)
NUM_WARPS, NUM_STAGES = sympy.symbols("num_warps num_stages", positive=True, integer=True)

# Maximum and minimum of expressions in these symbols, cached. Kernels of many specs use the same ones, and sympy's
# comparisons otherwise take half of the time of lowering.
maximum, minimum = functools.cache(sympy.Max), functools.cache(sympy.Min)

_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def spec_sizes(spec: Spec, qk: HeadDim, v: HeadDim, list_rows: int, selected_rows: int) -> Mapping[sympy.Symbol, int]:
    """Values of the symbols that a spec decides, and LOCAL_IN_WINDOW = 0. Symbols of absent branches have no value."""
    sizes = {
        Hq: spec.heads.query,
        Hkv: spec.heads.kv,
        G: spec.heads.group,
        Dk: spec.head_dim.qk,
        Dv: spec.head_dim.v,
        E: _ELEMENT_BYTES[spec.dtype],
        PAD_QK: qk.padded,
        PAD_V: v.padded,
        LIST_ROWS: list_rows,
        SELECTED_ROWS: selected_rows,
        LOCAL_IN_WINDOW: 0,
    }
    if spec.compression:
        sizes[CMP_BLOCK] = spec.compression.block
        sizes[CMP_STRIDE] = spec.compression.stride
        if spec.compression.phi.hidden:
            sizes[HIDDEN] = spec.compression.phi.hidden
    if spec.selection:
        sizes[SLC_BLOCK] = spec.selection.block
        sizes[SLC_COUNT] = spec.selection.count
        sizes[SLC_LOCAL] = spec.selection.local
        sizes[SCOPES] = spec.scopes
        if spec.selection.index_dim:
            sizes[DIM_INDEX] = spec.selection.index_dim
        sizes[LISTS] = selected_lists(spec)
        sizes[LIST_HEADS] = spec.heads.query // selected_lists(spec)
    if spec.window:
        sizes[WINDOW] = spec.window.size
    return sizes
