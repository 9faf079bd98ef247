"""The indexer's loss, computed densely and with autograd: the distance of its softmax from attention.

Also its gradients, and the noise and drift of all (docs/tolerances.md), computed by chunks of query rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nsa_gen.verification.reference.dense import OracleParameters, attend, exact_dtype, over_scope, visible_selected
from nsa_gen.verification.reference.inputs import Inputs
from nsa_gen.verification.reference.oracle import Sequence, branch_mask, mapped, row_chunks, split_sequences, take_rows
from nsa_gen.verification.reference.rounding import LEAST, ROUNDOFF, chain
from nsa_gen.verification.reference.tolerance import HARDWARE_UNITS

LOSS = "alignment_loss"
LEARNED = ("q_idx", "k_idx")
"""The arguments in which the loss is differentiable."""


def reference_alignment(p: OracleParameters, inputs: Inputs, indices: Tensor, counts: Tensor | None = None) -> Tensor:
    """The loss of each sequence (N,), on the blocks of indices (B, Tq, S, n), in the inputs' exact dtype.

    For query t and scope s, the teacher T is the mean over the scope's heads of the attention probabilities at the
    selected, visible tokens, normalised to sum 1. The student S is the softmax of q_idx . k_idx over these tokens. A
    sequence's loss is the mean over t of the sum over s of KL(T || S). Without queries it is 0, and a query that sees
    none of its tokens adds nothing. Differentiable only in q_idx and k_idx.
    """
    tensors = {**inputs.arguments(), "indices": indices, "counts": counts}
    found = [
        _token_losses(p, each).sum() / max(each.q.shape[0], 1)
        for each in split_sequences(p, tensors, inputs.cu_seqlens)
    ]
    return torch.stack(found) if found else inputs.q.new_zeros(0, dtype=exact_dtype(inputs.q.dtype))


@dataclass(frozen=True)
class _Teacher:
    """Attention of some query rows to all tokens, and to the selected ones.

    `probabilities` (H, G, R, K), `lse` (H, G, R, 1), `selected` like the former, `seen` (S, R, K); `weights` (S, R, K)
    are the sums of the scopes' selected probabilities and `mass` (S, R, 1) theirs, 1 where that is 0 (`empty`).
    """

    probabilities: Tensor
    lse: Tensor
    selected: Tensor
    seen: Tensor
    weights: Tensor
    mass: Tensor
    empty: Tensor


def _teacher(p: OracleParameters, s: Sequence, *, finite: bool = False) -> _Teacher:
    """Attention of a sequence's rows. With `finite`, keys that are not finite become 0 and reach no row."""
    assert s.indices is not None
    rows = s.q.shape[0]
    t = torch.arange(s.tokens - rows, s.tokens, device=s.q.device)
    q = s.q.detach().reshape(rows, p.kv_heads, p.group, p.head_dim_qk).permute(1, 2, 0, 3)
    k, v = (x.detach().transpose(0, 1) for x in getattr(s, p.selecting))
    k = _finite(k) if finite else k
    mask = branch_mask(p, s, p.selecting, t, s.indices)
    _, lse, probabilities = attend(q, k, v[..., :0], mask, p.scale, p.tf32, s.sink(p.selecting, p.kv_heads))
    selected = visible_selected(p, t, s.tokens, s.indices, s.counts).expand(p.kv_heads, p.group, -1, -1)
    seen = over_scope(p, selected.int()) > 0  # the heads of a scope see the same
    weights = over_scope(p, (probabilities * selected).detach())
    mass = weights.sum(-1, keepdim=True)
    empty = mass == 0
    return _Teacher(probabilities, lse[..., None], selected, seen, weights, mass.masked_fill(empty, 1.0), empty)


def _token_losses(p: OracleParameters, s: Sequence) -> Tensor:
    """KL(T || S) of each scope and query (S, R)."""
    assert s.q_idx is not None and s.k_idx is not None
    exact, a = exact_dtype(s.q.dtype), _teacher(p, s)
    teacher = a.weights / a.mass
    scores = torch.einsum("rsd,id->sri", s.q_idx.to(exact), s.k_idx[:, 0].to(exact))
    # Rows without a token are removed before the softmax: the gradient of a softmax over nothing is NaN.
    student = scores.masked_fill(~a.seen, -math.inf).masked_fill(a.empty, 0.0).log_softmax(-1)
    used = teacher > 0
    terms = teacher * (teacher.masked_fill(~used, 1.0).log() - student.masked_fill(~used, 0.0))
    return terms.sum(-1)


