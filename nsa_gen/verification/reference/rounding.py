"""How far rounding moves each element of a result: the noise of its terms, and the drift of float32 sums.

Noise: every result is a sum of products. If each product has an independent relative error u, the sum has a standard
deviation of u times the root of the sum of squared products. It is large exactly where terms cancel (dS of a row with
one visible key is 0 as p * (dP - delta), yet dP and delta are each rounded), so it is the right scale where the result
itself is near or at 0. It is in units of the roundoff of the inputs' dtype.

Drift: a kernel adds N products to an accumulator one by one, and rounds after each. `chain` has the variance of this
random walk. The other functions propagate it, to first order: from K_cmp and V_cmp to the logits, from logits to
probabilities, outputs, dS and the gradients, and through phi in both directions. It is in units of float32's roundoff,
since every kernel accumulates in float32 whatever the dtype of its inputs.

Both are kept as squares, which go through the formulas of the forward and the backward pass like the values, in
float64: squares of small probabilities leave float32's range. docs/tolerances.md has the derivation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_gen.verification.reference.dense import OracleParameters, attend, compress, gelu
from nsa_gen.verification.reference.oracle import Pair, Sequence, branch_mask, gate_values

ROUNDOFF = 2.0**-24
"""float32's roundoff."""
LEAST = 2.0**-126
"""The smallest normal float32."""


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


class BranchRows(NamedTuple):
    """Query rows of one KV head and their attention in one branch; `p` has one KV head.

    q (G, R, Dk), do (G, R, Dv), k (K, Dk), v (K, Dv), mask (G or 1, R, K), gate, sink and lse (G, R, 1), o (G, R, Dv),
    weights (the probabilities) and their squares `chances` (G, R, K), and scores q . k without the scale.
    """

    p: OracleParameters
    number: int
    branch: str
    q: Tensor
    do: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    gate: Tensor
    sink: Tensor | None
    o: Tensor
    lse: Tensor
    weights: Tensor
    chances: Tensor
    scores: Tensor

    def through_scores(self, variance: Tensor) -> Tensor:
        """The variance of o due to the variance of the logits (G, R, K): the sum of p^2 (v - o)^2 variance."""
        moved = self.chances * variance
        return moved @ self.v.square() - 2 * self.o * (moved @ self.v) + self.o.square() * moved.sum(-1, keepdim=True)

    def at_sink(self) -> Tensor:
        """exp(sink - lse), the probability of the sink, times the gate (G, R, 1); 0 without a sink."""
        if self.sink is None:
            return torch.zeros_like(self.gate)
        return torch.where(self.sink > -math.inf, (self.sink - self.lse).exp() * self.gate, 0.0)


def branch_rows(p: OracleParameters, s: Sequence) -> Iterator[BranchRows]:
    """Every branch of the rows of one KV head: s.q (R, G, Dk), s.do (R, G, Dv), `p` has one KV head."""
    assert s.do is not None
    rows = s.q.shape[0]
    t = torch.arange(s.tokens - rows, s.tokens, device=s.q.device)
    q, do = s.q.permute(1, 0, 2), s.do.permute(1, 0, 2)
    for number, (branch, gate) in enumerate(zip(p.branches, gate_values(p, s.gates, s.q), strict=True)):
        # 0 * NaN would reach every row.
        k, v = (torch.where(torch.isfinite(x[:, 0]), x[:, 0], 0.0) for x in getattr(s, branch))
        mask, sink = branch_mask(p, s, branch, t, s.indices), s.sink(branch, 1)
        o, lse, weights = attend(q[None], k[None], v[None], mask, p.scale, sink=sink)
        gate = gate.expand(rows, p.query_heads, 1).permute(1, 0, 2)
        logit = None if sink is None else sink[0, :, None, None].expand(-1, rows, 1)
        found = o[0], lse[0, ..., None], weights[0], weights[0].square(), q @ k.T
        yield BranchRows(p, number, branch, q, do, k, v, mask[0], gate, logit, *found)


@dataclass(frozen=True)
class Squares:
    """Squared noise or drift of rows of one KV head: views of the results, to which contributions are added.

    `outputs` are o, o_x and, for drift, lse_x; `gradients` is None without a backward pass. `compressed` is for K_cmp
    and V_cmp (Nc, 1, D); None if the caller gave them.
    """

    outputs: Mapping[str, Tensor]
    gradients: Sequence | None
    compressed: Pair | None

    def of_keys(self, r: BranchRows) -> Pair | None:
        """The squares for a branch's keys and values (K, D); None if these are exact."""
        if self.compressed is None or r.branch != "cmp":
            return None
        return self.compressed[0][: r.k.shape[0], 0], self.compressed[1][: r.k.shape[0], 0]

    def add_outputs(self, r: BranchRows, own: Tensor, whole: Tensor) -> None:
        """Add the squares for a branch's output and for its part of o, both (G, R, Dv)."""
        self.outputs[f"o_{r.branch}"].add_(own.permute(1, 0, 2))
        self.outputs["o"].add_(whole.permute(1, 0, 2))

    def add_gradients(self, r: BranchRows, dq: Tensor, dk: Tensor, dv: Tensor, dgate: Tensor, dsink: Tensor) -> None:
        """Add squares for dq (G, R, Dk), dk (K, Dk), dv (K, Dv), the gate's value and the terms of dsink (G, R, 1)."""
        assert self.gradients is not None
        self.gradients.q.add_(dq.permute(1, 0, 2))
        for target, found in zip(getattr(self.gradients, r.branch), (dk, dv), strict=True):
            target[:, 0].add_(found)
        if self.gradients.gates is not None:
            slope = (r.gate * (1 - r.gate)).square() if r.p.gate == "sigmoid" else 1.0
            self.gradients.gates[..., r.number].add_((slope * dgate)[..., 0].T)
        add_sink(self.gradients, r, dsink)


