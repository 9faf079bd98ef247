"""The compression kernels a spec needs: parameters of phi, saved tensors, tunables and costs."""

from __future__ import annotations

import sympy

from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.common import FP32, KEY_BYTES, KV_BYTES
from nsa_gen.lowering.parts import Argument, Kernel, Output, Resources, Tunable
from nsa_gen.lowering.phi import compressed_sides
from nsa_gen.spec import Spec


def compression_parameters(spec: Spec) -> tuple[Argument, ...]:
    """The learned parameters of phi, in the order of the fields of CompressionParameters."""
    if spec.compression is None:
        return ()
    parameters = []
    block, hidden = str(spec.compression.block), str(spec.compression.phi.hidden)
    for side in compressed_sides(spec):
        dim, flattened = str(side.dim), str(spec.compression.block * side.dim)
        if side.kind == "weighted":
            parameters.append(_parameter(f"{side.name}_weight", "Hkv", block))
        elif side.kind == "linear":
            parameters.append(_parameter(f"{side.name}_weight", "Hkv", flattened, dim))
        elif side.kind == "mlp":
            parameters.append(_parameter(f"{side.name}_weight_in", "Hkv", flattened, hidden))
            parameters.append(_parameter(f"{side.name}_weight_out", "Hkv", hidden, dim))
        if side.position:
            parameters.append(_parameter(f"{side.name}_position", "Hkv", block, dim))
    return tuple(parameters)


def _parameter(name: str, *dims: str) -> Argument:
    return Argument(name, dims, group="compression")


def compression_outputs(spec: Spec) -> tuple[Output, ...]:
    """Outputs that compression adds to the forward operator: compressed keys and values, and an mlp's hidden rows."""
    sides = compressed_sides(spec)
    outputs = [Output(f"{side.raw}_cmp", ("B", "Nc", "Hkv", f"D{side.raw}")) for side in sides]
    for side in sides:
        if side.kind == "mlp":
            assert spec.compression is not None and spec.compression.phi.hidden is not None
            dims = ("B", "Nc", "Hkv", str(spec.compression.phi.hidden))
            outputs.append(Output(f"{side.name}_hidden", dims, auxiliary=False, saved_by_phi=True))
    return tuple(outputs)


#: Bytes of keys and values, and of the rows that phi computes from them.
_POOLED_BYTES = KV_BYTES * (1 + 1 / s.CMP_STRIDE)
#: The same for keys only, if compressed keys have no output.
_POOLED_KEY_BYTES = KEY_BYTES * (1 + 1 / s.CMP_STRIDE)


def compression_kernels(spec: Spec) -> tuple[Kernel, ...]:
    """The kernels of phi, forward and backward. Keys and values use the same ones; means share a launch."""
    sides = compressed_sides(spec)
    backward = "backward" in spec.passes and "cmp" in spec.branches
    kernels: list[Kernel] = []
    if any(side.pooled for side in sides):
        moved = _POOLED_BYTES if "cmp" in spec.branches else _POOLED_KEY_BYTES
        kernels.append(_pool("pool_forward", "forward", "weighted sum of each block's tokens", s.BLOCK_TILE, moved))
        if backward:
            moved = _gradient_bytes(spec) + KV_BYTES / s.E * FP32 / s.CMP_STRIDE
            kernels.append(_pool("pool_backward_input", "backward", "gradient of a pooled input", s.TOKEN_BLOCK, moved))
            if any(side.kind == "weighted" for side in sides):
                kernels.append(_pool("pool_backward_weight", "backward", "gradient of the weights", s.BLOCK_TILE))
    if any(side.multiplied for side in sides):
        kernels.append(_linear("linear_forward", "forward", "blocks times a matrix", spec))
        if backward:
            kernels.append(_linear("linear_backward_input", "backward", "gradient of a linear layer's input", spec))
            kernels.append(_linear("linear_backward_weight", "backward", "gradient of a linear layer's weight", spec))
    return tuple(kernels)


