"""Reference outputs and gradients in bounded memory, with the noise scale of each.

One dense score matrix of 64 heads and 8192 tokens in float64 is 34 GB; autograd would keep several. Here the oracle and
autograd run on one (sequence, KV head, chunk of query rows) at a time and gradients are summed: queries align to the
end of the keys, so a chunk is a call of its own on the keys up to its last row. Compression runs once per sequence and
head; the summed gradients of K_cmp and V_cmp go back through it at the end.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa_gen.verification import noise
from nsa_gen.verification.dense import OracleParameters, compress, exact_dtype
from nsa_gen.verification.inputs import Inputs
from nsa_gen.verification.oracle import (
    SCORE_BYTES,
    OracleResult,
    Sequence,
    attend_rows,
    reference_attention,
    split_sequences,
    take_rows,
)

PAIRS = ("raw_cmp", "cmp", "slc", "win")
CHUNK_BYTES = 1 << 27
"""Bytes of one score matrix in the backward pass; about ten such live at the peak (measured: 1.0 GB for a group of 16
heads and 8192 keys in float64, the noise scale included)."""


@dataclass(frozen=True)
class Reference:
    """Outputs and gradients on given indices. `gradients` and both noise mappings go by the names of
    `Inputs.differentiable()` and of `OracleResult`; the noise scales are empty unless asked for (see `noise`)."""

    outputs: OracleResult
    gradients: dict[str, Tensor]
    output_noise: dict[str, Tensor]
    gradient_noise: dict[str, Tensor]


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
    a unit roundoff, adds the noise scales in its units, in float32 (for float64 inputs). Peak memory beyond the inputs
    and results: about ten times `chunk_bytes`.
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
    sums = inputs.replace_differentiable({n: torch.zeros_like(x, dtype=exact) for n, x in detached.items()})
    scales = inputs.replace_differentiable({n: torch.zeros_like(x) for n, x in detached.items()})
    output_noise = {
        name: torch.zeros_like(x)
        for name, x in outputs.tensors().items()
        if noise_unit is not None and name.startswith("o")
    }
    calls = zip(
        _split(parameters, inputs), _split(parameters, sums), _split(parameters, scales),
        _rows(inputs.do, inputs.cu_seqlens), _rows_of(output_noise, inputs.cu_seqlens, inputs.q), strict=True,
    )  # fmt: skip
    one = parameters.for_one_kv_head()
    for sequence, total, scale, do, out_noise in calls:
        for head in range(parameters.kv_heads):
            work = _Head(
                one,
                _head(sequence, parameters, head),
                _head(total, parameters, head),
                _head(scale, parameters, head),
                do[:, head * one.query_heads : (head + 1) * one.query_heads],
                {name: x[:, head * one.query_heads : (head + 1) * one.query_heads] for name, x in out_noise.items()},
                *(
                    {name: x[head : head + 1] for name, x in (holder.compression or {}).items()}
                    for holder in (inputs, sums, scales)
                ),
            )
            work.run(chunk_bytes, with_gradients, noise_unit)
    gradients = {n: x.to(detached[n].dtype) for n, x in sums.differentiable().items()} if with_gradients else {}
    gradient_noise: dict[str, Tensor] = {}
    if with_gradients and noise_unit is not None:
        gradient_noise = {name: x.sqrt().float() for name, x in scales.differentiable().items()}
    output_noise = {name: x.sqrt().float() for name, x in output_noise.items()}
    return Reference(outputs, gradients, output_noise, gradient_noise)


@dataclass(frozen=True)
class _Head:
    """One sequence and KV head: values, and the sums (views of the results) its contributions are added to."""

    p: OracleParameters
    values: Sequence
    sums: Sequence
    noise: Sequence
    do: Tensor
    output_noise: dict[str, Tensor]
    learned: dict[str, Tensor]
    learned_sums: dict[str, Tensor]
    learned_noise: dict[str, Tensor]

    def run(self, chunk_bytes: int, with_gradients: bool, noise_unit: float | None) -> None:
        """Add this head's part to the sums, chunk by chunk."""
        p, values, sums, scales = self.p, self.values, self.sums, self.noise
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
                    {name: x[start:stop] for name, x in self.output_noise.items()},
                    noise_unit,
                )

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
            noise.add_compression(p, values.raw_cmp, self.learned, scales.cmp, scales.raw_cmp, self.learned_noise)


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


def _rows_of(tensors: dict[str, Tensor], cu_seqlens: Tensor | None, q: Tensor) -> list[dict[str, Tensor]]:
    split = {name: _rows(x, cu_seqlens) for name, x in tensors.items()}
    return [{name: rows[i] for name, rows in split.items()} for i in range(len(_rows(q, cu_seqlens)))]


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
        **pairs,
    )
