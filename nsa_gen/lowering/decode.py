"""The kernels of the cache and of decode, with their tunables and costs.

Costs are those of one decode step: B sequences of T cached tokens each, with one new token per sequence.
"""

from __future__ import annotations

import sympy

from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.branches import raw_readers
from nsa_gen.lowering.common import FEWEST_ROWS, FP32, QK_V, launch
from nsa_gen.lowering.decode_step import decode_step_fits
from nsa_gen.lowering.heads import power_of_two
from nsa_gen.lowering.overlap import overlap
from nsa_gen.lowering.parts import Kernel, Resources, Tunable
from nsa_gen.lowering.phi import compressed_sides
from nsa_gen.lowering.selection import append_means, free_slots
from nsa_gen.spec import Spec

_ZERO, _ONE = sympy.Integer(0), sympy.Integer(1)
_OUTPUT_BLOCK, _FEATURE_BLOCK, _SEQUENCES, _PROGRAMS = sympy.symbols(
    "OUTPUT_BLOCK FEATURE_BLOCK SEQUENCES PROGRAMS", positive=True, integer=True
)
_O_ROW = s.B * s.Hq * s.Dv * s.E
_ROW_BYTES = (s.Dk + s.Dv) * s.E
#: Bytes of shared memory of a tile of keys and values, times the depth of the pipeline.
_KV_TILE = s.KEY_BLOCK * QK_V * s.E * s.NUM_STAGES
#: Programs launched per multiprocessor. With the registers that products of 16 rows need, two fit at a time, so two are
#: one wave. Fewer hide less load latency. More leave more parts to merge, and the last wave is not full.
_PROGRAMS_CHOICES = (1, 2, 3, 4, 8)
_LIST_REGISTERS = 6500
#: Bytes of a token's key and value in one head of a quantized cache.
_CODE_BYTES = s.Dk + s.Dv
_WAVES = 1 / (2 * _PROGRAMS) + _PROGRAMS / 8


def inference_kernels(spec: Spec) -> tuple[Kernel, ...]:
    """The kernels of the cache and of decode, in the order in which a decode step launches them."""
    if "decode" not in spec.passes:
        return ()
    kernels = [_advance()]
    if not (spec.external and spec.branches == ("cmp",)):
        kernels.append(_append(spec))
    if spec.compression is not None:
        if any(side.multiplied for side in compressed_sides(spec)):
            kernels.append(_append_linear(spec))
        if spec.external:
            kernels.append(_append_compressed(spec))
        kernels.append(_decode_compressed(spec))
    if _ranks(spec, "mean"):
        kernels.append(append_means(spec))
    if spec.index_dim:
        kernels.append(_append_index())
    if spec.compression is not None or _ranks(spec):
        kernels.append(_decode_select(spec))
    if spec.selection is not None or spec.window is not None:
        kernels.append(_decode_attend(spec))
    if decode_step_fits(spec):
        kernels.append(_decode_step(spec))
    return tuple(kernels)


def _ranks(spec: Spec, scores: str = "") -> bool:
    """Whether decode ranks blocks by these scores, or by any scores if none are named."""
    selection = spec.selection
    if selection is None or selection.indices == "input" or not free_slots(spec):
        return False
    return scores in ("", selection.scores)


def _simple(
    name: str, module: str, branch: str, purpose: str, schedule: str, moved: sympy.Expr, tunables: tuple[Tunable, ...],
    registers: sympy.Expr = _ZERO,
) -> Kernel:  # fmt: skip
    """A kernel without products."""
    return Kernel(
        name=name,
        module=module,
        branch=branch,
        direction="decode",
        purpose=purpose,
        schedule=schedule,
        tunables=tunables,
        constraints=(),
        resources=Resources(_ZERO, registers, _ZERO, moved, _ONE, sympy.Integer(64)),
        useful_flops=_ZERO,
        compulsory_bytes=moved,
    )


def _raw_bytes(spec: Spec) -> sympy.Expr:
    """Bytes of one token's key and value, per KV head, in the cache."""
    return _CODE_BYTES if spec.cache else _ROW_BYTES


