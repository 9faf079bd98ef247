"""Reference outputs and gradients in bounded memory, with the noise scale and the drift of each.

One dense float64 score matrix of 64 heads and 8192 tokens is 34 GB, and autograd would keep several. Here, the oracle
and autograd run on one (sequence, KV head, chunk of query rows) at a time, and gradients are summed. Queries align to
the end of the keys, so a chunk is a separate call on the keys up to its last row. Compression runs once per sequence
and head. The summed gradients of K_cmp and V_cmp go back through it at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa_gen.verification.reference import rounding
from nsa_gen.verification.reference.alignment import LOSS, aligned
from nsa_gen.verification.reference.dense import OracleParameters, compress, exact_dtype
from nsa_gen.verification.reference.inputs import Inputs
from nsa_gen.verification.reference.oracle import (
    SCORE_BYTES,
    SINKS,
    OracleResult,
    Pair,
    Sequence,
    attend_rows,
    mapped,
    reference_attention,
    row_chunks,
    split_sequences,
    take_rows,
)
from nsa_gen.verification.reference.tolerance import unit_roundoff

Choice = tuple[Tensor | None, Tensor | None]
"""Indices and counts; None if the oracle selects or nothing is selected."""
WITHOUT_GRADIENT = ("indices", "counts", "do", "q_idx", "k_idx")
CHUNK_BYTES = 1 << 27
"""Bytes of one score matrix in the backward pass. About ten of them live at the peak (measured: 1.0 GB for a group of
16 heads and 8192 keys in float64, including the noise scale)."""


@dataclass(frozen=True)
class Reference:
    """Outputs and gradients on given indices, with the names of `OracleResult` and of `Inputs.differentiable()`.

    With an alignment loss, there are also gradients of `q_idx` and `k_idx`, for `Inputs.dloss`. `noise` and `drift`
    have entries for both by name, for the gradient of x as dx; they are empty unless requested. Noise is in units of
    the dtype's roundoff; drift is a standard deviation in units of float32's roundoff (see `rounding`).
    """

    outputs: OracleResult
    gradients: dict[str, Tensor]
    noise: dict[str, Tensor]
    drift: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Outputs and gradients by name, the gradient of x as dx."""
        return {**self.outputs.tensors(), **_as_gradients(self.gradients)}


def _as_gradients(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"d{name}": x for name, x in tensors.items()}


def reference_gradients(
    parameters: OracleParameters,
    inputs: Inputs,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    with_gradients: bool = True,
    noise_unit: float | None = None,
    score_bytes: int = SCORE_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
) -> Reference:
    """Outputs for `inputs`, and the gradients of sum(o * inputs.do) and of sum(alignment_loss * inputs.dloss).

    All are in the inputs' dtype. `indices` and `counts`, if given, replace those of `inputs` (for a computed selection,
    the kernel's, so that both attend to the same blocks). Gradients are summed in float32 (float64 for float64) and
    rounded once. `noise_unit`, a unit roundoff, adds the noise scales in its units and the drifts, in float32 (for
    float64 inputs). Peak memory in addition to the inputs and results: about ten times `chunk_bytes`.
    """
    if noise_unit is not None and inputs.q.dtype != torch.float64:
        raise ValueError(f"noise_unit: expected None unless the inputs are float64, got inputs of {inputs.q.dtype}")
    if indices is not None:
        inputs = replace(inputs, indices=indices, counts=counts)
    inputs = inputs.replace_differentiable({name: x.detach() for name, x in inputs.differentiable().items()})
    with torch.no_grad():
        outputs = reference_attention(parameters, **inputs.arguments(), score_bytes=score_bytes)
    if parameters.selection_block is not None:
        inputs = replace(inputs, indices=outputs.indices, counts=outputs.counts)
    dtype = inputs.q.dtype
    sums, noises, drifts, squares = (_zeros(inputs, each) for each in (exact_dtype(dtype), dtype, dtype, dtype))
    kept = ("o", "lse", "k_", "v_") if noise_unit is not None else ()
    drift_of = {name: torch.zeros_like(x) for name, x in outputs.tensors().items() if name.startswith(kept)}
    noise_of = {name: torch.zeros_like(x) for name, x in drift_of.items() if not name.startswith("lse")}

    split = [_split(parameters, each) for each in (inputs, sums, noises, drifts, squares)]
    views = [_rows_of(parameters, each, inputs, split[0]) for each in (noise_of, drift_of)]
    one = parameters.for_one_kv_head()
    for *sequences, noise_rows, drift_rows in zip(*split, *views, strict=True):
        for head in range(parameters.kv_heads):
            parts = (_head(each, parameters, head) for each in sequences)
            rows = (_head_of(each, one.query_heads, head) for each in (noise_rows, drift_rows))
            _Head(one, *parts, *rows, with_gradients, noise_unit).run(chunk_bytes)
    if noise_unit is not None and with_gradients:
        _finish(parameters, split[0], sums, drifts, squares)
        noise_of |= _as_gradients(noises.differentiable())
        drift_of |= _as_gradients(drifts.differentiable())
    like = inputs.differentiable() if with_gradients else {}
    found = sums.differentiable()
    gradients = {name: found[name].to(x.dtype) for name, x in like.items()}
    if parameters.aligned and inputs.q_idx is not None:
        assert outputs.indices is not None
        more = {"with_gradients": with_gradients, "noise_unit": noise_unit, "chunk_bytes": chunk_bytes}
        of_loss = aligned(parameters, inputs, outputs.indices, outputs.counts, **more)
        outputs = replace(outputs, alignment_loss=of_loss.values.pop(LOSS))
        gradients |= {name.removeprefix("d"): x for name, x in of_loss.values.items()}
        if noise_unit is not None:
            noise_of |= of_loss.noise
            drift_of |= of_loss.drift
    return Reference(outputs, gradients, _roots(noise_of), _roots(drift_of))


