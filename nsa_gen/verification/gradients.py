"""Reference outputs and gradients in bounded memory, with the noise scale and the drift of each.

One dense score matrix of 64 heads and 8192 tokens in float64 is 34 GB; autograd would keep several. Here the oracle and
autograd run on one (sequence, KV head, chunk of query rows) at a time and gradients are summed: queries align to the
end of the keys, so a chunk is a call of its own on the keys up to its last row. Compression runs once per sequence and
head; the summed gradients of K_cmp and V_cmp go back through it at the end.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsa_gen.verification import drift, noise
from nsa_gen.verification.dense import OracleParameters, compress, exact_dtype
from nsa_gen.verification.inputs import Inputs
from nsa_gen.verification.oracle import (
    SCORE_BYTES,
    SINKS,
    OracleResult,
    Sequence,
    attend_rows,
    reference_attention,
    split_sequences,
    take_rows,
)
from nsa_gen.verification.tolerance import unit_roundoff

PAIRS = ("raw_cmp", "cmp", "slc", "win")
CHUNK_BYTES = 1 << 27
"""Bytes of one score matrix in the backward pass; about ten such live at the peak (measured: 1.0 GB for a group of 16
heads and 8192 keys in float64, the noise scale included)."""


@dataclass(frozen=True)
class Reference:
    """Outputs and gradients on given indices, by the names of `OracleResult` and of `Inputs.differentiable()`.

    The noise scales and drifts are empty unless asked for. `*_noise` is in units of the dtype's roundoff (see `noise`),
    `*_drift` a standard deviation in units of float32's (see `drift`).
    """

    outputs: OracleResult
    gradients: dict[str, Tensor]
    output_noise: dict[str, Tensor]
    gradient_noise: dict[str, Tensor]
    output_drift: dict[str, Tensor]
    gradient_drift: dict[str, Tensor]


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
    """Outputs for `inputs` and the gradients of sum(o * inputs.do), in the inputs' dtype.

    `indices` and `counts` replace those of `inputs` where given (computed selection: the kernel's choice, so that both
    attend to the same blocks). Gradients are summed in float32 (float64 for float64) and rounded once. `noise_unit`,
    a unit roundoff, adds the noise scales in its units and the drifts, in float32 (for float64 inputs). Peak memory
    beyond the inputs and results: about ten times `chunk_bytes`.
    """
    if noise_unit is not None and inputs.q.dtype != torch.float64:
        raise ValueError(f"noise_unit: expected None unless the inputs are float64, got inputs of {inputs.q.dtype}")
    if indices is not None:
        inputs = replace(inputs, indices=indices, counts=counts)
    detached = {name: x.detach() for name, x in inputs.differentiable().items()}
    inputs = inputs.replace_differentiable(detached)
    with torch.no_grad():
        outputs = reference_attention(parameters, **inputs.arguments(), score_bytes=score_bytes)
    if parameters.selection_block is not None:
        inputs = replace(inputs, indices=outputs.indices, counts=outputs.counts)
    exact = exact_dtype(inputs.q.dtype)
    sums, scales, drifts, squares = (
        inputs.replace_differentiable({n: torch.zeros_like(x, dtype=dtype) for n, x in detached.items()})
        for dtype in (exact, inputs.q.dtype, inputs.q.dtype, inputs.q.dtype)
    )
    wanted = {
        n: x for n, x in outputs.tensors().items() if noise_unit is not None and n.startswith(("o", "lse", "k_", "v_"))
    }
    output_noise = {name: torch.zeros_like(x) for name, x in wanted.items() if not name.startswith("lse")}
    output_drift = {name: torch.zeros_like(x) for name, x in wanted.items()}
    split = [_split(parameters, holder) for holder in (inputs, sums, scales, drifts, squares)]
    calls = zip(
        *split, _rows(inputs.do, inputs.cu_seqlens),
        *(_rows_of(parameters, x, inputs, split[0]) for x in (output_noise, output_drift)), strict=True,
    )  # fmt: skip
    one = parameters.for_one_kv_head()
    for *sequence, do, out_noise, out_drift in calls:
        for head in range(parameters.kv_heads):
            work = _Head(
                one,
                *(_head(x, parameters, head) for x in sequence),
                do[:, head * one.query_heads : (head + 1) * one.query_heads],
                *(_head_of(x, one.query_heads, head) for x in (out_noise, out_drift)),
                *(
                    {name: x[head : head + 1] for name, x in (holder.compression or {}).items()}
                    for holder in (inputs, sums, scales, drifts, squares)
                ),
            )
            work.run(chunk_bytes, with_gradients, noise_unit)
    if noise_unit is not None and with_gradients:
        blocks = float(sum(parameters.compressed_blocks(sequence.tokens) for sequence in split[0]))
        for name, x in (drifts.compression or {}).items():
            assert sums.compression is not None and squares.compression is not None
            x.add_(drift.chain(blocks, sums.compression[name].square(), squares.compression[name]))
    for name in SINKS if noise_unit is not None and with_gradients else ():
        if (x := getattr(drifts, name)) is not None:
            rows = float(inputs.do.shape[:-2].numel())
            x.add_(drift.chain(rows, getattr(sums, name).square(), getattr(squares, name)))
    gradients = {n: x.to(detached[n].dtype) for n, x in sums.differentiable().items()} if with_gradients else {}
    gradient_noise: dict[str, Tensor] = {}
    gradient_drift: dict[str, Tensor] = {}
    if with_gradients and noise_unit is not None:
        gradient_noise, gradient_drift = _roots(scales.differentiable()), _roots(drifts.differentiable())
    return Reference(outputs, gradients, _roots(output_noise), gradient_noise, _roots(output_drift), gradient_drift)


def _roots(squares: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.sqrt().float() for name, x in squares.items()}


@dataclass(frozen=True)
class _Head:
    """One sequence and KV head: values, and the sums (views of the results) its contributions are added to."""

    p: OracleParameters
    values: Sequence
    sums: Sequence
    noise: Sequence
    drift: Sequence
    squares: Sequence
    do: Tensor
    output_noise: dict[str, Tensor]
    output_drift: dict[str, Tensor]
    learned: dict[str, Tensor]
    learned_sums: dict[str, Tensor]
    learned_noise: dict[str, Tensor]
    learned_drift: dict[str, Tensor]
    learned_squares: dict[str, Tensor]

    def run(self, chunk_bytes: int, with_gradients: bool, noise_unit: float | None) -> None:
        """Add this head's part to the sums, chunk by chunk."""
        p, values, sums, scales, drifts = self.p, self.values, self.sums, self.noise, self.drift
        sides: list[drift.PhiSide] = []
        cmp_noise: drift.Pair | None = None
        cmp_drift: drift.Pair | None = None
        roots: list[Tensor] = []
        compressed: tuple[Tensor, Tensor] | None = None
        if values.raw_cmp is not None:
            raw = tuple(x.detach().requires_grad_(with_gradients) for x in values.raw_cmp)
            learned = {name: x.detach().requires_grad_(with_gradients) for name, x in self.learned.items()}
            roots = [*raw, *learned.values()]
            with torch.set_grad_enabled(with_gradients):
                compressed = compress(p, raw[0], raw[1], learned)
            k_cmp, v_cmp = (x.detach() for x in compressed)
            values = replace(values, cmp=(k_cmp, v_cmp))
            like = (self.do.new_zeros(x.shape, dtype=exact_dtype(x.dtype)) for x in compressed)
            sums = replace(sums, cmp=(next(like), next(like)))
            k_noise, v_noise = (torch.zeros_like(x) for x in compressed)
            scales = replace(scales, cmp=(k_noise, v_noise))
            drifts = replace(drifts, cmp=(torch.zeros_like(k_cmp), torch.zeros_like(v_cmp)))
            if noise_unit is not None:
                sides = [
                    drift.phi_side(p, side, x, self.learned, noise_unit)
                    for side, x in zip(("key", "value"), self.values.raw_cmp or (), strict=True)
                ]
                for name, side in zip(("k_cmp", "v_cmp"), sides, strict=True):
                    self.output_noise[name][:, 0].add_(side.noise)
                    self.output_drift[name][:, 0].add_(side.variance)
                cmp_noise = sides[0].noise[:, None], sides[1].noise[:, None]
                cmp_drift = sides[0].variance[:, None], sides[1].variance[:, None]

        branch_sums: dict[str, drift.Sums] = {}
        if with_gradients and noise_unit is not None:
            branch_sums = {branch: drift.Sums.like(getattr(values, branch)) for branch in p.branches}
        rows = values.q.shape[0]
        itemsize = torch.finfo(exact_dtype(values.q.dtype)).bits // 8
        chunk = max(1, chunk_bytes // max(1, p.query_heads * values.tokens * itemsize))
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            here = take_rows(p, values, start, stop)
            if with_gradients:
                _add_gradients(p, here, take_rows(p, sums, start, stop), self.do[start:stop])
            if noise_unit is not None:
                noise.add_rows(
                    p,
                    here,
                    take_rows(p, scales, start, stop) if with_gradients else None,
                    self.do[start:stop],
                    {name: x[start:stop] for name, x in self.output_noise.items() if name[0] == "o"},
                    noise_unit,
                    cmp_noise,
                )
                drift.add_rows(
                    p,
                    here,
                    cmp_drift,
                    take_rows(p, drifts, start, stop) if with_gradients else None,
                    branch_sums,
                    self.squares,
                    self.do[start:stop],
                    {name: x[start:stop] for name, x in self.output_drift.items() if name[0] in "ol"},
                )
        for branch, found_sums in branch_sums.items():
            found_sums.finish(getattr(drifts, branch))

        if compressed is None or not with_gradients or compressed[0].shape[0] == 0:
            return
        assert sums.cmp is not None and sums.raw_cmp is not None and values.raw_cmp is not None
        cotangents = [g.to(x.dtype) for g, x in zip(sums.cmp, compressed, strict=True)]
        found = torch.autograd.grad(compressed, roots, cotangents, allow_unused=True)
        for target, gradient in zip((*sums.raw_cmp, *self.learned_sums.values()), found, strict=True):
            if gradient is not None:
                target += gradient
        if noise_unit is not None:
            assert scales.cmp is not None and scales.raw_cmp is not None
            assert drifts.cmp is not None and drifts.raw_cmp is not None
            noise.add_compression(p, values.raw_cmp, self.learned, scales.cmp, scales.raw_cmp, self.learned_noise)
            for side, g, variance, raw_drift in zip(sides, cotangents, drifts.cmp, drifts.raw_cmp, strict=True):
                blocks, parameters = side.gradients(g[:, 0], variance[:, 0])
                drift.add_blocks(p, blocks, raw_drift)
                for name in parameters.keys() & self.learned_drift.keys():
                    self.learned_drift[name][0].add_(parameters[name][0])
                    self.learned_squares[name][0].add_(parameters[name][1])


def _add_gradients(p: OracleParameters, values: Sequence, sums: Sequence, do: Tensor) -> None:
    """Add the gradients of one chunk of rows to the views `sums`."""
    leaves: list[Tensor] = []
    targets: list[Tensor] = []

    def leaf(x: Tensor, target: Tensor) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        targets.append(target)
        return leaves[-1]

    changes: dict[str, object] = {"q": leaf(values.q, sums.q)}
    if values.gates is not None and sums.gates is not None:
        changes["gates"] = leaf(values.gates, sums.gates)
    for name in SINKS:
        if (x := getattr(values, name)) is not None:
            changes[name] = leaf(x, getattr(sums, name))
    for name in PAIRS[1:]:
        pair, target = getattr(values, name), getattr(sums, name)
        if pair is not None:
            changes[name] = (leaf(pair[0], target[0]), leaf(pair[1], target[1]))
    with torch.enable_grad():
        o = attend_rows(p, replace(values, **changes)).o  # type: ignore[arg-type]
    found = torch.autograd.grad(o, leaves, do.to(o.dtype), allow_unused=True)
    for target, gradient in zip(targets, found, strict=True):
        if gradient is not None:
            target += gradient


def _split(p: OracleParameters, inputs: Inputs) -> list[Sequence]:
    tensors = {n: x for n, x in inputs.arguments().items() if n not in ("compression", "cu_seqlens")}
    return split_sequences(p, tensors, inputs.cu_seqlens)


def _rows(x: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    if cu_seqlens is None:
        return list(x.unbind(0))
    bounds = cu_seqlens.tolist()
    return [x[start:stop] for start, stop in itertools.pairwise(bounds)]


def _rows_of(
    p: OracleParameters, tensors: dict[str, Tensor], inputs: Inputs, sequences: list[Sequence]
) -> list[dict[str, Tensor]]:
    """Views of the outputs, a mapping for each sequence; of packed K_cmp and V_cmp the rows that are its blocks."""
    split = {
        name: _rows(x, inputs.cu_seqlens) for name, x in tensors.items() if not name.endswith("_cmp") or name[0] in "ol"
    }
    found = [{name: rows[i] for name, rows in split.items()} for i in range(len(sequences))]
    starts = [0] * len(sequences) if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    for name in tensors.keys() - split.keys():
        for i, sequence in enumerate(sequences):
            whole = tensors[name][i] if inputs.cu_seqlens is None else tensors[name]
            first = starts[i] // (p.compression_stride or 1)
            found[i][name] = whole[first : first + p.compressed_blocks(sequence.tokens)]
    return found


def _head_of(outputs: dict[str, Tensor], group: int, head: int) -> dict[str, Tensor]:
    """The part of a sequence's outputs that belongs to one KV head: of K_cmp and V_cmp one head, else its group."""
    found = {}
    for name, x in outputs.items():
        width = group if name[0] in "ol" else 1
        found[name] = x[:, head * width : (head + 1) * width]
    return found


def _head(s: Sequence, p: OracleParameters, head: int) -> Sequence:
    """The part of a sequence that belongs to one KV head and its group, as views."""
    group = slice(head * p.group, (head + 1) * p.group)
    own = slice(head, head + 1)
    pairs = {name: None if (x := getattr(s, name)) is None else (x[0][:, own], x[1][:, own]) for name in PAIRS}
    return Sequence(
        tokens=s.tokens,
        q=s.q[:, group],
        gates=None if s.gates is None else s.gates[:, group],
        indices=None if s.indices is None else s.indices[:, own],
        counts=None if s.counts is None else s.counts[:, own],
        sink_win=None if s.sink_win is None else s.sink_win[group],
        **pairs,
    )


class References:
    """What the oracle says of one set of inputs, remembered for the last choice of blocks it was asked about."""

    def __init__(self) -> None:
        self._chosen: tuple[Tensor | None, ...] | None = None
        self._found: tuple[Reference, Reference] | None = None

    def of(
        self, p: OracleParameters, inputs: Inputs, chosen: tuple[Tensor | None, ...], *, with_gradients: bool
    ) -> tuple[Reference, Reference]:
        """The truth in float64, and the oracle in the inputs' dtype."""
        if self._found is None or not _same(self._chosen, chosen):
            common: dict[str, Any] = {"with_gradients": with_gradients}
            base = reference_gradients(p, inputs, *chosen, **common)
            exact = inputs.to(torch.float64)
            unit = unit_roundoff(inputs.q.dtype, p.tf32)
            truth = reference_gradients(replace(p, tf32=False), exact, *chosen, **common, noise_unit=unit)
            self._chosen, self._found = chosen, (truth, base)
        return self._found


def _same(one: tuple[Tensor | None, ...] | None, other: tuple[Tensor | None, ...]) -> bool:
    if one is None:
        return False
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(one, other, strict=True)
    )
