"""Drift: how far sums in float32 wander from their values, one term after the other, and where that leads.

A kernel adds N products to an accumulator one by one, and rounds after each. `chain` has the variance of that random
walk; the rest sends it on, to first order: from K_cmp and V_cmp to the logits, from logits to probabilities, outputs,
dS and the gradients, and through phi both ways. All variances are in units of float32's roundoff squared, since every
kernel accumulates in float32 whatever the dtype of its inputs. docs/tolerances.md has the derivation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_gen.verification.dense import OracleParameters, attend, gelu
from nsa_gen.verification.oracle import Sequence, branch_mask, gate_values

Pair = tuple[Tensor, Tensor]
ROUNDOFF = 2.0**-24
"""Float32's: the unit of every variance here."""
LEAST = 2.0**-126
"""The least of float32's normal numbers."""


def chain(length: Tensor | float, total_squared: Tensor, squares: Tensor) -> Tensor:
    """The variance of a sum of `length` products whose value is `total` and whose squared products sum to `squares`.

    Partial sum i of N has the expected square (i/N)^2 total^2 + (i/N)(1 - i/N) squares when the order of the terms is
    arbitrary; rounding it has the variance 1/3 of its square. Summed over i: N (total^2 / 9 + squares / 18).
    """
    return length * (total_squared / 9 + squares / 18)


@dataclass(frozen=True)
class Sums:
    """Running sums over query rows of one branch's dK (K, Dk) and dV (K, Dv): value, squared products, terms (K, 1)."""

    totals: Pair
    squares: Pair
    terms: Tensor

    @classmethod
    def like(cls, pair: Pair) -> Sums:
        """Zeros for the (K, 1, D) keys and values of one KV head."""

        def zeros() -> Pair:
            return torch.zeros_like(pair[0][:, 0]), torch.zeros_like(pair[1][:, 0])

        return cls(zeros(), zeros(), torch.zeros_like(pair[0][:, 0, :1]))

    def finish(self, variances: Pair) -> None:
        """Add the variance of the sums over all rows to the views `variances`, both (K, 1, D)."""
        for target, total, squares in zip(variances, self.totals, self.squares, strict=True):
            target[:, 0].add_(chain(self.terms, total.square(), squares))


