"""Compare one call of a package with the oracle: one row per quantity, with its bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nsa_gen.verification.calls import Call, call_package
from nsa_gen.verification.cases import Case
from nsa_gen.verification.reference.alignment import LEARNED, LOSS
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.gradients import Reference, References
from nsa_gen.verification.reference.inputs import Inputs
from nsa_gen.verification.reference.oracle import BY_BLOCK, SINKS, compressed_rows
from nsa_gen.verification.reference.selection import check_selection, magnitude_of
from nsa_gen.verification.reference.tolerance import FACTOR, Comparison, compare, unit_roundoff
from nsa_gen.verification.report import Row
from nsa_gen.verification.schedules import varied

COMPRESSED = ("k_cmp", "v_cmp")


def check_case(
    module: Any,
    parameters: OracleParameters,
    case: Case,
    inputs: Inputs,
    *,
    with_gradients: bool,
    references: References | None = None,
) -> list[Row]:
    """All comparisons of one call, one row per quantity. `references` saves work if only schedules differ."""
    p, recompute = parameters, case.variation.recompute if case.variation is not None and with_gradients else ()
    with varied(module, case.variation):
        call = call_package(module, inputs, with_gradients, recompute=recompute)
        rows = check_call(p, case, inputs, call, references or References())
        if case.twice:
            again = call_package(module, inputs, with_gradients)
            first, second = (written(p, inputs, each.tensors()) for each in (call, again))
            rows.append(bits_row(case.label, "determinism", first, second))
    return rows


def check_call(p: OracleParameters, case: Case, inputs: Inputs, call: Call, references: References) -> list[Row]:
    """Compare the results of a call on `inputs` with the oracle on the blocks it selected: one row per quantity."""
    if p.computed and (problem := _misshapen_choice(p, inputs, call)):
        return [Row(case.label, "selection", "selection", math.inf, 1.0, False, problem)]
    chosen = (call.aux["indices"], call.aux["counts"]) if p.computed else (None, None)
    truth, base = references.of(p, inputs, chosen, with_gradients=bool(call.gradients))
    found = call.tensors()
    # With logits hundreds of nats apart, rounding q or k changes the softmax. Only the selection is compared there.
    outputs = [] if case.kind == "abyss" else _outputs(call, truth)

    def row(name: str) -> Row:
        return comparison_row(case.label, name, compare_result(p, inputs, name, found[name], truth, base))

    rows = [row(name) for name in outputs]
    if p.computed:
        rows.append(_selection_row(p, case, inputs, call, truth, base))
    return rows + [row(f"d{name}") for name in truth.gradients]


def _misshapen_choice(p: OracleParameters, inputs: Inputs, call: Call) -> str:
    """What is wrong with the form of the returned indices and counts, or ""."""
    lead = (*inputs.q.shape[:-2], p.scopes)
    for name, shape in (("indices", (*lead, p.selection_count)), ("counts", lead)):
        x = call.aux.get(name)
        if x is None:
            return f"{name}: missing from the auxiliary outputs"
        if x.dtype != torch.int32 or tuple(x.shape) != shape:
            return f"{name}: expected int32 of shape {shape}, got {x.dtype} of {tuple(x.shape)}"
    return ""


def _outputs(call: Call, truth: Reference) -> list[str]:
    """The floating-point outputs to compare: o, and those that the oracle and the auxiliary outputs both have."""
    skipped = ("indices", "counts", *BY_BLOCK, "o")
    return ["o", *(name for name in truth.outputs.tensors() if name not in skipped and name in call.aux)]


def drift_sources(p: OracleParameters, inputs: Inputs, name: str) -> int | None:
    """The number of rows with independent errors from which a quantity's drift comes; None: as many as it has rows.

    What depends on K_cmp and V_cmp shares their errors over all queries of the group. The gradients of phi's parameters
    are sums over the compressed blocks. An error of a query's lse or delta is in its terms of every key's gradient.
    """
    queries = inputs.q.shape[:-1].numel() if name.startswith("d") else None
    if "cmp" not in p.branches or p.external or name.endswith(("_slc", "_win", *LEARNED, LOSS)):
        return queries
    if inputs.cu_seqlens is not None:
        blocks = compressed_rows(p, inputs.cu_seqlens).numel() * p.kv_heads
    else:
        keys = inputs.k if inputs.k is not None else inputs.q
        blocks = keys.shape[0] * p.compressed_blocks(keys.shape[1]) * p.kv_heads
    return blocks if queries is None else min(blocks, queries)


def compare_result(
    p: OracleParameters,
    inputs: Inputs,
    name: str,
    actual: Tensor,
    truth: Reference,
    base: Reference,
    *,
    expected: Tensor | None = None,
    rounded: Tensor | None = None,
) -> Comparison:
    """Compare one output or gradient with the truth; of packed K_cmp and V_cmp only the rows that are blocks.

    With `expected`, which is another result of the operator, compare with that: both may have errors. `rounded` are the
    sizes of quantities that one of the two rounded once more than the operator does. They count as noise.
    """
    wanted, near = truth.tensors()[name], base.tensors()[name]
    noise, drift = truth.noise.get(name), truth.drift.get(name)
    if rounded is not None:
        noise = torch.hypot(rounded.double(), torch.zeros_like(wanted) if noise is None else noise)
    if expected is not None:
        wanted, near = expected.double(), expected.double() + 2 * (near.double() - wanted)
    own = name in COMPRESSED and actual.shape == wanted.shape
    others = expected is not None and name.removeprefix("d") in COMPRESSED
    if inputs.cu_seqlens is not None and (own or others):
        kept = compressed_rows(p, inputs.cu_seqlens).to(actual.device)
        actual, wanted, near = actual[kept], wanted[kept], near[kept]
        noise, drift = (None if x is None else x[kept] for x in (noise, drift))
    # Float32 numbers whatever the dtype, without rows.
    single = name.startswith("lse") or name == LOSS or name[1:] in SINKS
    comparison = compare(
        actual,
        wanted,
        near,
        dtype=inputs.q.dtype,
        noise=noise,
        drift=drift,
        sources=drift_sources(p, inputs, name),
        tf32=p.tf32,
        rows=not single,
    )
    dtype = torch.float32 if single else inputs.q.dtype
    if expected is not None or comparison.problem or actual.dtype == dtype:
        return comparison
    return replace(comparison, problem=f"expected {dtype}, got {actual.dtype}")


def written(p: OracleParameters, inputs: Inputs, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Results without the padding between packed compressed blocks, which is never written."""
    if inputs.cu_seqlens is None:
        return dict(tensors)
    rows = compressed_rows(p, inputs.cu_seqlens).to(inputs.q.device)
    return {name: x[rows] if name.removeprefix("d") in COMPRESSED else x for name, x in tensors.items()}