@dataclass(frozen=True)
class Aligned:
    """The loss and its gradients by the names of results, and the squares of their noise and drift, likewise."""

    values: dict[str, Tensor]
    noise: dict[str, Tensor]
    drift: dict[str, Tensor]


def aligned(
    p: OracleParameters,
    inputs: Inputs,
    indices: Tensor,
    counts: Tensor | None,
    *,
    with_gradients: bool,
    noise_unit: float | None,
    chunk_bytes: int,
) -> Aligned:
    """The loss (N,) and its gradients for inputs.dloss; with `noise_unit`, also squared noise and drift.

    Noise is in units of `noise_unit`, drift in units of float32's roundoff. Without gradients, both are the loss's.
    """
    exact = exact_dtype(inputs.q.dtype)
    assert inputs.q_idx is not None and inputs.k_idx is not None
    tensors = {**inputs.arguments(), "indices": indices, "counts": counts}
    sequences = split_sequences(p, tensors, inputs.cu_seqlens)
    cotangents = inputs.dloss if inputs.dloss is not None else inputs.q.new_zeros(len(sequences), dtype=exact)
    shapes = {LOSS: cotangents, "dq_idx": inputs.q_idx, "dk_idx": inputs.k_idx}
    sums, noise, drift, squares = (
        {name: torch.zeros_like(x, dtype=exact) for name, x in shapes.items()} for _ in range(4)
    )
    # For each key, the number of products that its gradient sums.
    terms = torch.zeros_like(inputs.k_idx[..., :1], dtype=exact)
    parts = (_by_sequence(inputs, each) for each in (sums, noise, drift, squares, {"dk_idx": terms}))
    for s, cotangent, *here, counted in zip(sequences, cotangents, *parts, strict=True):
        rows = s.q.shape[0]
        weight = cotangent.to(exact) / max(rows, 1)
        for start, stop in row_chunks(p, s, chunk_bytes) if rows else ():
            chunk = take_rows(p, s, start, stop)
            cut = [_cut(each, start, stop, chunk.tokens) for each in here]
            _add_values(p, chunk, weight, cut[0], with_gradients)
            if noise_unit is not None:
                _add_rounding(p, chunk, weight, noise_unit, *cut[1:], counted["dk_idx"][: chunk.tokens])
        total, noise_of, drift_of, squares_of = (each[LOSS] for each in here)
        drift_of.add_(chain(float(rows * p.scopes), total.square(), squares_of))
        for x, power in ((total, 1), (noise_of, 2), (drift_of, 2)):
            x.div_(max(rows, 1) ** power)
    drift["dk_idx"] += chain(terms, sums["dk_idx"].square(), squares["dk_idx"])
    dtypes = {LOSS: exact, "dq_idx": inputs.q_idx.dtype, "dk_idx": inputs.k_idx.dtype}
    kept = shapes if with_gradients else (LOSS,)
    values = {name: sums[name].to(dtypes[name]) for name in kept}
    return Aligned(values, {name: noise[name] for name in kept}, {name: drift[name] for name in kept})


