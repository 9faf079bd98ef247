"""One call of a package, held against the oracle: every quantity in a row, with its bound."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from nsa_gen.verification.calls import Call, call_package
from nsa_gen.verification.cases import Case
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.gradients import Reference, References
from nsa_gen.verification.inputs import Inputs
from nsa_gen.verification.oracle import BY_BLOCK, SINKS, compressed_rows
from nsa_gen.verification.report import Row
from nsa_gen.verification.schedules import varied
from nsa_gen.verification.selection import check_selection, magnitude_of
from nsa_gen.verification.tolerance import FACTOR, Comparison, compare, unit_roundoff


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
    if case.variation is not None and case.variation.values:
        plain = replace(case, variation=replace(case.variation, values=()))
        with varied(module, case.variation):
            return check_case(module, parameters, plain, inputs, with_gradients=with_gradients, references=references)
    recompute = case.variation.recompute if case.variation is not None and with_gradients else ()
    call = call_package(module, inputs, with_gradients, recompute=recompute)
    computed = parameters.computed
    if computed and (problem := _misshapen_choice(parameters, inputs, call)):
        return [Row(case.label, "selection", "selection", math.inf, 1.0, False, problem)]
    chosen = (call.aux["indices"], call.aux["counts"]) if computed else (None, None)
    references = references or References()
    truth, base = references.of(parameters, inputs, chosen, with_gradients=with_gradients)

    # Logits hundreds of nats apart make another softmax of a rounding of q or k: there only the choice is compared.
    compared = () if case.kind == "abyss" else _outputs(call, truth)
    rows = [
        comparison_row(case.label, name, compare_output(parameters, name, call, truth, base, inputs))
        for name in compared
    ]
    if computed:
        rows.append(_selection_row(parameters, case, inputs, call, truth, base))
    for name, gradient in truth.gradients.items():
        comparison = compare(
            call.gradients[name],
            gradient,
            base.gradients[name],
            dtype=inputs.q.dtype,
            noise=truth.gradient_noise[name],
            drift=truth.gradient_drift[name],
            sources=drift_sources(parameters, inputs, f"d{name}"),
            tf32=parameters.tf32,
            rows=name not in SINKS,
        )
        rows.append(comparison_row(case.label, f"d{name}", comparison))
    if case.twice:
        rows.append(_bits_row(case, call, call_package(module, inputs, with_gradients), parameters, inputs))
    return rows


def _misshapen_choice(p: OracleParameters, inputs: Inputs, call: Call) -> str:
    """What is wrong with the form of the indices and counts that a package returns, or ""."""
    lead = (*inputs.q.shape[:-2], p.kv_heads)
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
    if p.compression_block is None or p.external or name.endswith(("_slc", "_win")):
        return queries
    if inputs.cu_seqlens is not None:
        blocks = compressed_rows(p, inputs.cu_seqlens).numel() * p.kv_heads
    else:
        keys = inputs.k if inputs.k is not None else inputs.q
        blocks = keys.shape[0] * p.compressed_blocks(keys.shape[1]) * p.kv_heads
    return blocks if queries is None else min(blocks, queries)


def compare_output(
    parameters: OracleParameters, name: str, call: Call, truth: Reference, base: Reference, inputs: Inputs
) -> Comparison:
    """One output against the truth; of packed K_cmp and V_cmp only the rows that are blocks."""
    actual = call.tensors()[name]
    wanted, near = truth.outputs.tensors()[name], base.outputs.tensors()[name]
    noise, drift = truth.output_noise.get(name), truth.output_drift.get(name)
    if name in ("k_cmp", "v_cmp") and inputs.cu_seqlens is not None:
        kept = compressed_rows(parameters, inputs.cu_seqlens).to(actual.device)
        if actual.shape == wanted.shape:
            actual, wanted, near = actual[kept], wanted[kept], near[kept]
            noise, drift = (None if x is None else x[kept] for x in (noise, drift))
    lse = name.startswith("lse")
    comparison = compare(
        actual,
        wanted,
        near,
        dtype=inputs.q.dtype,
        noise=noise,
        drift=drift,
        sources=drift_sources(parameters, inputs, name),
        tf32=parameters.tf32,
        rows=not lse,
    )
    expected = torch.float32 if lse else inputs.q.dtype
    problem = "" if actual.dtype == expected else f"expected {expected}, got {actual.dtype}"
    return replace(comparison, problem=comparison.problem or problem)


def comparison_row(case: str, quantity: str, comparison: Comparison) -> Row:
    """A comparison as a row of a report: the measure that came nearest to its bound."""
    measures = {
        "row": (comparison.row_error, comparison.row_bound),
        "norm": (comparison.norm_error, comparison.norm_bound),
        "bias": (comparison.bias_error, comparison.bias_bound),
    }
    name = max(measures, key=lambda measure: measures[measure][0] / measures[measure][1])
    error, bound = measures[name]
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


def _bits_row(case: Case, first: Call, second: Call, p: OracleParameters, inputs: Inputs) -> Row:
    """Elements that differ between two equal calls, padding between packed compressed blocks left out."""
    differing = 0
    other = second.tensors()
    for name, x in first.tensors().items():
        y = other[name]
        if name in ("k_cmp", "v_cmp") and inputs.cu_seqlens is not None:
            kept = compressed_rows(p, inputs.cu_seqlens).to(x.device)
            x, y = x[kept], y[kept]
        differing += int(((x != y) & ~((x != x) & (y != y))).sum())
    return Row(case.label, "determinism", "bits", float(differing), 0.0, differing == 0)
