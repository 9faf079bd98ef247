"""The dense oracle: what an operator must compute, for whole batches and packed sequences.

`reference_attention` takes the arguments of a generated package's `nsa_attention` and follows the semantics page to the
letter. Built of `dense`, it needs torch and the standard library only and shares no code with the kernels it judges.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nsa_gen.verification.reference.dense import (
    OracleParameters,
    attend,
    block_fingerprint,
    block_importance,
    compress,
    exact_dtype,
    index_scores,
    mean_scores,
    select_blocks,
    visible_compressed,
    visible_selected,
    visible_window,
)

SCORE_BYTES = 1 << 28
SINKS = ("sink_slc", "sink_win", "sink")
"""Arguments of shape (Hq,) in float32, whatever the dtype of the others, which have no tokens and no batch."""
RAW_BRANCHES = ("slc", "win", "joint")
"""Branches that attend to raw keys and values."""
BY_TOKEN = ("q", "q_idx", "gates", "indices", "counts", "do")
"""Tensors with a row a query token."""
BY_KEY = ("k_idx",)
"""Tensors, beside keys and values, with a row a key token."""
BY_BLOCK = ("importance", "fingerprint", "magnitude")
"""Pieces of a result whose last dim is selection blocks, as many as the longest sequence has."""


@dataclass(frozen=True)
class OracleResult:
    """What the operator returns, and everything on the way. Absent pieces are None.

    Shapes are those of the generated package, batched (B, Tq, ...) or packed (T_total, ...): `o` and `o_x`
    (B, Tq, Hq, Dv), `lse_x` (B, Tq, Hq) natural logarithm, `indices` (B, Tq, S, n) int32, `counts` (B, Tq, S)
    int32, `importance` and `fingerprint` (B, Tq, S, selection blocks), `k_cmp` (B, Nc, Hkv, Dk), `v_cmp`
    (B, Nc, Hkv, Dv). With scores by means or an indexer, `importance` is the score, and `magnitude` what its rounding
    is relative to. `alignment_loss` (B,), packed (N,), is the indexer's of each sequence (`alignment.aligned`).
    Only `o`, `o_x`, `k_cmp` and `v_cmp` carry gradients.
    """

    o: Tensor
    o_cmp: Tensor | None = None
    lse_cmp: Tensor | None = None
    o_slc: Tensor | None = None
    lse_slc: Tensor | None = None
    o_win: Tensor | None = None
    lse_win: Tensor | None = None
    o_joint: Tensor | None = None
    lse_joint: Tensor | None = None
    indices: Tensor | None = None
    counts: Tensor | None = None
    importance: Tensor | None = None
    fingerprint: Tensor | None = None
    magnitude: Tensor | None = None
    k_cmp: Tensor | None = None
    v_cmp: Tensor | None = None
    alignment_loss: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The pieces that are present, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sequence:
    """One sequence, its tensors without a batch dimension; a branch that is absent has None.

    `q_idx` (Tq, S, Di) and `k_idx` (Tkv, 1, Di) are the indexer's; without them, blocks that are given are not scored.
    `raw_cmp`, `slc`, `win` and `joint` are (K, V) of (Tkv, Hkv, D); `cmp` is (K_cmp, V_cmp) of (Nc, Hkv, D), set when
    the caller passes them, else by `compress`; where compressed keys have no output, the values of both have no
    columns. `sinks`, each (Hq,), and phi's parameters, `learned`, go by the names of their arguments and are the same
    for every sequence of a call. `do` (Tq, Hq, Dv) is the gradient of o, where there is one.
    """

    tokens: int
    q: Tensor
    q_idx: Tensor | None = None
    k_idx: Tensor | None = None
    gates: Tensor | None = None
    raw_cmp: Pair | None = None
    cmp: Pair | None = None
    slc: Pair | None = None
    win: Pair | None = None
    joint: Pair | None = None
    indices: Tensor | None = None
    counts: Tensor | None = None
    do: Tensor | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    sinks: Mapping[str, Tensor] = field(default_factory=dict)

    def sink(self, branch: str, kv_heads: int) -> Tensor | None:
        """The sink (Hkv, G) of a branch's softmax, None where it has none."""
        sink = self.sinks.get(sink_name(branch))
        return None if sink is None else sink.unflatten(0, (kv_heads, -1))