def _by_sequence(inputs: Inputs, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Views of results, one mapping per sequence."""
    if inputs.cu_seqlens is None:
        return [{name: x[i] for name, x in tensors.items()} for i in range(inputs.q.shape[0])]
    return [
        {name: x[i] if name == LOSS else x[start:stop] for name, x in tensors.items()}
        for i, (start, stop) in enumerate(pairwise(inputs.cu_seqlens.tolist()))
    ]


def _cut(results: Mapping[str, Tensor], start: int, stop: int, tokens: int) -> dict[str, Tensor]:
    """Views of the part of a sequence's results to which query rows start..stop, which see `tokens` keys, add."""
    loss, dq, dk = (results[name] for name in (LOSS, "dq_idx", "dk_idx"))
    return {LOSS: loss, "dq_idx": dq[start:stop], "dk_idx": dk[:tokens]}


def _add_values(
    p: OracleParameters, s: Sequence, weight: Tensor, sums: Mapping[str, Tensor], with_gradients: bool
) -> None:
    """Add the losses of a chunk of rows, and the gradients of their sum times `weight`."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, x: Tensor) -> Tensor:
        if name in LEARNED:
            x = leaves[name] = x.detach().requires_grad_(with_gradients)
        return x

    with torch.set_grad_enabled(with_gradients):
        loss = _token_losses(p, mapped(s, leaf)).sum()
    sums[LOSS].add_(loss.detach())
    if with_gradients:
        for name, found in zip(LEARNED, torch.autograd.grad(loss, [leaves[x] for x in LEARNED], weight), strict=True):
            sums[f"d{name}"].add_(found)


def _finite(x: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x), x, 0.0)


def _add_rounding(
    p: OracleParameters,
    s: Sequence,
    weight: Tensor,
    unit: float,
    noise: Mapping[str, Tensor],
    drift: Mapping[str, Tensor],
    squares: Mapping[str, Tensor],
    terms: Tensor,
) -> None:
    """Add the squares of the noise and drift of a chunk of rows; the loss's are those of the sum over the rows.

    Softmaxes and their difference dI = S - T are disturbed like P and dS: by errors of single weights, and by errors of
    a whole row, which are the sum in the denominator and a head's lse.
    """
    assert s.q_idx is not None and s.k_idx is not None
    a = _teacher(p, s, finite=True)
    rows = s.q.shape[0]
    q = s.q.reshape(rows, p.kv_heads, p.group, p.head_dim_qk).permute(1, 2, 0, 3)
    k = _finite(getattr(s, p.selecting)[0].transpose(0, 1))[:, None]  # (H, 1, K, Dk)
    q_idx, k_idx = s.q_idx.transpose(0, 1), _finite(s.k_idx[:, 0])  # (S, R, Di), (K, Di)
    q2, k2, qi2, ki2 = q.square(), k.square(), q_idx.square(), k_idx.square()
    lse = _finite(a.lse)

    def by_head(x: Tensor) -> Tensor:
        """A scope's (S, R, ...) repeated for each of its heads (H, G, R, ...)."""
        return x.repeat_interleave(p.query_heads // p.scopes, 0).unflatten(0, (p.kv_heads, p.group))

    scores = q @ k.transpose(-1, -2)
    share = a.probabilities * a.selected / by_head(a.mass)
    share2 = share.square()
    teacher = a.weights / a.mass
    index = q_idx @ k_idx.T
    hidden = ~a.seen | a.empty
    masked = index.masked_fill(~a.seen, -math.inf).masked_fill(a.empty, 0.0)
    log_student, index_lse = masked.log_softmax(-1), masked.logsumexp(-1, keepdim=True).masked_fill(a.empty, 0.0)
    student = log_student.exp().masked_fill(hidden, 0.0)
    index, di = index.masked_fill(hidden, 0.0), student - teacher
    s2, t2, di2 = student.square(), teacher.square(), (student - teacher).square()
    keys = a.seen.sum(-1, keepdim=True).to(q.dtype)
    size, index_size = (scores * p.scale).abs() + lse.abs(), index.abs() + index_lse.abs()
    used = teacher > 0
    log_weight = torch.where(used, a.weights.masked_fill(~used, 1.0).log(), 0.0)
    log_mass = a.mass.log()
    ratio = torch.where(used, log_weight - log_mass - log_student.masked_fill(hidden, 0.0), 0.0)
    loss = (teacher * ratio).sum(-1, keepdim=True)
    away2 = (ratio - loss).square()  # the loss moves by (ratio - loss) dT
    quotient = (teacher * (log_weight - index)).sum(-1, keepdim=True)

    # Noise. The loss is computed in float32 whatever the dtype. Its gradients' terms are rounded to the dtype.
    fine = ROUNDOFF / unit
    loss_unit = min(1.0, HARDWARE_UNITS[torch.float32] * fine)
    moved = (over_scope(p, share2 * (1 + size).square()) * away2).sum(-1, keepdim=True)
    # The argument of a logarithm is rounded too, which is an absolute error of the logarithm.
    moved += (t2 * ((1 + log_weight.abs()).square() + index.square()) + di2 * index.square()).sum(-1, keepdim=True)
    moved += quotient.square() + (1 + log_mass.abs()).square() + (1 + index_lse.abs()).square()
    noise[LOSS].add_(loss_unit**2 * moved.masked_fill(a.empty, 0.0).sum())
    n_teacher, n_student = over_scope(p, share2 * (1 + (fine * size).square())), s2 * (1 + (fine * index_size).square())
    whole_t, whole_s = n_teacher.sum(-1, keepdim=True), n_student.sum(-1, keepdim=True)
    pulled_t, pulled_s = (teacher @ k_idx).square(), (student @ k_idx).square()
    dq = (n_teacher + n_student) @ ki2 + whole_t * pulled_t + whole_s * pulled_s
    by_key = n_teacher + n_student + whole_t * t2 + whole_s * s2
    weight2 = weight.square()
    noise["dq_idx"].add_((weight2 * dq).transpose(0, 1))
    noise["dk_idx"][:, 0].add_(weight2 * (by_key.flatten(0, 1).T @ qi2.flatten(0, 1)))

    # Drift: of logits, lse and index scores, to first order, and of the sums over keys.
    of_logits = p.scale**2 * chain(p.head_dim_qk, scores.square(), q2 @ k2.transpose(-1, -2))
    of_lse = (a.probabilities.square() * of_logits).sum(-1, keepdim=True) + 2 / 3 * lse.square()
    of_index = chain(p.index_dim, index.square(), qi2 @ ki2.T)
    # exp2 gives 0 for what lies below float32's normal numbers: all of such a probability may be lost.
    lost = torch.where(a.probabilities < LEAST, share2 / ROUNDOFF**2, 0.0)
    v_teacher, v_student = over_scope(p, share2 * of_logits + lost), s2 * of_index
    heads = p.query_heads // p.scopes
    one = torch.ones_like(loss)
    sum_t = chain(heads * keys, one, over_scope(p, share2).sum(-1, keepdim=True))
    sum_s = chain(keys, one, s2.sum(-1, keepdim=True))
    whole_t = sum_t + v_teacher.sum(-1, keepdim=True)
    whole_t = whole_t + over_scope(p, share.sum(-1, keepdim=True).square() * of_lse)
    whole_s = sum_s + v_student.sum(-1, keepdim=True)
    rounded_lse = 2 / 3 * index_lse.square()  # for index keys alone: index queries have S from its own sum
    gone = torch.where((a.mass < LEAST) & ~a.empty, ROUNDOFF**-2, 0.0)  # a row whose weights may all be lost

    moved = (v_teacher * away2).sum(-1, keepdim=True) + (di2 * of_index).sum(-1, keepdim=True)
    moved += over_scope(p, (share * by_head(ratio - loss)).sum(-1, keepdim=True).square() * of_lse)
    moved += sum_t * (quotient + 1).square() + sum_s + gone * loss.square()
    for factor in (log_weight, index):
        product = teacher * factor
        moved += chain(keys, product.sum(-1, keepdim=True).square(), product.square().sum(-1, keepdim=True))
    drift[LOSS].add_(moved.masked_fill(a.empty, 0.0).sum())
    squares[LOSS].add_(loss.square().sum())
    dq = (v_teacher + v_student) @ ki2 + whole_t * pulled_t + whole_s * pulled_s
    dq += over_scope(p, (share @ k_idx).square() * of_lse) + gone * (di @ k_idx).square()
    dq += chain(keys, pulled_t, t2 @ ki2) + chain(keys, pulled_s, s2 @ ki2)
    by_key = v_teacher + v_student + over_scope(p, share2 * of_lse)
    by_key += whole_t * t2 + (whole_s + rounded_lse) * s2 + gone * di2
    drift["dq_idx"].add_((weight2 * dq).transpose(0, 1))
    drift["dk_idx"][:, 0].add_(weight2 * (by_key.flatten(0, 1).T @ qi2.flatten(0, 1)))
    # S q and T q enter the sum, where all heads choose together those of each KV head.
    squares["dk_idx"][:, 0].add_(weight2 * ((s2 + t2).flatten(0, 1).T @ qi2.flatten(0, 1)))
    lists = p.kv_heads if p.scope == "all" else 1
    terms[:, 0].add_(lists * (~hidden).sum((0, 1)).to(terms.dtype)[:, None])