def add_rows(
    p: OracleParameters,
    s: Sequence,
    compressed: Pair | None,
    variances: Sequence | None,
    sums: Mapping[str, Sums],
    sums_of_squares: Sequence,
    do: Tensor,
    outputs: Mapping[str, Tensor],
) -> None:
    """Add the variances of one KV head's rows to the views `outputs` (o, o_x, lse_x) and `variances` (gradients).

    `p` has one KV head; s.q (R, G, Dk), do (R, G, Dv). `compressed` has the variances of K_cmp and V_cmp (Nc, 1, D),
    None where the caller gave them. What a key's gradient sums over query rows goes to `sums`, to be finished when
    all rows are in, and the squared terms of a sink's gradient to the sink of `sums_of_squares`.
    """
    rows = s.q.shape[0]
    t = torch.arange(s.tokens - rows, s.tokens, device=s.q.device)
    q, do = s.q.permute(1, 0, 2), do.permute(1, 0, 2)  # (G, R, D)
    q_squared, do_squared = q.square(), do.square()
    gates = [g.expand(rows, p.query_heads, 1).permute(1, 0, 2) for g in gate_values(p, s.gates, s.q)]
    for number, branch in enumerate(p.branches):
        k, v = (torch.where(torch.isfinite(x[:, 0]), x[:, 0], 0.0) for x in getattr(s, branch))
        off = compressed if branch == "cmp" else None
        mask = branch_mask(p, s, branch, t, s.indices)
        sink = s.sink(branch, 1)
        found, normaliser, weights = attend(q[None], k[None], v[None], mask, p.scale, sink=sink)
        o, weights = found[0], weights[0]  # (G, R, Dv), (G, R, K)
        keys = mask[0].sum(-1)[:, None].to(q.dtype)  # (R, 1)
        chances, v_squared = weights.square(), v.square()

        score = chain(p.head_dim_qk, (q @ k.T).square_(), q_squared @ k.square().T)
        if off is not None:
            score += q_squared @ off[0][: k.shape[0], 0].T
        score *= p.scale**2
        moved = chances * score
        lse = moved.sum(-1, keepdim=True)
        own = chain(keys, o.square(), chances @ v_squared)  # of o, for given probabilities
        if off is not None:
            own += chances @ off[1][: k.shape[0], 0]
        spread = moved @ v_squared - 2 * o * (moved @ v) + o.square() * lse  # sum of p^2 (v - o)^2 var(score)
        gate = gates[number]
        outputs[f"lse_{branch}"].add_(lse[..., 0].T)
        outputs[f"o_{branch}"].add_((own + spread).permute(1, 0, 2))
        outputs["o"].add_((gate.square() * (own + spread)).permute(1, 0, 2))
        if variances is None:
            continue

        dp = do @ v.T
        delta = (do * o).sum(-1, keepdim=True)
        ds = weights * (dp - delta)  # dS by the gate and the scale
        # exp2 gives 0 for what lies below float32's normal numbers: all of such a probability may be lost.
        lost = torch.where(weights < LEAST, chances / ROUNDOFF**2, 0.0)
        through_scores = ds.square() * score + lost * (dp - delta).square()
        dgate = chain(p.head_dim_v, delta.square(), (do_squared * o.square()).sum(-1, keepdim=True))
        dgate += (do_squared * own).sum(-1, keepdim=True) + through_scores.sum(-1, keepdim=True)  # also that of delta
        if variances.gates is not None:
            slope = (gate * (1 - gate)).square() if p.gate == "sigmoid" else 1.0
            variances.gates[..., number].add_((slope * dgate)[..., 0].T)
        dp_variance = chain(p.head_dim_v, dp.square(), do_squared @ v_squared.T)
        if off is not None:
            dp_variance += do_squared @ off[1][: k.shape[0], 0].T
        factor = (gate * p.scale).square()
        by_key = factor * (chances * dp_variance + through_scores)
        ds *= gate * p.scale
        dq, ds_squared = ds @ k, ds.square()
        # Errors of delta and lse are the same for all keys of a row. lse is rounded when stored and in base 2.
        lse = lse + 2 / 3 * torch.where(torch.isfinite(normaliser[0]), normaliser[0], 0.0).square()[..., None]
        found_q = by_key @ k.square() + factor * dgate * (weights @ k).square() + lse * dq.square()
        found_q += chain(keys, dq.square(), ds_squared @ k.square())
        if off is not None:
            found_q += ds_squared @ off[0][: k.shape[0], 0]
        variances.q.add_(found_q.permute(1, 0, 2))

        targets = variances.sink(branch, 1), sums_of_squares.sink(branch, 1)
        if sink is not None and targets[0] is not None and targets[1] is not None:
            # Terms -P * gate * delta with P = exp(sink - lse).
            held = (sink[0, :, None, None] - normaliser[0][..., None]).exp() * gate
            held = torch.where(sink[0, :, None, None] > -math.inf, held, 0.0)
            terms = (held * delta).square()
            targets[0][0].add_((held.square() * dgate + terms * lse)[..., 0].sum(-1))
            targets[1][0].add_(terms[..., 0].sum(-1))

        target_k, target_v = getattr(variances, branch)
        by_key += factor * chances * dgate + ds_squared * lse
        do_branch = (gate * do).flatten(0, 1)
        flat_q, flat_squares = q.flatten(0, 1), chances.flatten(0, 1)
        target_k[:, 0].add_(by_key.flatten(0, 1).T @ q_squared.flatten(0, 1))
        target_v[:, 0].add_((chances * (score + lse) + lost).flatten(0, 1).T @ do_branch.square())
        here, length = sums[branch], k.shape[0]
        here.totals[0][:length].add_(ds.flatten(0, 1).T @ flat_q)
        here.totals[1][:length].add_(weights.flatten(0, 1).T @ do_branch)
        here.squares[0][:length].add_(ds_squared.flatten(0, 1).T @ flat_q.square())
        here.squares[1][:length].add_(flat_squares.T @ do_branch.square())
        here.terms[:length].add_(p.group * mask[0].sum(0)[:, None])


# phi


def gelu_slopes(x: Tensor) -> Pair:
    """The first and second derivative of the exact GELU."""
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + x * density, density * (2 - x.square())