def sink_name(branch: str) -> str:
    """The argument that is the sink of a branch's softmax."""
    return "sink" if branch == "joint" else f"sink_{branch}"


def mapped(record: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """A dataclass with `change(name, tensor)` in the place of each tensor, those in its tuples and mappings too.

    The name is that of the field, or the key in a mapping.
    """
    changed: dict[str, Any] = {}
    for each in fields(record):
        value = getattr(record, each.name)
        if isinstance(value, Tensor):
            changed[each.name] = change(each.name, value)
        elif isinstance(value, tuple):
            changed[each.name] = tuple(change(each.name, x) for x in value)
        elif isinstance(value, Mapping):
            changed[each.name] = {name: change(name, x) for name, x in value.items()}
    return replace(record, **changed)


# Sections 6 and 7: the operator


def gate_values(p: OracleParameters, gates: Tensor | None, like: Tensor) -> list[Tensor]:
    """One exact gate (R, Hq, 1) a branch, of gates (R, Hq, branches)."""
    exact = exact_dtype(like.dtype)
    if p.gate == "none" or gates is None:
        return [torch.ones(1, device=like.device, dtype=exact)] * len(p.branches)
    values = gates.to(exact)
    if p.gate == "sigmoid":
        values = torch.sigmoid(values)
    return [values[..., i, None] for i in range(len(p.branches))]


def branch_mask(p: OracleParameters, s: Sequence, branch: str, t: Tensor, indices: Tensor | None) -> Tensor:
    """The dense mask (H or 1, G or 1, R, keys) of one branch for queries at positions t (R,)."""
    if branch == "cmp":
        assert s.cmp is not None
        return visible_compressed(p, t, s.cmp[0].shape[0])
    if branch == "win":
        return visible_window(p, t, s.tokens)
    assert indices is not None
    selected = visible_selected(p, t, s.tokens, indices, s.counts)
    return selected | visible_window(p, t, s.tokens) if branch == "joint" else selected


def take_rows(p: OracleParameters, s: Sequence, start: int, stop: int) -> Sequence:
    """Query rows start..stop of a sequence and the keys up to the last one's position (queries align to the end)."""
    tokens = s.tokens - s.q.shape[0] + stop
    kept = {
        **dict.fromkeys(BY_TOKEN, slice(start, stop)),
        **dict.fromkeys((*RAW_BRANCHES, *BY_KEY), slice(tokens)),
        "cmp": slice(p.compressed_blocks(tokens)),
    }
    part = replace(s, tokens=tokens, raw_cmp=None, learned={})
    return mapped(part, lambda name, x: x[kept[name]] if name in kept else x)


def attend_rows(p: OracleParameters, s: Sequence) -> OracleResult:
    """All branches and their combination for one sequence whose K_cmp, V_cmp are known. Shapes lack the batch."""
    rows = s.q.shape[0]
    t = torch.arange(s.tokens - rows, s.tokens, device=s.q.device)
    q = s.q.reshape(rows, p.kv_heads, p.group, p.head_dim_qk).permute(1, 2, 0, 3)
    found: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    if s.indices is not None:
        found["indices"] = s.indices
        if s.counts is not None:
            found["counts"] = s.counts

    for branch in p.branches:  # compression comes first: selection may need its importance
        if branch == p.selecting and p.computed and (p.scores == "mean" or s.q_idx is not None):
            blocks = p.selection_blocks(s.tokens)
            if s.q_idx is not None and s.k_idx is not None:
                scored = index_scores(p, s.q_idx, s.k_idx, t, blocks)
            else:
                scored = mean_scores(p, q, getattr(s, branch)[0], blocks)
            found["importance"], found["magnitude"], found["fingerprint"] = scored
            if s.indices is None:
                found["indices"], found["counts"] = select_blocks(p, found["importance"], t)
        if branch == p.selecting and p.scorer_alone and s.cmp is not None:
            keys, nothing = s.cmp[0].transpose(0, 1), s.cmp[1].transpose(0, 1)
            visible = visible_compressed(p, t, keys.shape[1])
            found |= _chosen(p, s, t, attend(q, keys, nothing, visible, p.scale, p.tf32)[2])
        mask = branch_mask(p, s, branch, t, found.get("indices"))
        pair = getattr(s, branch)
        k, v = pair[0].transpose(0, 1), pair[1].transpose(0, 1)
        o, lse, probabilities = attend(q, k, v, mask, p.scale, p.tf32, s.sink(branch, p.kv_heads))
        found[f"o_{branch}"] = o.permute(2, 0, 1, 3).reshape(rows, p.query_heads, p.head_dim_v)
        found[f"lse_{branch}"] = lse.permute(2, 0, 1).reshape(rows, p.query_heads)
        outputs.append(found[f"o_{branch}"])
        if branch == "cmp" and p.computed and p.scores == "compression":
            found |= _chosen(p, s, t, probabilities)
    gates = gate_values(p, s.gates, s.q)
    o = sum(gate * output.to(gate.dtype) for gate, output in zip(gates, outputs, strict=True))
    assert isinstance(o, Tensor)
    return OracleResult(o=o.to(s.q.dtype), **found)


def _chosen(p: OracleParameters, s: Sequence, t: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
    """What compressed probabilities (H, G, R, Nc) say of the blocks, and which are chosen if the caller chose none."""
    blocks = p.selection_blocks(s.tokens)
    importance = block_importance(p, probabilities, blocks)
    found = {"importance": importance, "fingerprint": block_fingerprint(p, probabilities, blocks)}
    if s.indices is None:
        found["indices"], found["counts"] = select_blocks(p, importance, t)
    return found


def row_chunks(p: OracleParameters, s: Sequence, score_bytes: int) -> Iterator[tuple[int, int]]:
    """Bounds of chunks of query rows whose scores need at most `score_bytes`; one chunk of none without rows."""
    rows, itemsize = s.q.shape[0], torch.finfo(exact_dtype(s.q.dtype)).bits // 8
    chunk = max(1, score_bytes // max(1, p.query_heads * s.tokens * itemsize))
    for start in range(0, max(rows, 1), chunk):
        yield start, min(start + chunk, rows)


def attend_sequence(p: OracleParameters, s: Sequence, score_bytes: int) -> OracleResult:
    """`attend_rows` over chunks of query rows, so that one score matrix stays below `score_bytes`."""
    blocks = p.selection_blocks(s.tokens)
    parts: dict[str, list[Tensor]] = {}
    for start, stop in row_chunks(p, s, score_bytes):
        part = attend_rows(p, take_rows(p, s, start, stop))
        for name, value in part.tensors().items():
            if name in BY_BLOCK:
                value = functional.pad(value, (0, blocks - value.shape[-1]))
            parts.setdefault(name, []).append(value)
    return OracleResult(**{name: torch.cat(values) for name, values in parts.items()})


def learned_parameters(compression: Any) -> dict[str, Tensor]:
    """phi's parameters as a mapping: from a mapping, a NamedTuple (a package's CompressionParameters) or None."""
    if compression is None:
        return {}
    named = compression if isinstance(compression, Mapping) else compression._asdict()
    return {name: value for name, value in named.items() if value is not None}


def _required(name: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"{name}: expected a tensor for this spec, got None; pass it")
    return value


def argument_suffixes(p: OracleParameters) -> dict[str, str]:
    """For each branch that reads raw K and V, the suffix of its arguments: "" for k and v, "_win" for k_win, v_win."""
    readers = [name for name in p.branches if not (name == "cmp" and p.external)]
    return {name: "" if p.shared_kv or i == 0 else f"_{name}" for i, name in enumerate(readers)}


def branch_pairs(p: OracleParameters, tensors: Mapping[str, Tensor | None]) -> dict[str, tuple[Tensor, Tensor]]:
    """The raw (K, V) of each branch that reads them, of the operator's arguments by name.

    Compressed keys that only choose blocks are those of the selection; their values have no columns.
    """
    pairs = {
        name: (
            _required(f"k{suffix}", tensors.get(f"k{suffix}")),
            _required(f"v{suffix}", tensors.get(f"v{suffix}")),
        )
        for name, suffix in argument_suffixes(p).items()
    }
    if p.scorer_alone and not p.external:
        k, v = pairs[p.selecting]
        pairs["cmp"] = (k, v[..., :0])
    return pairs


def split_sequences(
    p: OracleParameters,
    tensors: Mapping[str, Tensor | None],
    cu_seqlens: Tensor | None,
    learned: Mapping[str, Tensor] | None = None,
) -> list[Sequence]:
    """The sequences of a call, as views of its arguments (so that writing to a view writes to the argument)."""
    q = _required("q", tensors.get("q"))
    pairs = branch_pairs(p, tensors)
    names = ("k_cmp", "v_cmp") if p.compression_output else ("k_cmp",)
    external = [_required(name, tensors.get(name)) for name in names] if p.external else []
    packed = cu_seqlens is not None
    found = []
    bounds = cu_seqlens.tolist() if packed else [0] * (q.shape[0] + 1)
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        where: Any = slice(start, stop) if packed else i
        mine = {name: x[where] for name in (*BY_TOKEN, *BY_KEY) if (x := tensors.get(name)) is not None}
        raw = {name: (k[where], v[where]) for name, (k, v) in pairs.items()}
        tokens = next(iter(raw.values()))[0].shape[0] if raw else mine["q"].shape[0]
        cmp = None
        if external:
            blocks, first = p.compressed_blocks(tokens), start // (p.compression_stride or 1)
            k_cmp, *values = ((x if packed else x[i])[first : first + blocks] for x in external)
            v_cmp = values[0] if values else k_cmp[..., :0]
            if k_cmp.shape[0] < blocks or v_cmp.shape[0] < blocks:
                raise ValueError(
                    f"k_cmp, v_cmp: expected {blocks} blocks for a sequence of {tokens} tokens, "
                    f"got {k_cmp.shape[0]} and {v_cmp.shape[0]}"
                )
            cmp = k_cmp, v_cmp
        found.append(
            Sequence(
                tokens=tokens,
                raw_cmp=raw.get("cmp"),
                cmp=cmp,
                **{name: raw[name] for name in RAW_BRANCHES if name in raw},
                sinks={name: x for name in SINKS if (x := tensors.get(name)) is not None},
                learned=learned or {},
                **mine,
            )
        )
    return found


def compressed_rows(p: OracleParameters, cu_seqlens: Tensor) -> Tensor:
    """Where the compressed blocks of a packed call lie: one row number a block, sequence after sequence (int64)."""
    bounds = cu_seqlens.tolist()
    stride = p.compression_stride or 1
    rows = [
        torch.arange(p.compressed_blocks(stop - start)) + start // stride for start, stop in itertools.pairwise(bounds)
    ]
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)


def _gather(p: OracleParameters, results: list[OracleResult], cu_seqlens: Tensor | None, total: int) -> OracleResult:
    """Put sequences' results together: stacked, or one after the other (compressed blocks in their packed rows)."""
    parts = [result.tensors() for result in results]
    joined: dict[str, Tensor] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if cu_seqlens is None:
            joined[name] = torch.stack(values)
        elif name in ("k_cmp", "v_cmp"):
            blocks = torch.cat(values)
            packed = blocks.new_zeros(total // (p.compression_stride or 1), *blocks.shape[1:])
            joined[name] = packed.index_copy(0, compressed_rows(p, cu_seqlens).to(blocks.device), blocks)
        else:
            if name in BY_BLOCK:
                widest = max(value.shape[-1] for value in values)
                values = [functional.pad(value, (0, widest - value.shape[-1])) for value in values]
            rows = torch.cat(values)
            behind = rows.new_full((total - rows.shape[0], *rows.shape[1:]), padding_value(name))
            joined[name] = torch.cat((rows, behind))
    return OracleResult(**joined)


def padding_value(name: str) -> float:
    """What rows behind the last packed sequence hold of an output or gradient: that of a query that sees nothing."""
    return {"lse": -math.inf, "indices": -1}.get(name.partition("_")[0], 0)


def reference_attention(
    parameters: OracleParameters,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    gates: Tensor | None = None,
    *,
    compression: Any = None,
    k_slc: Tensor | None = None,
    v_slc: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    q_idx: Tensor | None = None,
    k_idx: Tensor | None = None,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    sink_slc: Tensor | None = None,
    sink_win: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    score_bytes: int = SCORE_BYTES,
) -> OracleResult:
    """The operator of a spec, densely, with the arguments of a generated package's `nsa_attention`.

    Shapes: q (B, Tq, Hq, Dk), k (B, Tkv, Hkv, Dk), v (B, Tkv, Hkv, Dv), gates (B, Tq, Hq, branches) with Tq <= Tkv
    and queries aligned to the end of the keys; packed (T_total, H, D) with cu_seqlens int32 (N + 1,), where rows after
    the last sequence are padding. `compression` is phi's parameters, a mapping or a NamedTuple. If the
    spec selects blocks, `indices` (B, Tq, Hkv, n) int32 and `counts` (B, Tq, Hkv) int32 replace the oracle's selection
    for comparisons on equal indices; importance is still computed. `q_idx` (B, Tq, S, Di) and `k_idx` (B, Tkv, 1, Di)
    belong to an indexer; both may be left out if `indices` is given. `sink_slc`, `sink_win` and, for joint branches,
    `sink` are the branches' sinks (Hq,). Query rows are processed in chunks whose scores need at most `score_bytes`.

    Differentiable by autograd in q, k, v, gates, the branches' K and V, k_cmp, v_cmp, the sinks and phi's parameters.
    Raises ValueError if an argument that the spec needs is None.
    """
    tensors = {
        "q": q, "k": k, "v": v, "gates": gates, "k_slc": k_slc, "v_slc": v_slc, "k_win": k_win, "v_win": v_win,
        "k_cmp": k_cmp, "v_cmp": v_cmp, "q_idx": q_idx, "k_idx": k_idx, "indices": indices, "counts": counts,
        "sink_slc": sink_slc, "sink_win": sink_win, "sink": sink,
    }  # fmt: skip
    learned = learned_parameters(compression)
    if parameters.gate != "none":
        _required("gates", gates)
    if parameters.indices_given:
        _required("indices", indices)
    if parameters.index_dim and (indices is None or q_idx is not None or k_idx is not None):
        _required("q_idx", q_idx)
        _required("k_idx", k_idx)
    for branch in parameters.sinks:
        _required(sink_name(branch), tensors[sink_name(branch)])
    sequences = split_sequences(parameters, tensors, cu_seqlens, learned)
    nothing = not sequences
    if nothing:  # shapes are those of one sequence of zeros, of which no row is kept
        zeros = {n: x if x is None or n in SINKS else x.new_zeros(1, *x.shape[1:]) for n, x in tensors.items()}
        sequences = split_sequences(parameters, zeros, None if cu_seqlens is None else torch.tensor([0, 0]), learned)
    results = []
    for sequence in sequences:
        if sequence.raw_cmp is not None:
            sequence = replace(sequence, cmp=compress(parameters, *sequence.raw_cmp, learned))
        result = attend_sequence(parameters, sequence, score_bytes)
        if sequence.cmp is not None and parameters.compression_output:
            result = replace(result, k_cmp=sequence.cmp[0], v_cmp=sequence.cmp[1])
        results.append(result)
    if nothing and cu_seqlens is not None:
        cu_seqlens = torch.tensor([0, 0])
    result = _gather(parameters, results, cu_seqlens, q.shape[0])
    if nothing and cu_seqlens is None:
        result = OracleResult(**{name: value[:0] for name, value in result.tensors().items()})
    return result
