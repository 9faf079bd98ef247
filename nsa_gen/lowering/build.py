"""Spec -> Plan: every decision about what is generated is taken here."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from nsa_gen.hardware import SHARED_TABLES, TABLES, gpu_for_target
from nsa_gen.lowering import banded, decode_step, hopper, hopper_backward, selected, sharing, space
from nsa_gen.lowering.branches import raw_readers, selected_lists, sink_name, sunk_branches
from nsa_gen.lowering.common import FEWEST_ROWS
from nsa_gen.lowering.compression import compression_kernels, compression_outputs, compression_parameters
from nsa_gen.lowering.decode import inference_kernels
from nsa_gen.lowering.heads import power_of_two, split_head_dim
from nsa_gen.lowering.kernels import attention_kernels
from nsa_gen.lowering.overlap import Overlap, overlap
from nsa_gen.lowering.parts import INTERPRETER, Argument, Config, Kernel, Output
from nsa_gen.lowering.phi import compressed_sides
from nsa_gen.lowering.plan import Plan
from nsa_gen.lowering.steps import build_steps, upkeep
from nsa_gen.lowering.symbols import spec_sizes
from nsa_gen.spec import Spec


@functools.lru_cache(maxsize=64)
def lower(spec: Spec) -> Plan:
    """Decide the kernels, their sizes, tunables and default configurations for a spec.

    The result depends only on the spec: equal specs give equal Plans. A Plan must not be changed.
    """
    qk = split_head_dim(spec.head_dim.qk)
    v = split_head_dim(spec.head_dim.v)
    group_rows = power_of_two(spec.heads.group)
    list_rows = power_of_two(spec.heads.query // selected_lists(spec))
    selected_rows = max(list_rows, FEWEST_ROWS)
    weights = _overlap(spec)
    kernels = (*compression_kernels(spec), *attention_kernels(spec), *inference_kernels(spec))
    arguments, outputs = _arguments(spec), _outputs(spec)
    steps = build_steps(spec, arguments, outputs, kernels)
    sizes = spec_sizes(spec, qk, v, list_rows, selected_rows)
    return Plan(
        spec=spec,
        dtype=spec.dtype,
        gate=spec.combine.gate,
        query_heads=spec.heads.query,
        kv_heads=spec.heads.kv,
        kv_per_branch=spec.kv == "per_branch",
        decodes="decode" in spec.passes,
        cache_dtype=spec.cache.dtype if spec.cache else None,
        rounds_operands=spec.dtype == "float32" and spec.fp32_precision == "tf32",
        hidden=spec.compression.phi.hidden if spec.compression else None,
        phi_sides=compressed_sides(spec),
        qk=qk,
        v=v,
        group_rows=group_rows,
        list_rows=list_rows,
        selected_rows=selected_rows,
        scale=spec.scale_value,
        scale_log2=spec.scale_value * math.log2(math.e),
        overlap=weights,
        steps=steps,
        upkeep=upkeep(kernels, steps),
        arguments=arguments,
        outputs=outputs,
        kernels=kernels,
        decisions=(
            *banded.decisions(spec),
            *selected.decisions(spec),
            *hopper.decisions(spec),
            *hopper_backward.decisions(spec),
            *sharing.decisions(spec),
            *decode_step.decisions(spec),
        ),
        sizes=sizes,
        defaults=_defaults(spec, kernels, sizes),
    )


def _overlap(spec: Spec) -> Overlap | None:
    if spec.selection is None or spec.compression is None or spec.selection.indices == "input":
        return None
    if spec.selection.scores != "compression":
        return None
    return overlap(spec.compression.block, spec.compression.stride, spec.selection.block)


def _arguments(spec: Spec) -> tuple[Argument, ...]:
    key, value = ("B", "Tkv", "Hkv", "Dk"), ("B", "Tkv", "Hkv", "Dv")
    arguments = [Argument("q", ("B", "Tq", "Hq", "Dk"))]
    for position, branch in enumerate(raw_readers(spec)):
        if position == 0:
            arguments += [Argument("k", key), Argument("v", value)]
        elif spec.kv == "per_branch":
            arguments += [Argument(f"k_{branch}", key), Argument(f"v_{branch}", value)]
    if spec.external:
        assert spec.compression is not None
        output = spec.compression.output
        arguments.append(Argument("k_cmp", ("B", "Nc", "Hkv", "Dk"), differentiable=output))
        arguments += [Argument("v_cmp", ("B", "Nc", "Hkv", "Dv"))] if output else []
    if spec.index_dim:
        # None where a selection is given.
        dim = str(spec.index_dim)
        arguments.append(Argument("q_idx", ("B", "Tq", "S", dim), required=False, differentiable=False))
        arguments.append(Argument("k_idx", ("B", "Tkv", "1", dim), required=False, differentiable=False))
    if spec.combine.gate != "none":
        arguments.append(Argument("gates", ("B", "Tq", "Hq", str(len(spec.branches)))))
    arguments += [Argument(sink_name(branch), ("Hq",), dtype="float32") for branch in sunk_branches(spec)]
    arguments += compression_parameters(spec)
    if spec.selection:
        # Where the operator computes the selection, one that was made before may be given in its place.
        given = spec.selection.indices == "input"
        dims = ("B", "Tq", "S", str(spec.selection.count))
        arguments.append(Argument("indices", dims, dtype="int32", required=given, differentiable=False))
        arguments.append(Argument("counts", dims[:-1], dtype="int32", required=False, differentiable=False))
    return tuple(arguments)


def _outputs(spec: Spec) -> tuple[Output, ...]:
    o_dims, lse_dims = ("B", "Tq", "Hq", "Dv"), ("B", "Tq", "Hq")
    compressed = compression_outputs(spec) if "cmp" in spec.branches else ()
    alone = len(spec.branches) == 1 and spec.combine.gate == "none"
    outputs = [Output("o", o_dims, auxiliary=False)]
    for branch in spec.branches:
        if not alone:
            outputs.append(Output(f"o_{branch}", o_dims))
        outputs.append(Output(f"lse_{branch}", lse_dims, "float32"))
    if spec.selection and spec.selection.indices == "computed":
        outputs.append(Output("indices", ("B", "Tq", "S", "n"), "int32"))
        outputs.append(Output("counts", ("B", "Tq", "S"), "int32"))
    outputs += [output for output in compressed if not output.saved_by_phi]
    if spec.selection and "backward" in spec.passes:
        outputs.append(Output("sorted_keys", ("slots",), "int32", auxiliary=False))
        outputs.append(Output("sorted_slots", ("slots",), "int32", auxiliary=False))
    outputs += [output for output in compressed if output.saved_by_phi]
    return tuple(outputs)


def _defaults(spec: Spec, kernels: tuple[Kernel, ...], sizes: Mapping) -> dict[str, dict[str, Config]]:
    """The cost model's choice for each architecture, kernel and schedule."""
    table = {INTERPRETER: {kernel.name: space.smallest(kernel, sizes) for kernel in kernels}}
    for target in TABLES:
        gpu = gpu_for_target(target)
        table[target] = {kernel.name: space.choose(kernel, sizes, gpu) for kernel in kernels}
    for target, configs in table.items() if banded.decisions(spec) else ():
        configs["banded_attention"] = banded.choose_schedule(spec, target)
    if spec.selection:
        for target, configs in table.items():
            gpu = None if target == INTERPRETER else gpu_for_target(target)
            configs["selected_attention"] = selected.choose_schedule(spec, kernels, sizes, configs, gpu)
    for target, configs in table.items():
        for chooser in (hopper, hopper_backward, sharing, decode_step):
            configs |= chooser.choose(spec, target)
    return table | {target: table[shared] for target, shared in SHARED_TABLES.items()}