def add_sink(gradients: Sequence, r: BranchRows, terms: Tensor) -> None:
    """Add the sum of `terms` (G, R, 1) over the rows to the view of a sink's gradient, if the branch has a sink."""
    if (target := gradients.sink(r.branch, 1)) is not None:
        target[0].add_(terms.sum((1, 2)))


def add_noise(r: BranchRows, noise: Squares, unit: float) -> None:
    """Add the squared noise of rows, in units of the roundoff `unit`."""
    off, from_keys, scale = noise.of_keys(r), None, r.p.scale**2
    o_squared, k_squared, v_squared = r.o.square(), r.k.square(), r.v.square()
    own = r.chances @ v_squared
    if off is not None:  # the keys and values themselves have errors
        from_keys = scale * (r.q.square() @ off[0].T)
        own += r.chances @ off[1] + r.through_scores(from_keys)
        k_squared, v_squared = k_squared + off[0], v_squared + off[1]
    noise.add_outputs(r, own, r.gate.square() * (own + o_squared))
    if noise.gradients is None:
        return
    # The backward pass computes P again as exp(s - lse). Both are rounded in float32, in proportion to their size.
    magnitude = (r.scores.abs() * r.p.scale + r.lse.abs()).masked_fill_(~r.mask, 0.0)
    spread = magnitude.mul_(ROUNDOFF / unit).square_()
    if from_keys is not None:
        spread += from_keys
    chances = spread.add_(1).mul_(r.chances)
    do_branch = (r.gate * r.do).square()
    delta = (do_branch * o_squared).sum(-1, keepdim=True)
    ds = chances * (do_branch @ v_squared.T + delta) * scale  # dS = P * (dP - delta)
    dgate = (r.do.square() * (o_squared + own)).sum(-1, keepdim=True)
    dsink = torch.zeros_like(dgate)
    if r.sink is not None:  # -P * gate * delta with P = exp(sink - lse), rounded in float32
        rounded = ROUNDOFF / unit * (r.sink.abs() + r.lse.abs()) * (r.do * r.o).sum(-1, keepdim=True)
        dsink = torch.where(r.sink > -math.inf, r.at_sink().square() * (dgate + rounded.square()), 0.0)
    dq = ds @ k_squared + scale * delta * (r.weights @ r.k).square()
    dk = ds.flatten(0, 1).T @ r.q.square().flatten(0, 1)
    noise.add_gradients(r, dq, dk, chances.flatten(0, 1).T @ do_branch.flatten(0, 1), dgate, dsink)