def _zeros(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Zeros for all tensors that have a gradient."""
    zeros = {name: torch.zeros_like(x, dtype=dtype) for name, x in inputs.differentiable().items()}
    return inputs.replace_differentiable(zeros)


def _finish(p: OracleParameters, sequences: list[Sequence], sums: Inputs, drifts: Inputs, squares: Inputs) -> None:
    """Add the drift of sums over all sequences: of phi's parameters over blocks, and of sinks over query rows."""
    blocks = float(sum(p.compressed_blocks(sequence.tokens) for sequence in sequences))
    rows = float(sums.do.shape[:-2].numel())
    totals, terms = sums.differentiable(), squares.differentiable()
    for name, x in drifts.differentiable().items():
        if "." in name or name in SINKS:
            x.add_(rounding.chain(rows if name in SINKS else blocks, totals[name].square(), terms[name]))


def _roots(squares: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.sqrt().float() for name, x in squares.items()}


@dataclass(frozen=True)
class _Head:
    """One sequence and KV head: values, and views of the results to which its contributions are added.

    `sums` are gradients. `noise`, `drift` and `squares` are the squares of their noise, drift and terms.
    """

    p: OracleParameters
    values: Sequence
    sums: Sequence
    noise: Sequence
    drift: Sequence
    squares: Sequence
    output_noise: dict[str, Tensor]
    output_drift: dict[str, Tensor]
    with_gradients: bool
    noise_unit: float | None

    def run(self, chunk_bytes: int) -> None:
        """Add this head's part, chunk by chunk."""
        p, raw, learned = self.p, self.values.raw_cmp, self.values.learned
        if raw is None:
            self._add_attention(chunk_bytes)
            return
        roots = [x.detach().requires_grad_(self.with_gradients) for x in (*raw, *learned.values())]
        with torch.set_grad_enabled(self.with_gradients):
            compressed = compress(p, roots[0], roots[1], dict(zip(learned, roots[2:], strict=True)))
        work = replace(
            self,
            values=replace(self.values, cmp=_pair(x.detach() for x in compressed)),
            sums=_with_zeros(self.sums, compressed),
            noise=_with_zeros(self.noise, compressed),
            drift=_with_zeros(self.drift, compressed),
        )
        sides: list[rounding.PhiSide] = []
        if self.noise_unit is not None:
            for side, x, name in zip(("key", "value"), raw, ("k_cmp", "v_cmp"), strict=True):
                sides.append(rounding.phi_side(p, side, x, learned, self.noise_unit))
                self.output_noise[name][:, 0].add_(sides[-1].noise)
                self.output_drift[name][:, 0].add_(sides[-1].variance)
        work._add_attention(chunk_bytes, sides)
        if not self.with_gradients or compressed[0].shape[0] == 0:
            return
        assert work.sums.cmp is not None and work.noise.cmp is not None and work.drift.cmp is not None
        cotangents = [g.to(x.dtype) for g, x in zip(work.sums.cmp, compressed, strict=True)]
        found = torch.autograd.grad(compressed, roots, cotangents, allow_unused=True)
        _add(found, (*_given(self.sums.raw_cmp), *self.sums.learned.values()))
        if self.noise_unit is None:
            return
        raw_noise = _given(self.noise.raw_cmp)
        rounding.add_compression(p, raw, learned, work.noise.cmp, raw_noise, self.noise.learned)
        raw_drift = _given(self.drift.raw_cmp)
        for side, g, variance, target in zip(sides, cotangents, work.drift.cmp, raw_drift, strict=True):
            blocks, parameters = side.gradients(g[:, 0], variance[:, 0])
            rounding.add_blocks(p, blocks, target)
            for name in parameters.keys() & learned.keys():
                self.drift.learned[name][0].add_(parameters[name][0])
                self.squares.learned[name][0].add_(parameters[name][1])

    def _add_attention(self, chunk_bytes: int, sides: list[rounding.PhiSide] | None = None) -> None:
        """Add the part of attention, with known K_cmp and V_cmp; `sides` have their noise and drift."""
        p, values = self.p, self.values
        cmp_noise = _pair(side.noise[:, None] for side in sides) if sides else None
        cmp_drift = _pair(side.variance[:, None] for side in sides) if sides else None
        sums_of: dict[str, rounding.Sums] = {}
        if self.with_gradients and self.noise_unit is not None:
            sums_of = {branch: rounding.Sums.like(getattr(values, branch)) for branch in p.branches}
        for start, stop in row_chunks(p, values, chunk_bytes) if values.q.shape[0] else ():
            here, sums, noises, drifts = (
                take_rows(p, each, start, stop) for each in (values, self.sums, self.noise, self.drift)
            )
            if self.with_gradients:
                _add_gradients(p, here, sums)
            if self.noise_unit is None:
                continue
            # K_cmp and V_cmp have no query rows.
            outputs = (
                {name: x[start:stop] for name, x in each.items() if name[0] in "ol"}
                for each in (self.output_noise, self.output_drift)
            )
            noise = rounding.Squares(next(outputs), noises if self.with_gradients else None, cmp_noise)
            drift = rounding.Squares(next(outputs), drifts if self.with_gradients else None, cmp_drift)
            for rows in rounding.branch_rows(p, here):
                rounding.add_noise(rows, noise, self.noise_unit)
                rounding.add_drift(rows, drift, sums_of, self.squares)
        for branch, found_sums in sums_of.items():
            found_sums.finish(getattr(self.drift, branch))


def _with_zeros(s: Sequence, compressed: Pair) -> Sequence:
    """A sequence with zeros for its K_cmp and V_cmp."""
    return replace(s, cmp=_pair(torch.zeros_like(x, dtype=s.q.dtype) for x in compressed))


def _pair(tensors: Iterable[Tensor]) -> Pair:
    first, second = tensors
    return first, second


def _given(pair: Pair | None) -> Pair:
    assert pair is not None
    return pair


def _add(found: Iterable[Tensor | None], targets: Iterable[Tensor]) -> None:
    for target, gradient in zip(targets, found, strict=True):
        if gradient is not None:
            target += gradient


def _add_gradients(p: OracleParameters, values: Sequence, sums: Sequence) -> None:
    """Add the gradients of one chunk of rows to the views `sums`."""
    leaves: list[Tensor] = []
    targets: list[Tensor] = []

    def leaf(name: str, x: Tensor) -> Tensor:
        if name not in WITHOUT_GRADIENT:
            x = x.detach().requires_grad_()
            leaves.append(x)
        return x

    def target(name: str, x: Tensor) -> Tensor:
        if name not in WITHOUT_GRADIENT:
            targets.append(x)
        return x

    mapped(sums, target)
    with torch.enable_grad():
        o = attend_rows(p, mapped(values, leaf)).o
    assert values.do is not None
    _add(torch.autograd.grad(o, leaves, values.do.to(o.dtype), allow_unused=True), targets)


def _split(p: OracleParameters, inputs: Inputs) -> list[Sequence]:
    found = split_sequences(p, {**inputs.arguments(), "do": inputs.do}, inputs.cu_seqlens, inputs.compression)
    # Blocks are already selected. Nothing reaches compressed keys without output, nor the indexer.
    found = [replace(each, q_idx=None, k_idx=None) for each in found]
    return [replace(each, raw_cmp=None, cmp=None) for each in found] if p.scorer_alone else found


def _rows_of(
    p: OracleParameters, tensors: dict[str, Tensor], inputs: Inputs, sequences: list[Sequence]
) -> list[dict[str, Tensor]]:
    """Views of the outputs, one mapping per sequence; of packed K_cmp and V_cmp, the rows that are its blocks."""
    starts = [0] * len(sequences) if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    found = []
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=False)):
        first = start // (p.compression_stride or 1)
        rows = slice(start, start + sequence.q.shape[0])
        blocks = slice(first, first + p.compressed_blocks(sequence.tokens))
        mine = {name: x[i] if inputs.cu_seqlens is None else x for name, x in tensors.items()}
        found.append({name: x[blocks if name in ("k_cmp", "v_cmp") else rows] for name, x in mine.items()})
    return found


