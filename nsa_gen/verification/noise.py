"""The noise scale: how far rounding may move each element of a result, in units of the rounding error.

Every result is a sum of products. Where each product is disturbed by an independent relative error u, the sum has a
standard deviation of u times the root of the sum of squared products: its noise scale. It is large exactly where terms
cancel (dS of a row with one visible key is 0 as p * (dP - delta), yet dP and delta are each rounded), so it is the
right yardstick where the result itself is near or at 0. Squares go through the same formulas as the values do. In
float64: squares of small probabilities leave float32's range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nsa_gen.verification.dense import OracleParameters, attend, compress
from nsa_gen.verification.oracle import Sequence, branch_mask, gate_values

FLOAT32_UNIT = 2.0**-24


def add_rows(
    p: OracleParameters,
    s: Sequence,
    squares: Sequence | None,
    do: Tensor,
    outputs: dict[str, Tensor],
    unit: float,
    compressed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Add the squared noise of one KV head's rows to the views `squares` (gradients) and `outputs` (o and o_x).

    `p` has one KV head; s.q (R, G, Dk), do (R, G, Dv). `unit` is the roundoff that noise is in units of.
    `compressed` has the squared noise of K_cmp and V_cmp (Nc, 1, D), None where the caller gave them.
    """
    rows = s.q.shape[0]
    t = torch.arange(s.tokens - rows, s.tokens, device=s.q.device)
    q = s.q
    group_first = q.permute(1, 0, 2)  # (G, R, Dk)
    do = do.permute(1, 0, 2)
    gates = [g.expand(rows, p.query_heads, 1).permute(1, 0, 2) for g in gate_values(p, s.gates, q)]
    for number, branch in enumerate(p.branches):
        pair = getattr(s, branch)
        k, v = (torch.where(torch.isfinite(x[:, 0]), x[:, 0], 0.0) for x in pair)  # 0 * NaN would reach every row
        mask = branch_mask(p, s, branch, t, s.indices)
        sink = s.sink(branch, 1)
        o, lse, probabilities = attend(group_first[None], k[None], v[None], mask, p.scale, sink=sink)
        o, probabilities = o[0], probabilities[0]  # (G, R, Dv), (G, R, K)
        mean_key = probabilities @ k if squares is not None else None
        chances = probabilities.square_()
        branch_noise = chances @ v.square()
        v_noise, score_noise = torch.zeros_like(v), None
        if compressed is not None and branch == "cmp":  # the keys and values are themselves off
            v_noise = compressed[1][: v.shape[0], 0]
            score_noise = (p.scale**2 * group_first.square()) @ compressed[0][: k.shape[0], 0].T
            moved = chances * score_noise
            branch_noise += chances @ v_noise + moved @ v.square() - 2 * o * (moved @ v)
            branch_noise += o.square() * moved.sum(-1, keepdim=True)  # in all sum of p^2 (v - o)^2 score_noise
        gate = gates[number]
        outputs[f"o_{branch}"].add_(branch_noise.permute(1, 0, 2))
        outputs["o"].add_((gate.square() * (branch_noise + o.square())).permute(1, 0, 2))
        if squares is None:
            continue
        assert mean_key is not None
        # The backward pass computes P again as exp(s - lse): both are rounded in float32, in proportion to their size.
        scores = (group_first @ k.T) * p.scale
        magnitude = (scores.abs_() + lse[0, :, :, None].abs()).masked_fill(~mask, 0.0)
        spread = ((FLOAT32_UNIT / unit) * magnitude).square_()
        if score_noise is not None:
            spread += score_noise
        chances *= 1 + spread
        do_branch = (gate * do).square()
        delta = (do_branch * o.square()).sum(-1, keepdim=True)
        ds = chances * (do_branch @ (v.square() + v_noise).T + delta) * p.scale**2  # dS = P * (dP - delta)
        k_squared = k.square()
        if compressed is not None and branch == "cmp":
            k_squared += compressed[0][: k.shape[0], 0]
        squares.q.add_((ds @ k_squared + p.scale**2 * delta * mean_key.square()).permute(1, 0, 2))
        target_k, target_v = getattr(squares, branch)
        target_k[:, 0].add_(ds.flatten(0, 1).T @ group_first.square().flatten(0, 1))
        target_v[:, 0].add_(chances.flatten(0, 1).T @ do_branch.flatten(0, 1))
        dgate = (do.square() * (o.square() + branch_noise)).sum(-1, keepdim=True)
        if squares.gates is not None:
            slope = (gate * (1 - gate)).square() if p.gate == "sigmoid" else 1.0
            squares.gates[..., number].add_((slope * dgate)[..., 0].T)
        target = squares.sink(branch, 1)
        if sink is not None and target is not None:  # dsink = -P * gate * delta, P = exp(sink - lse) rounded in float32
            magnitude = (FLOAT32_UNIT / unit) * (sink[0, :, None].abs() + lse[0].abs())
            term = (sink[0, :, None] - lse[0]).exp().square() * gate[..., 0].square()
            dsink = term * (dgate[..., 0] + (magnitude * (do * o).sum(-1)).square())
            target[0].add_(torch.where(sink[0, :, None] > -torch.inf, dsink, 0.0).sum(-1))


def add_compression(
    p: OracleParameters,
    raw: tuple[Tensor, Tensor],
    learned: Mapping[str, Tensor],
    compressed_squares: tuple[Tensor, Tensor],
    raw_squares: tuple[Tensor, Tensor],
    learned_squares: Mapping[str, Tensor],
) -> None:
    """Take squared noise of dK_cmp, dV_cmp back through phi, to the raw keys and values and phi's parameters.

    phi of squared inputs and squared parameters is linear in each, so autograd takes the squares back. The mlp's GELU
    is left out: its slope is at most 1.13.
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