def _advance() -> Kernel:
    tunables = (Tunable(_SEQUENCES.name, (128,)), *launch(warps=(4,), stages=(1,)))
    return _simple("advance", "append", "all", "lengths of the sequences", "one pass", 8 * s.B, tunables)


def _append(spec: Spec) -> Kernel:
    tokens = Tunable(s.TOKEN_BLOCK.name, (16, 32))
    pairs = 1 if spec.kv == "shared" else len(raw_readers(spec))
    moved = pairs * s.B * s.Hkv * (_ROW_BYTES + _raw_bytes(spec))
    purpose = "new keys and values into the cache"
    if any(side.pooled for side in compressed_sides(spec)):
        purpose += ", and the blocks they complete"
        moved += s.B * s.Hkv * _compressed_row(spec) * s.CMP_BLOCK / s.CMP_STRIDE
    registers = s.TOKEN_BLOCK * s.maximum(s.PAD_QK, s.PAD_V)
    return _simple(
        "append", "append", "all", purpose, "one pass over the new tokens", moved,
        (tokens, *launch(warps=(4,), stages=(1,))), registers,
    )  # fmt: skip


def _append_linear(spec: Spec) -> Kernel:
    wide = (16, 32) if spec.dtype == "float32" else (16, 32, 64)
    features = s.CMP_BLOCK * (s.Dk + s.Dv) / 2
    assert spec.compression is not None
    outputs = s.HIDDEN * 2 if spec.compression.phi.hidden else s.Dk + s.Dv
    # A block is completed every CMP_STRIDE tokens.
    flops = 2 * s.B * s.Hkv * features * outputs / s.CMP_STRIDE
    moved = s.B * s.Hkv * (features * 2 + features * outputs / s.B) * s.E / s.CMP_STRIDE
    return Kernel(
        name="append_linear",
        module="append",
        branch="cmp",
        direction="decode",
        purpose="blocks that new tokens complete times a matrix",
        schedule="programs without a completed block return at once",
        tunables=(
            Tunable(s.BLOCK_TILE.name, (16,)),
            Tunable(_OUTPUT_BLOCK.name, wide),
            Tunable(_FEATURE_BLOCK.name, wide),
            *launch(warps=(4,), stages=(1, 2)),
        ),
        constraints=(),
        resources=Resources(
            shared_memory=s.NUM_STAGES * _FEATURE_BLOCK * (s.BLOCK_TILE + _OUTPUT_BLOCK) * s.E,
            registers=s.BLOCK_TILE * _OUTPUT_BLOCK + 4 * s.BLOCK_TILE * _FEATURE_BLOCK,
            flops=flops * s.BLOCK_TILE,
            # Small tiles of outputs give many programs, which divide the reading of the matrix among them.
            traffic=moved * (1 + _OUTPUT_BLOCK / 64 + 16 / _FEATURE_BLOCK),
            streamed=_FEATURE_BLOCK,
            height=s.BLOCK_TILE,
        ),
        useful_flops=flops,
        compulsory_bytes=moved,
    )


def _compressed_row(spec: Spec) -> sympy.Expr:
    """Bytes of a compressed key and, if there is an output, its value."""
    return _ROW_BYTES if "cmp" in spec.branches else s.Dk * s.E


def _append_compressed(spec: Spec) -> Kernel:
    moved = 2 * s.B * s.Hkv * _compressed_row(spec) / s.CMP_STRIDE
    return _simple(
        "append_compressed", "append", "cmp", "compressed blocks of the caller into the cache", "one pass", moved,
        (Tunable(s.BLOCK_TILE.name, (16,)), *launch(warps=(4,), stages=(1,))),
    )  # fmt: skip


def _append_index() -> Kernel:
    return _simple(
        "append_index", "append", "slc", "index keys of new tokens into the cache", "one pass",
        2 * s.B * s.DIM_INDEX * s.E, (Tunable(s.TOKEN_BLOCK.name, (16,)), *launch(warps=(4,), stages=(1,))),
    )  # fmt: skip