def comparison_row(case: str, quantity: str, comparison: Comparison) -> Row:
    """A comparison as a row of a report, with the measure that came nearest to its bound."""
    name, (error, bound) = comparison.worst
    return Row(case, quantity, name, error, bound, comparison.ok, comparison.problem)


def _selection_row(
    p: OracleParameters, case: Case, inputs: Inputs, call: Call, truth: Reference, base: Reference
) -> Row:
    exact, near = truth.outputs.importance, base.outputs.importance
    assert exact is not None and near is not None
    off = ((near.double() - exact).abs() / magnitude_of(exact, truth.outputs.magnitude)).nan_to_num(0.0, 0.0, 0.0)
    worst = off.max().item() if off.numel() else 0.0
    tolerance = FACTOR * worst + 8 * unit_roundoff(torch.float32)
    tokens = None if inputs.k is None or inputs.cu_seqlens is not None else inputs.k.shape[1]
    found = check_selection(
        p,
        call.aux["indices"],
        call.aux["counts"],
        exact,
        tolerance=tolerance,
        fingerprint=truth.outputs.fingerprint,
        magnitude=truth.outputs.magnitude,
        tokens=tokens,
        cu_seqlens=inputs.cu_seqlens,
    )
    return Row(case.label, "selection", "selection", found.shortfall, 1.0, found.ok, "; ".join(found.problems))


def bits_row(label: str, title: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Row:
    """One row with the number of elements that differ between two results of the same names. NaN equals NaN.

    If the shapes of a tensor differ, all of its elements count.
    """
    assert first.keys() == second.keys()
    differing = {}
    for name, x in first.items():
        y = second[name]
        unequal = ((x != y) & ~((x != x) & (y != y))).sum() if x.shape == y.shape else max(x.numel(), y.numel(), 1)
        if count := int(unequal):
            differing[name] = count
    problem = ", ".join(f"{count} elements of {name} differ" for name, count in differing.items())
    return Row(label, title, "bits", float(sum(differing.values())), 0.0, not differing, problem)