def _gradient_bytes(spec: Spec) -> sympy.Expr:
    """Bytes moved for dk and dv: the kernel reads the other branches' float32 sums and writes the gradients."""
    others = spec.kv == "shared" and len(spec.branches) > 1
    return KV_BYTES / s.E * ((FP32 if others else 0) + s.E)


def _pool(name: str, direction: str, purpose: str, tile: sympy.Symbol, moved: sympy.Expr = _POOLED_BYTES) -> Kernel:
    """A pooling kernel, bound by the bytes it moves: by default keys, values and their compressed rows."""
    columns = s.maximum(s.PAD_QK, s.PAD_V)
    zero = sympy.Integer(0)
    # The forward reads a token once for each block that holds it, whatever the tile. Of equal candidates the first is
    # chosen, the smallest tile: it has the most programs, whose loads short calls need to fill a device.
    traffic = moved if name == "pool_forward" else moved * (1 + 1 / tile)
    return Kernel(
        name=name,
        module="compression_pool",
        branch="cmp",
        direction=direction,
        purpose=purpose,
        schedule="one pass over the tokens",
        tunables=(Tunable(tile.name, (4, 8, 16, 32, 64)), Tunable("num_warps", (4,)), Tunable("num_stages", (2,))),
        constraints=(),
        # Beyond 32 values per thread, more tiles in flight gain nothing. A traffic by tiles makes larger tiles win.
        resources=Resources(zero, 4 * tile * columns, zero, traffic, sympy.Integer(1), sympy.Integer(64)),
        useful_flops=zero,
        compulsory_bytes=moved,
    )


#: Tunables of the linear kernels: tiles of the product's three dimensions, and how many programs split a sum.
_STEP_TILE, _OUTPUT_BLOCK, _FEATURE_BLOCK, _SHARES = sympy.symbols(
    "STEP_TILE OUTPUT_BLOCK FEATURE_BLOCK SHARES", positive=True, integer=True
)


def _linear(name: str, direction: str, purpose: str, spec: Spec) -> Kernel:
    """A product over flattened blocks, keys and values counted together. The second layer of an mlp is negligible."""
    assert spec.compression is not None
    wide = 32 if spec.dtype == "float32" else 128
    widths = tuple(size for size in (16, 32, 64, 128) if size <= wide)
    rows = s.B * s.T / s.CMP_STRIDE
    outputs = s.HIDDEN * 2 if spec.compression.phi.hidden else s.Dk + s.Dv
    features = s.CMP_BLOCK * (s.Dk + s.Dv) / 2
    flops = 2 * rows * s.Hkv * features * outputs
    tokens = _gradient_bytes(spec) if name == "linear_backward_input" else KV_BYTES
    moved = tokens + s.Hkv * features * outputs * s.E
    if name == "linear_backward_input":
        rows_tile, out, inner, shares = _STEP_TILE, _FEATURE_BLOCK, _OUTPUT_BLOCK, ()
    elif name == "linear_forward":
        rows_tile, out, inner, shares = s.BLOCK_TILE, _OUTPUT_BLOCK, _FEATURE_BLOCK, ()
    else:
        rows_tile, out, inner = _FEATURE_BLOCK, _OUTPUT_BLOCK, s.BLOCK_TILE
        shares = (Tunable(_SHARES.name, (1, 2, 4)),)
    return Kernel(
        name=name,
        module="compression_linear",
        branch="cmp",
        direction=direction,
        purpose=purpose,
        schedule="implicit matrix product over the blocks",
        tunables=(
            Tunable(rows_tile.name, widths),
            Tunable(out.name, widths),
            Tunable(inner.name, tuple(size for size in widths if size <= 64)),
            *shares,
            Tunable("num_warps", (4, 8)),
            Tunable("num_stages", (1, 2, 3)),
        ),
        constraints=(),
        resources=Resources(
            shared_memory=s.NUM_STAGES * inner * (rows_tile + out) * s.maximum(s.E, 4),
            registers=rows_tile * out + inner * (rows_tile + out) / 2,
            flops=flops,
            traffic=flops / 2 * s.E * (1 / rows_tile + 1 / out),
            streamed=inner,
            height=rows_tile,
        ),
        useful_flops=flops,
        compulsory_bytes=moved,
    )