def _key_tiles(spec: Spec, least: int = FEWEST_ROWS) -> Tunable:
    most = 32 if spec.dtype == "float32" else 128
    return Tunable(
        s.KEY_BLOCK.name, tuple(size for size in (16, 32, 64, 128, 256) if least <= size <= max(most, least))
    )


def _decode_compressed(spec: Spec) -> Kernel:
    assert spec.compression is not None
    selection = spec.selection
    scored = selection is not None and selection.indices == "computed" and selection.scores == "compression"
    least = (
        max(FEWEST_ROWS, spec.selection.block // spec.compression.stride) if scored and spec.selection else FEWEST_ROWS
    )
    keys = s.B * s.Hkv * s.T / s.CMP_STRIDE
    importance = s.B * s.Hq * s.T / s.SLC_BLOCK * FP32 if scored else _ZERO
    row_bytes, output = _compressed_row(spec), spec.compression.output
    pad_v, dims = (s.PAD_V, s.Dk + s.Dv) if output else (_ZERO, s.Dk)
    columns = s.PAD_QK + pad_v
    purpose = "parts of attention to compressed blocks" if output else "lse of compressed blocks in parts"
    return Kernel(
        name="decode_compressed",
        module="decode_compressed",
        branch="cmp",
        direction="decode",
        purpose=purpose + (", and importance of selection blocks" if scored else ""),
        schedule="split over the compressed blocks",
        tunables=(
            _key_tiles(spec, least),
            Tunable(_PROGRAMS.name, _PROGRAMS_CHOICES),
            *launch((4, 8), (1, 2, 3)),
        ),
        constraints=(),
        resources=Resources(
            shared_memory=(s.KEY_BLOCK * s.NUM_STAGES + 16) * columns * s.E,
            registers=48 * (pad_v + 2 * s.KEY_BLOCK) + s.KEY_BLOCK * pad_v / 2,
            flops=2 * keys * s.SELECTED_ROWS * columns,
            # The kernel is bound by memory: larger tiles and a deeper pipeline keep more loads in flight.
            traffic=keys * row_bytes * (1 + 16 / s.KEY_BLOCK + _WAVES + 1 / (4 * s.NUM_STAGES)) + importance,
            streamed=s.KEY_BLOCK,
            height=sympy.Integer(64),
        ),
        useful_flops=2 * keys * s.G * dims,
        compulsory_bytes=keys * row_bytes,
    )


def _decode_step(spec: Spec) -> Kernel:
    assert spec.selection is not None and spec.compression is not None
    compressed, raw = s.T / s.CMP_STRIDE, s.SLC_COUNT * s.SLC_BLOCK + s.WINDOW
    keys = s.B * s.Hkv * (compressed + raw)
    moved = s.B * s.Hkv * (compressed * _compressed_row(spec) + raw * _raw_bytes(spec))
    ratio = spec.selection.block // spec.compression.stride
    tiles = (size for size in _key_tiles(spec, max(FEWEST_ROWS, ratio)).values if size <= spec.selection.block)
    return Kernel(
        name="decode_step",
        module="decode_step",
        branch="all",
        direction="decode",
        purpose="all steps of decode for few sequences and short contexts",
        schedule="one launch; the programs of a list wait for each other between the steps",
        # Most programs have one tile of each kind, for which a pipeline makes them slower.
        tunables=(Tunable(s.KEY_BLOCK.name, tuple(tiles)), *launch((4,), (1,))),
        constraints=(),
        resources=Resources(
            shared_memory=_KV_TILE,
            registers=s.SELECTED_ROWS * 2 * s.PAD_V + s.KEY_BLOCK * QK_V / 2 + _LIST_REGISTERS,
            flops=2 * keys * s.SELECTED_ROWS * QK_V,
            traffic=moved * (1 + 16 / s.KEY_BLOCK),
            streamed=s.KEY_BLOCK,
            height=sympy.Integer(64),
        ),
        useful_flops=2 * keys * s.G * (s.Dk + s.Dv),
        compulsory_bytes=moved,
        whole=False,
        waits=3,
    )


def _members(spec: Spec) -> int:
    """Values loaded together per block and head: 1, or one per compressed key if importance is their maximum."""
    compression, selection = spec.compression, spec.selection
    if compression is None or selection is None or selection.pool == "sum" or selection.scores != "compression":
        return 1
    return power_of_two(len(overlap(compression.block, compression.stride, selection.block).weights))


def _decode_select(spec: Spec) -> Kernel:
    scored, means, indexed = _ranks(spec), _ranks(spec, "mean"), spec.index_dim > 0
    # Products with mean keys are in fp32, so their operands live in registers.
    small = means or indexed
    tiles = (Tunable(s.BLOCK_TILE.name, (16, 32, 64) if small else (16, 32, 64, 128, 256)),) if scored else ()
    importance = s.B * s.Hq * s.T / s.SLC_BLOCK * FP32 if scored else s.B * s.Hq * FP32 * s.T / s.T
    if means:
        importance = s.B * s.Hkv * s.T / s.SLC_BLOCK * s.Dk * FP32
    if indexed:
        importance = s.B * s.SCOPES * s.T * s.DIM_INDEX * s.E
    traffic = importance * (1 + 64 / s.BLOCK_TILE) if scored else importance
    # Sixteen heads are processed at a time; each has an importance, its reference and an address.
    registers = 64 * s.BLOCK_TILE * _members(spec) if scored else _ZERO
    if means:
        registers += s.BLOCK_TILE * s.PAD_QK
    shared_memory = s.NUM_STAGES * s.BLOCK_TILE * s.DIM_INDEX * s.E if indexed else _ZERO
    merged, best = "merge of compressed attention" if "cmp" in spec.branches else "", "selection of blocks"
    return Kernel(
        name="decode_select",
        module="decode_select",
        branch="slc" if scored else "cmp",
        direction="decode",
        purpose=", and ".join(filter(None, (merged, best if scored else ""))),
        schedule="programs share tiles of blocks; the last selects among the best" if scored else "one program per row",
        waits=int(scored),
        tunables=(*tiles, *launch((4, 8), (1, 2, 3) if indexed else (1,))),
        constraints=(),
        resources=Resources(shared_memory, registers, _ZERO, traffic, _ONE, sympy.Integer(64)),
        useful_flops=_ZERO,
        compulsory_bytes=_O_ROW,
    )


def _decode_attend(spec: Spec) -> Kernel:
    keys, tile = _ZERO, _key_tiles(spec)
    if spec.selection is not None:
        keys += s.SLC_COUNT * s.SLC_BLOCK
        block = spec.selection.block
        tile = Tunable(tile.name, tuple(size for size in tile.values if size <= block))
    if spec.window is not None:
        keys += s.WINDOW
    branch = "all" if spec.selection and spec.window else "slc" if spec.selection else "win"
    keys = s.B * s.Hkv * keys
    return Kernel(
        name="decode_attend",
        module="decode_attend",
        branch=branch,
        direction="decode",
        purpose="selected and window attention, and the sum of the branches",
        schedule="split over tiles of keys; the last program merges the parts",
        waits=1,
        tunables=(tile, Tunable(_PROGRAMS.name, _PROGRAMS_CHOICES), *launch((4,), (1, 2, 3))),
        # No pipeline with 64 rows: those products still run while the next tile is loaded, and a step reads the values
        # twice.
        constraints=(sympy.Or(sympy.Lt(s.SELECTED_ROWS, 64), sympy.Le(s.NUM_STAGES, 1)),),
        resources=Resources(
            shared_memory=_KV_TILE,
            # Two accumulators, the addresses of a tile, and the registers of the list of blocks and of the merge.
            registers=s.SELECTED_ROWS * 2 * s.PAD_V + s.KEY_BLOCK * QK_V / 2 + _LIST_REGISTERS,
            flops=2 * keys * s.SELECTED_ROWS * QK_V,
            traffic=keys * _raw_bytes(spec) * (1 + 16 / s.KEY_BLOCK + _WAVES + 1 / (4 * s.NUM_STAGES)),
            streamed=s.KEY_BLOCK,
            height=sympy.Integer(64),
        ),
        useful_flops=2 * keys * s.G * (s.Dk + s.Dv),
        compulsory_bytes=keys * _raw_bytes(spec),
    )