@dataclass(frozen=True)
class PhiSide:
    """phi of one KV head's keys or values, on the way forward: values, noise scale and drift.

    `blocks` (Nc, l, D) with the position added, `out`, `noise` (squared, in units of the dtype's roundoff) and
    `variance` (drift) (Nc, D); an mlp's `hidden` (Nc, hidden) before GELU and its drift, else None.
    """

    kind: str
    side: str
    blocks: Tensor
    weights: tuple[Tensor, ...]
    out: Tensor
    noise: Tensor
    variance: Tensor
    hidden: Tensor | None = None
    hidden_variance: Tensor | None = None

    def gradients(self, g: Tensor, g_variance: Tensor) -> tuple[Tensor, dict[str, Pair]]:
        """Drift of the gradients for d(out) = g (Nc, D): of the blocks (Nc, l, D), and by parameter its variance before
        the sum over blocks is rounded, and that sum's squared products."""
        shape, flat = self.blocks.shape, self.blocks.flatten(1)
        g_squared, flat_squared = g.square(), flat.square()
        found: dict[str, Pair] = {}
        if self.kind in ("mean", "weighted"):
            weight = self.weights[0][:, None].square()
            found[f"{self.side}_weight"] = (
                (self.blocks.square() * g_variance[:, None]).sum((0, 2)),
                (self.blocks.square() * g_squared[:, None]).sum((0, 2)),
            )
            d_blocks, variance = weight * g_squared[:, None], weight * g_variance[:, None]
        else:
            weight = self.weights[-1]
            last = weight.square().T
            back = g @ weight.T
            back_variance = g_variance @ last + chain(g.shape[1], back.square(), g_squared @ last)
            if self.kind == "linear":
                found[f"{self.side}_weight"] = flat_squared.T @ g_variance, flat_squared.T @ g_squared
            else:
                assert self.hidden is not None and self.hidden_variance is not None
                slope, bend = gelu_slopes(self.hidden)
                active = gelu(self.hidden).square().T
                found[f"{self.side}_weight_out"] = (
                    active @ g_variance + (slope.square() * self.hidden_variance).T @ g_squared,
                    active @ g_squared,
                )
                back_variance = slope.square() * back_variance + (back * bend).square() * self.hidden_variance
                back = back * slope
                found[f"{self.side}_weight_in"] = flat_squared.T @ back_variance, flat_squared.T @ back.square()
                first = self.weights[0].square().T
                d_flat = back @ self.weights[0].T
                back_variance = back_variance @ first + chain(back.shape[1], d_flat.square(), back.square() @ first)
                back = d_flat
            d_blocks, variance = back.square().view(shape), back_variance.view(shape)
        found[f"{self.side}_position"] = variance.sum(0), d_blocks.sum(0)
        return variance, found


def phi_side(p: OracleParameters, side: str, x: Tensor, learned: Mapping[str, Tensor], unit: float) -> PhiSide:
    """phi of one KV head: x (T, 1, D), `learned` with a first dimension of 1; `unit` is the dtype's roundoff.

    Products of stored numbers are exact in float32 and disturbed only by its roundoff; by `unit` where an operand is
    rounded on the way: the hidden units, a sum with the position, and tf32 operands.
    """
    block, stride = p.compression_block, p.compression_stride
    assert block is not None and stride is not None
    kind, position = (p.phi_key, p.position_key) if side == "key" else (p.phi_value, p.position_value)
    x = torch.where(torch.isfinite(x[:, 0]), x[:, 0], 0.0)
    blocks = x.new_empty(0, block, x.shape[1])
    if x.shape[0] >= block:
        blocks = x.unfold(0, block, stride).transpose(1, 2)
    if position:
        blocks = blocks + learned[f"{side}_position"][0]
    plain = (2.0**-24 / unit) ** 2
    if kind in ("mean", "weighted"):
        weight = x.new_full((block,), 1 / block) if kind == "mean" else learned[f"{side}_weight"][0]
        terms = blocks * weight[:, None]
        out, squares = terms.sum(1), terms.square().sum(1)
        variance = chain(block, out.square(), squares) + (out.square() + squares) / 3
        return PhiSide(kind, side, blocks, (weight,), out, plain * squares, variance)

    flat = blocks.flatten(1)
    products = 1.0 if p.tf32 or position else plain
    first = learned[f"{side}_weight" if kind == "linear" else f"{side}_weight_in"][0]
    out, squares = flat @ first, flat.square() @ first.square()
    variance = chain(flat.shape[1], out.square(), squares)
    if kind == "linear":
        variance += (out.square() + squares) / 3
        return PhiSide(kind, side, blocks, (first,), out, products * squares, variance)
    hidden, hidden_noise, hidden_variance = out, products * squares, variance + (out.square() + squares) / 3
    last = learned[f"{side}_weight_out"][0]
    slope = gelu_slopes(hidden)[0].square()
    active = gelu(hidden)
    out, squares = active @ last, active.square() @ last.square()
    noise = squares + (slope * hidden_noise) @ last.square()
    variance = chain(last.shape[0], out.square(), squares) + (slope * hidden_variance) @ last.square()
    variance += (out.square() + squares) / 3
    return PhiSide(kind, side, blocks, (first, last), out, noise, variance, hidden, hidden_variance)


def add_blocks(p: OracleParameters, blocks: Tensor, raw: Tensor) -> None:
    """Add what belongs to the rows of blocks (Nc, l, D) to the view `raw` (T, 1, D); blocks may overlap."""
    stride = p.compression_stride
    assert stride is not None
    place = torch.arange(blocks.shape[0], device=raw.device)[:, None] * stride
    place = place + torch.arange(blocks.shape[1], device=raw.device)
    raw[:, 0].index_add_(0, place.flatten(), blocks.flatten(0, 1))
