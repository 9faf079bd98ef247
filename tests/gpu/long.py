"""A length no dense oracle reaches whole: run it all, and check samples of rows on the keys that they see."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from nsa_gen.rendering import import_package
from nsa_gen.spec import Spec
from nsa_gen.verification.calls import call_package
from nsa_gen.verification.checking import comparison_row, drift_sources
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.gradients import Reference, reference_gradients
from nsa_gen.verification.reference.inputs import Inputs, make_inputs
from nsa_gen.verification.reference.selection import NEGLIGIBLE, check_selection
from nsa_gen.verification.reference.tolerance import FACTOR, compare, unit_roundoff
from nsa_gen.verification.report import Row, environment
from tests.gpu.common import release, save, say
from tests.gpu.correctness import not_finite
from tests.gpu.support import memory_slot, package_of, variant

ROWWISE = ("q", "do", "gates", "indices", "counts")
"""Arguments with a row a query; the others have a row a key."""


def long_job(
    result: dict[str, Any],
    *,
    spec: str,
    dtype: str,
    tokens: int,
    rows: int,
    device: str,
    seed: int,
) -> None:
    """Forward and backward over `tokens` tokens; `rows` rows at the end, in the middle and early on are checked.

    A query's outputs and its dq and dgates depend on no later token, so a sample is a call of its own. The last rows'
    keys are seen by the last rows only, so for those dk and dv are checked too.
    """
    meaning = variant(spec, dtype)
    if meaning.compression is not None and meaning.compression.phi.key == "external":
        raise ValueError(f"spec: expected one that compresses its keys itself, got {spec}")
    module = import_package(package_of(meaning))
    with memory_slot():
        _run_and_check(result, meaning, module, tokens, rows, device, seed)


def _run_and_check(
    result: dict[str, Any], spec: Spec, module: Any, tokens: int, rows: int, device: str, seed: int
) -> None:
    name, element = spec.name, getattr(torch, spec.dtype)
    say(f"{name}: drawing {tokens} tokens")
    inputs = make_inputs(spec, batch=1, tokens=tokens, dtype=element, device=device, seed=seed)
    result["tokens"] = tokens
    result["environment"] = asdict(environment(torch.device(device)))
    result["input_bytes"] = _allocated(device)
    for peak, with_gradients in (("forward_peak_bytes", False), ("peak_bytes", True)):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        say(f"{name}: forward{' and backward' if with_gradients else ''} at {tokens}")
        call = call_package(module, inputs, with_gradients)
        result[peak] = _allocated(device, peak=True)
    result["not_finite"] = not_finite(call)
    parameters = OracleParameters.from_spec(spec)
    found: list[Row] = []
    for end in (tokens, tokens * 3 // 4 - 1, tokens // 8 + 5):
        say(f"{name}: checking rows {end - rows} to {end}")
        found += check_rows(parameters, inputs, call, end - rows, end)
        result["rows"] = [asdict(row) for row in found]
        save(result)
        release(device)
    bad = [row for row in found if not row.ok]
    result["ok"] = not bad and not result["not_finite"]
    if not result["ok"]:
        finite = f"not finite: {', '.join(result['not_finite'])}; " if result["not_finite"] else ""
        result["error"] = f"{finite}{len(bad)} of {len(found)} comparisons failed"


def _allocated(device: str, peak: bool = False) -> int:
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def take(inputs: Inputs, start: int, end: int, indices: Tensor | None, counts: Tensor | None) -> Inputs:
    """Rows start..end of batched inputs and the keys up to `end`, with the blocks that were chosen for those rows."""
    changed: dict[str, Tensor] = {}
    for name, x in {**inputs.arguments(), "do": inputs.do}.items():
        if isinstance(x, Tensor) and name != "cu_seqlens":
            changed[name] = x[:, start:end] if name in ROWWISE else x[:, :end]
    if indices is not None and counts is not None:
        changed |= {"indices": indices[:, start:end], "counts": counts[:, start:end]}
    return replace(inputs, **changed)


def check_rows(p: OracleParameters, inputs: Inputs, call: Any, start: int, end: int) -> list[Row]:
    """Compare rows start..end of a call (batched, no external compression) with the oracle on those rows alone."""
    sample = take(inputs, start, end, call.aux.get("indices"), call.aux.get("counts"))
    dtype = inputs.q.dtype
    base = reference_gradients(p, sample)
    unit = unit_roundoff(dtype, p.tf32)
    exact = replace(p, tf32=False)
    truth = reference_gradients(exact, sample.to(torch.float64), noise_unit=unit)
    label = f"rows {start} to {end}"
    last = end == inputs.q.shape[1]
    rows: list[Row] = []

    def add(
        quantity: str,
        actual: Tensor,
        wanted: Tensor,
        near: Tensor,
        noise: Tensor | None,
        drift: Tensor | None,
    ) -> None:
        lse = quantity.startswith("lse")
        sources = drift_sources(p, sample, quantity)
        found = compare(
            actual, wanted, near, dtype=dtype, noise=noise, drift=drift, sources=sources, tf32=p.tf32, rows=not lse
        )
        rows.append(comparison_row(label, quantity, found))

    for name, wanted in truth.outputs.tensors().items():
        if name == "o" or (name in call.aux and name.startswith(("o_", "lse_"))):
            actual = call.tensors()[name][:, start:end]
            noise, drift = truth.noise.get(name), truth.drift.get(name)
            add(name, actual, wanted, base.outputs.tensors()[name], noise, drift)
    for name, wanted in truth.gradients.items():
        near, noise, drift = base.gradients[name], truth.noise[f"d{name}"], truth.drift[f"d{name}"]
        if name in ROWWISE:
            add(f"d{name}", call.gradients[name][:, start:end], wanted, near, noise, drift)
        elif last and "." not in name:
            own = slice(start, end)
            parts = (x[:, own] for x in (call.gradients[name], wanted, near, noise, drift))
            add(f"d{name}", *parts)
    if p.selection_block is not None and not p.indices_given:
        rows.append(_selection_row(p, label, sample, base, truth))
    return rows


def _selection_row(p: OracleParameters, label: str, sample: Inputs, base: Reference, truth: Reference) -> Row:
    exact, near = truth.outputs.importance, base.outputs.importance
    assert exact is not None and near is not None and sample.indices is not None and sample.counts is not None
    off = ((near.double() - exact).abs() / exact.clamp(min=NEGLIGIBLE)).max().item()
    tokens = next(x.shape[1] for name, x in sample.arguments().items() if name.startswith("k") and x is not None)
    found = check_selection(
        p,
        sample.indices,
        sample.counts,
        exact,
        tolerance=FACTOR * off + 8 * unit_roundoff(torch.float32),
        fingerprint=truth.outputs.fingerprint,
        tokens=tokens,
    )
    return Row(label, "selection", "selection", found.shortfall, 1.0, found.ok, "; ".join(found.problems))
