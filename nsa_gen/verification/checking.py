"""One call of a package, held against the oracle: every quantity in a row, with its bound."""

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
    """Every comparison of one call: one row a quantity. `references` saves work where only schedules differ."""
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
    """What a call on `inputs` has returned, against the oracle on the blocks it chose: one row a quantity."""
    if p.computed and (problem := _misshapen_choice(p, inputs, call)):
        return [Row(case.label, "selection", "selection", math.inf, 1.0, False, problem)]
    chosen = (call.aux["indices"], call.aux["counts"]) if p.computed else (None, None)
    truth, base = references.of(p, inputs, chosen, with_gradients=bool(call.gradients))
    found = call.tensors()
    # Logits hundreds of nats apart make another softmax of a rounding of q or k: there only the choice is compared.
    outputs = [] if case.kind == "abyss" else _outputs(call, truth)

    def row(name: str) -> Row:
        return comparison_row(case.label, name, compare_result(p, inputs, name, found[name], truth, base))

    rows = [row(name) for name in outputs]
    if p.computed:
        rows.append(_selection_row(p, case, inputs, call, truth, base))
    return rows + [row(f"d{name}") for name in truth.gradients]


def _misshapen_choice(p: OracleParameters, inputs: Inputs, call: Call) -> str:
    """What is wrong with the form of the indices and counts that a package returns, or ""."""
    lead = (*inputs.q.shape[:-2], p.scopes)
    for name, shape in (("indices", (*lead, p.selection_count)), ("counts", lead)):
        x = call.aux.get(name)
        if x is None:
            return f"{name}: missing from the auxiliary outputs"
        if x.dtype != torch.int32 or tuple(x.shape) != shape:
            return f"{name}: expected int32 of shape {shape}, got {x.dtype} of {tuple(x.shape)}"
    return ""


def _outputs(call: Call, truth: Reference) -> list[str]:
    """The floating-point outputs to compare: o, and what the oracle and the package's auxiliary outputs both name."""
    skipped = ("indices", "counts", *BY_BLOCK, "o")
    return ["o", *(name for name in truth.outputs.tensors() if name not in skipped and name in call.aux)]


def drift_sources(p: OracleParameters, inputs: Inputs, name: str) -> int | None:
    """How many rows of independent errors a quantity's drift comes from, None where as many as it has rows.

    What depends on K_cmp and V_cmp shares their errors, over all the queries of their group; the gradients of phi's
    parameters are sums over the compressed blocks; and an error of a query's lse or delta is in its terms of every
    key's gradient.
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
    """One output or gradient against the truth; of packed K_cmp and V_cmp only the rows that are blocks.

    With `expected`, another result of the operator, against that: both may err. `rounded` are the sizes of what one of
    the two rounded once more than the operator does, which counts as noise.
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
    # Numbers in float32 whatever the dtype: no rows.
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
    """Results without the padding between packed compressed blocks, which nobody writes."""
    if inputs.cu_seqlens is None:
        return dict(tensors)
    rows = compressed_rows(p, inputs.cu_seqlens).to(inputs.q.device)
    return {name: x[rows] if name.removeprefix("d") in COMPRESSED else x for name, x in tensors.items()}


def comparison_row(case: str, quantity: str, comparison: Comparison) -> Row:
    """A comparison as a row of a report: the measure that came nearest to its bound."""
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
    """One row: elements that differ between two results of the same names, NaN equal to NaN.

    Every element of a tensor differs where shapes do.
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
