"""The indexer's loss, densely and by autograd: how far its softmax is from attention to a query's selected tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsa_gen.verification.reference.dense import OracleParameters, attend, exact_dtype, over_scope, visible_selected
from nsa_gen.verification.reference.inputs import Inputs
from nsa_gen.verification.reference.oracle import Sequence, branch_mask, split_sequences


def reference_alignment(p: OracleParameters, inputs: Inputs, indices: Tensor, counts: Tensor | None = None) -> Tensor:
    """The loss of each sequence (N,), on the blocks of indices (B, Tq, S, n), in the inputs' exact dtype.

    Of query t and scope s, the teacher T is the mean over the scope's heads of the probabilities of attention at the
    selected, visible tokens, over its sum, and the student S is the softmax of q_idx . k_idx over these tokens. A
    sequence's loss is the mean over t of the sum over s of KL(T || S); it is 0 of no query, and a query that sees none
    of its tokens adds nothing. Differentiable in q_idx and k_idx alone.
    """
    tensors = {**inputs.arguments(), "indices": indices, "counts": counts}
    found = [_of_sequence(p, each) for each in split_sequences(p, tensors, inputs.cu_seqlens)]
    return torch.stack(found) if found else inputs.q.new_zeros(0, dtype=exact_dtype(inputs.q.dtype))


def _of_sequence(p: OracleParameters, s: Sequence) -> Tensor:
    assert s.q_idx is not None and s.k_idx is not None and s.indices is not None
    rows, exact = s.q.shape[0], exact_dtype(s.q.dtype)
    t = torch.arange(s.tokens - rows, s.tokens, device=s.q.device)
    q = s.q.detach().reshape(rows, p.kv_heads, p.group, p.head_dim_qk).permute(1, 2, 0, 3)
    k, v = (x.detach().transpose(0, 1) for x in getattr(s, p.selecting))
    mask = branch_mask(p, s, p.selecting, t, s.indices)
    _, _, probabilities = attend(q, k, v[..., :0], mask, p.scale, p.tf32, s.sink(p.selecting, p.kv_heads))
    selected = visible_selected(p, t, s.tokens, s.indices, s.counts).expand(p.kv_heads, p.group, -1, -1)
    seen = over_scope(p, selected.int()) > 0  # (S, R, tokens); the heads of a scope see the same
    weights = over_scope(p, probabilities.detach() * selected)
    mass = weights.sum(-1, keepdim=True)
    empty = mass == 0
    teacher = weights / mass.masked_fill(empty, 1.0)
    scores = torch.einsum("rsd,id->sri", s.q_idx.to(exact), s.k_idx[:, 0].to(exact))
    # Rows without a token are taken out before the softmax: the gradient of one over nothing is NaN.
    student = scores.masked_fill(~seen, -math.inf).masked_fill(empty, 0.0).log_softmax(-1)
    used = teacher > 0
    terms = teacher * (teacher.masked_fill(~used, 1.0).log() - student.masked_fill(~used, 0.0))
    return terms.sum() / max(rows, 1)