def add_drift(r: BranchRows, drift: Squares, sums: Mapping[str, Sums], terms: Sequence) -> None:
    """Add the variances of rows. Sums of a key's gradient over query rows go to `sums`, which are finished when all
    rows have been added. The squared terms of a sink's gradient go to the sink of `terms`."""
    p, off = r.p, drift.of_keys(r)
    q_squared, do_squared, k_squared, v_squared = r.q.square(), r.do.square(), r.k.square(), r.v.square()
    keys = r.mask.sum(-1, keepdim=True).to(r.q.dtype)  # (G or 1, R, 1)
    score = chain(p.head_dim_qk, r.scores.square(), q_squared @ k_squared.T)
    own = chain(keys, r.o.square(), r.chances @ v_squared)  # of o, for given probabilities
    if off is not None:
        score += q_squared @ off[0].T
        own += r.chances @ off[1]
    score *= p.scale**2
    lse = (r.chances * score).sum(-1, keepdim=True)
    whole = own + r.through_scores(score)
    drift.outputs[f"lse_{r.branch}"].add_(lse[..., 0].T)
    drift.add_outputs(r, whole, r.gate.square() * whole)
    if drift.gradients is None:
        return

    dp = r.do @ r.v.T
    delta = (r.do * r.o).sum(-1, keepdim=True)
    ds = r.weights * (dp - delta)  # dS by the gate and the scale
    # exp2 gives 0 below float32's normal range, so such a probability may be lost completely.
    lost = torch.where(r.weights < LEAST, r.chances / ROUNDOFF**2, 0.0)
    through_scores = ds.square() * score + lost * (dp - delta).square()
    dgate = chain(p.head_dim_v, delta.square(), (do_squared * r.o.square()).sum(-1, keepdim=True))
    dgate += (do_squared * own).sum(-1, keepdim=True) + through_scores.sum(-1, keepdim=True)  # also that of delta
    dp_variance = chain(p.head_dim_v, dp.square(), do_squared @ v_squared.T)
    if off is not None:
        dp_variance += do_squared @ off[1].T
    factor = (r.gate * p.scale).square()
    by_key = factor * (r.chances * dp_variance + through_scores)
    ds *= r.gate * p.scale
    dq, ds_squared = ds @ r.k, ds.square()
    # Errors of delta and lse are the same for all keys of a row. lse is rounded when stored and in base 2.
    lse = lse + 2 / 3 * torch.where(torch.isfinite(r.lse), r.lse, 0.0).square()
    found_q = by_key @ k_squared + factor * dgate * (r.weights @ r.k).square() + lse * dq.square()
    found_q += chain(keys, dq.square(), ds_squared @ k_squared)
    if off is not None:
        found_q += ds_squared @ off[0]
    by_key += factor * r.chances * dgate + ds_squared * lse
    do_branch = (r.gate * r.do).flatten(0, 1)
    dk = by_key.flatten(0, 1).T @ q_squared.flatten(0, 1)
    dv = (r.chances * (score + lse) + lost).flatten(0, 1).T @ do_branch.square()
    held = r.at_sink()
    of_sink = (held * delta).square()
    drift.add_gradients(r, found_q, dk, dv, dgate, held.square() * dgate + of_sink * lse)
    add_sink(terms, r, of_sink)

    here, length = sums[r.branch], r.k.shape[0]
    flat_q, flat_ds, weights = r.q.flatten(0, 1), ds.flatten(0, 1), r.weights.flatten(0, 1)
    here.totals[0][:length].add_(flat_ds.T @ flat_q)
    here.totals[1][:length].add_(weights.T @ do_branch)
    here.squares[0][:length].add_(flat_ds.square().T @ flat_q.square())
    here.squares[1][:length].add_(weights.square().T @ do_branch.square())
    here.terms[:length].add_(r.mask.expand(p.group, -1, -1).sum((0, 1))[:, None])


# phi


def add_compression(
    p: OracleParameters,
    raw: tuple[Tensor, Tensor],
    learned: Mapping[str, Tensor],
    compressed_squares: tuple[Tensor, Tensor],
    raw_squares: tuple[Tensor, Tensor],
    learned_squares: Mapping[str, Tensor],
) -> None:
    """Propagate the squared noise of dK_cmp and dV_cmp through phi to the raw keys and values and phi's parameters.

    phi of squared inputs and squared parameters is linear in each, so autograd propagates the squares. The mlp's GELU
    is left out, because its slope is at most 1.13.
    """
    block = p.compression_block
    assert block is not None
    kinds = {"key": p.phi_key, "value": p.phi_value}
    squares = {name: x.square() for name, x in learned.items()}
    for side, kind in kinds.items():
        if kind == "mean":
            squares[f"{side}_weight"] = raw[0].new_full((1, block), block**-2.0)
    smooth = {side: "weighted" if kind == "mean" else kind for side, kind in kinds.items()}
    leaves = [x.square().requires_grad_() for x in raw]
    squares = {name: x.detach().requires_grad_() for name, x in squares.items()}
    with torch.enable_grad():
        out = compress(
            replace(p, phi_key=smooth["key"], phi_value=smooth["value"], tf32=False),  # type: ignore[arg-type]
            leaves[0],
            leaves[1],
            squares,
            activation=lambda x: x,
        )
    roots = [*leaves, *(squares[name] for name in learned)]
    found = torch.autograd.grad(out, roots, compressed_squares, allow_unused=True)
    for target, gradient in zip((*raw_squares, *learned_squares.values()), found, strict=True):
        if gradient is not None:
            target += gradient


def gelu_slopes(x: Tensor) -> Pair:
    """The first and second derivative of the exact GELU."""
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + x * density, density * (2 - x.square())


@dataclass(frozen=True)
class PhiSide:
    """phi of one KV head's keys or values, in the forward: values, noise scale and drift.

    `blocks` (Nc, l, D) with the position added, `out`, `noise` (squared, in units of the dtype's roundoff) and
    `variance` (drift) (Nc, D); an mlp's `hidden` (Nc, hidden) before GELU and its drift, otherwise None.
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
        """Drift of the gradients for d(out) = g (Nc, D): for the blocks (Nc, l, D), and for each parameter its variance
        before the sum over blocks is rounded, and the squared products of that sum."""
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

    Products of stored numbers are exact in float32 and only have its roundoff. If an operand is rounded before (hidden
    units, a sum with the position, tf32 operands), they have `unit`.
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
    """Add the rows of blocks (Nc, l, D) to their rows of `raw` (T, 1, D), which is a view; blocks may overlap."""
    stride = p.compression_stride
    assert stride is not None
    place = torch.arange(blocks.shape[0], device=raw.device)[:, None] * stride
    place = place + torch.arange(blocks.shape[1], device=raw.device)
    raw[:, 0].index_add_(0, place.flatten(), blocks.flatten(0, 1))