def _head_of(outputs: dict[str, Tensor], group: int, head: int) -> dict[str, Tensor]:
    """The part of a sequence's outputs that belongs to one KV head: one head of K_cmp and V_cmp, else its group."""
    widths = {name: 1 if name in ("k_cmp", "v_cmp") else group for name in outputs}
    return {name: x[:, head * widths[name] : (head + 1) * widths[name]] for name, x in outputs.items()}


def _head(s: Sequence, p: OracleParameters, head: int) -> Sequence:
    """The part of a sequence that belongs to one KV head and its group, as views."""
    group, own = slice(head * p.group, (head + 1) * p.group), slice(head, head + 1)

    def cut(name: str, x: Tensor) -> Tensor:
        if name in s.learned:
            return x[own]
        if name in SINKS:
            return x[group]
        if name in ("indices", "counts"):
            return x[:, {"group": own, "head": group, "all": slice(None)}[p.scope]]
        return x[:, group if name in ("q", "gates", "do") else own]

    return mapped(s, cut)


def truth_and_baseline(
    p: OracleParameters, inputs: Inputs, chosen: Choice = (None, None), *, with_gradients: bool
) -> tuple[Reference, Reference]:
    """The truth in float64, with noise and drift, and the oracle in the inputs' dtype, on the blocks of `chosen`."""
    base = reference_gradients(p, inputs, *chosen, with_gradients=with_gradients)
    exact, unit = inputs.to(torch.float64), unit_roundoff(inputs.q.dtype, p.tf32)
    more = {"with_gradients": with_gradients, "noise_unit": unit}
    return reference_gradients(replace(p, tf32=False), exact, *chosen, **more), base


class References:
    """The oracle's results for one set of inputs, cached for the last selection of blocks that was requested."""

    def __init__(self) -> None:
        self._chosen: Choice | None = None
        self._found: tuple[Reference, Reference] | None = None

    def of(
        self, p: OracleParameters, inputs: Inputs, chosen: Choice, *, with_gradients: bool
    ) -> tuple[Reference, Reference]:
        """The truth in float64, and the oracle in the inputs' dtype."""
        if self._found is None or not _same(self._chosen, chosen):
            self._chosen = chosen
            self._found = truth_and_baseline(p, inputs, chosen, with_gradients=with_gradients)
        return self._found


def _same(one: Choice | None, other: Choice) -> bool:
    if one is None:
        return False
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(one, other, strict=True)
    )
