"""The semantics page once more, in Python loops over single numbers: an oracle for the oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsa_gen.verification import OracleParameters


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def phi(p: OracleParameters, side: str, block: list[list[float]], learned: dict[str, Tensor], h: int) -> list[float]:
    kind, position = (p.phi_key, p.position_key) if side == "key" else (p.phi_value, p.position_value)
    dim = len(block[0])
    if position:
        pe = learned[f"{side}_position"][h].tolist()
        block = [[x + e for x, e in zip(row, pe[j], strict=True)] for j, row in enumerate(block)]
    if kind == "mean":
        return [sum(row[c] for row in block) / len(block) for c in range(dim)]
    if kind == "weighted":
        w = learned[f"{side}_weight"][h].tolist()
        return [sum(w[j] * row[c] for j, row in enumerate(block)) for c in range(dim)]
    flat = [x for row in block for x in row]
    if kind == "linear":
        w = learned[f"{side}_weight"][h].tolist()
        return [sum(flat[a] * w[a][c] for a in range(len(flat))) for c in range(dim)]
    w1, w2 = learned[f"{side}_weight_in"][h].tolist(), learned[f"{side}_weight_out"][h].tolist()
    hidden = [gelu(sum(flat[a] * w1[a][m] for a in range(len(flat)))) for m in range(len(w1[0]))]
    return [sum(hidden[m] * w2[m][c] for m in range(len(hidden))) for c in range(dim)]


def softmax_attention(p, q: list[float], keys: dict[int, list[float]], values: dict[int, list[float]]):
    """o, lse and probabilities of one query over the visible keys only."""
    scores = {i: p.scale * sum(a * b for a, b in zip(q, key, strict=True)) for i, key in keys.items()}
    if not scores:
        return [0.0] * p.head_dim_v, -math.inf, {}
    lse = math.log(sum(math.exp(s) for s in scores.values()))
    probabilities = {i: math.exp(s - lse) for i, s in scores.items()}
    o = [sum(probabilities[i] * values[i][c] for i in keys) for c in range(p.head_dim_v)]
    return o, lse, probabilities


def row(p: OracleParameters, s: dict, r: int, h: int) -> dict:
    """Every result of query row r of one sequence and of the G heads of KV head h.

    `s` has q, gates, `cmp`, `slc`, `win` ((K, V) pairs or None), `external` or None, learned, indices or None.
    """
    tokens = s["tokens"]
    t = tokens - s["q"].shape[0] + r
    found: dict = {"o": [], "o_cmp": [], "lse_cmp": [], "o_slc": [], "lse_slc": [], "o_win": [], "lse_win": [],
                   "o_joint": [], "lse_joint": []}  # fmt: skip
    heads = range(h * p.group, (h + 1) * p.group)
    importance: dict[int, float] = {}
    if p.compression_block is not None:
        length, d = p.compression_block, p.compression_stride
        visible = [i for i in range(tokens) if i * d + length - 1 <= t]
        if p.external:
            keys = {i: s["external"][0][i, h].tolist() for i in visible}
            values = {i: s["external"][1][i, h].tolist() for i in visible}
        else:
            k, v = s["cmp"][0][:, h].tolist(), s["cmp"][1][:, h].tolist()
            keys = {i: phi(p, "key", k[i * d : i * d + length], s["learned"], h) for i in visible}
            values = {i: phi(p, "value", v[i * d : i * d + length], s["learned"], h) for i in visible}
        for head in heads:
            o, lse, probabilities = softmax_attention(p, s["q"][r, head].tolist(), keys, values)
            found["o_cmp"].append(o)
            found["lse_cmp"].append(lse)
            if p.selection_block is not None:
                for j in range(-(-tokens // p.selection_block)):
                    block = set(range(j * p.selection_block, (j + 1) * p.selection_block))
                    for i, probability in probabilities.items():
                        shared = len(block & set(range(i * d, i * d + length)))
                        importance[j] = importance.get(j, 0.0) + probability * shared / d
    if p.selection_block is not None:
        own = t // p.selection_block
        if s["indices"] is not None:
            chosen = [j for j in s["indices"][r, h].tolist() if 0 <= j <= own]
        else:
            forced = {j for j in range(own + 1) if j < p.initial or j > own - p.local}
            free = sorted(set(range(own + 1)) - forced, key=lambda j: (-importance.get(j, 0.0), j))
            chosen = sorted([*forced, *free[: p.selection_count - len(forced)]])
            found["indices"] = chosen + [-1] * (p.selection_count - len(chosen))
            found["importance"] = importance
        seen = [x for x in range(t + 1) if x // p.selection_block in chosen]
        if not p.joint:
            found |= attention_over(p, s, "slc", seen, r, h)
    if p.joint:
        # A list of both branches' keys, each once.
        found |= attention_over(p, s, "joint", sorted({*seen, *range(max(0, t - p.window + 1), t + 1)}), r, h)
    elif p.window is not None:
        found |= attention_over(p, s, "win", list(range(max(0, t - p.window + 1), t + 1)), r, h)
    for g, head in enumerate(heads):
        total = [0.0] * p.head_dim_v
        for b, branch in enumerate(p.branches):
            gate = 1.0 if p.gate == "none" else s["gates"][r, head, b].item()
            if p.gate == "sigmoid":
                gate = 1 / (1 + math.exp(-gate))
            total = [a + gate * x for a, x in zip(total, found[f"o_{branch}"][g], strict=True)]
        found["o"].append(total)
    return found


def attention_over(p: OracleParameters, s: dict, branch: str, seen: list[int], r: int, h: int) -> dict:
    keys = {x: s[branch][0][x, h].tolist() for x in seen}
    values = {x: s[branch][1][x, h].tolist() for x in seen}
    results = [
        softmax_attention(p, s["q"][r, head].tolist(), keys, values) for head in range(h * p.group, (h + 1) * p.group)
    ]
    return {f"o_{branch}": [o for o, _, _ in results], f"lse_{branch}": [lse for _, lse, _ in results]}


def assert_row(p: OracleParameters, s: dict, result, r: int, h: int) -> None:
    """`result` (an OracleResult of one sequence, no batch dimension) agrees with the loops in row r, KV head h."""
    expected = row(p, s, r, h)
    heads = slice(h * p.group, (h + 1) * p.group)
    for name in ("o", *(f"{x}_{branch}" for branch in p.branches for x in ("o", "lse"))):
        actual = getattr(result, name)[r, heads]
        torch.testing.assert_close(actual, torch.tensor(expected[name], dtype=actual.dtype), rtol=1e-11, atol=1e-11)
    if "indices" in expected:
        assert result.indices[r, h].tolist() == expected["indices"]
        assert result.counts[r, h].item() == sum(j >= 0 for j in expected["indices"])
        for j, value in expected["importance"].items():
            assert abs(result.importance[r, h, j].item() - value) < 1e-12
