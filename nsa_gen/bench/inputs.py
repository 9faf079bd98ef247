"""Draw inputs on the device on which they are timed: one sequence, of independent or of model-like numbers.

`nsa_gen.verification.reference.inputs` draws on the CPU, so that a failure is the same on every machine. For half a
billion numbers this would take longer than everything that is timed here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from nsa_gen.bench.recorded import PROCESSES, Process, Selection, process_weights, query_correlations
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.inputs import Inputs, make_inputs
from nsa_gen.verification.reference.oracle import SINKS

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

InputKind = Literal["independent", "correlated"]
INPUT_KINDS: tuple[str, ...] = get_args(InputKind)

RHO = 0.95
"""Correlation of neighbouring queries of correlated inputs."""
RECORDED = ".json"
"""Suffix of a kind that is a file of recorded statistics."""
CLUSTERS, CLUSTER_SHARE, RUN_TOKENS = 64, 0.8, 128
"""Correlated keys: directions per KV head, the weight of the direction in a key, mean length of a direction's run."""
ROWS_AT_ONCE = 4096


def draw_inputs(
    spec: Spec, tokens: int, *, device: torch.device | str, seed: int = 0, kind: InputKind | str = "independent"
) -> Inputs:
    """One sequence of `tokens` tokens in the spec's dtype, drawn on `device`.

    independent: unit normal everywhere. correlated: q_t = rho q_(t-1) + sqrt(1 - rho^2) noise with rho = 0.95, and each
    key is 0.8 times one of 64 directions of its head plus 0.6 times noise, where a direction lasts 128 tokens on
    average; both have unit variance. A path that ends in .json names recorded statistics of a model's selection: keys
    are correlated, and queries are drawn so that the operator's selections share as many blocks as recorded; see
    `nsa_gen.bench.recorded`. Learned parameters of phi are those of `make_inputs`. A spec that takes indices gets
    random distinct blocks, including the query's own.

    Raises ValueError for an unknown kind, for a file without such statistics, and for statistics with a spec that does
    not select blocks, or that selects them with an indexer.
    """
    if kind not in INPUT_KINDS and not kind.endswith(RECORDED):
        raise ValueError(f"kind: expected one of {', '.join(INPUT_KINDS)} or a file {RECORDED}, got {kind!r}")
    p = OracleParameters.from_spec(spec)
    recorded = Selection.read(Path(kind)) if kind.endswith(RECORDED) else None
    if recorded is not None and (not p.computed or p.index_dim):
        raise ValueError(f"kind: expected a spec that chooses blocks by its queries with {kind}, got {spec.name}")
    dtype = getattr(torch, spec.dtype)
    # A short sequence gives the arguments that the spec takes, and phi's parameters, which do not depend on the length.
    small = make_inputs(spec, batch=1, tokens=p.selection_block or 64, dtype=dtype, device=device, seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    drawn: dict[str, Any] = {}
    for name, x in {**small.arguments(), "do": small.do}.items():
        if not isinstance(x, Tensor) or name in SINKS:
            continue
        rows = p.compressed_blocks(tokens) if name in ("k_cmp", "v_cmp") else tokens
        shape = (1, rows, *x.shape[2:])
        if name == "indices":
            drawn[name] = _draw_indices(p, tokens, device, generator)
        elif kind == "correlated" and name == "q":
            drawn[name] = _autoregressive(shape, device, generator, Process(RHO)).to(dtype)
        elif kind != "independent" and name.startswith("k"):
            drawn[name] = _clustered(shape, device, generator).to(dtype)
        else:
            drawn[name] = torch.randn(shape, generator=generator, dtype=dtype, device=device)
    if recorded is not None:
        arguments = {**drawn, "compression": small.compression}
        weights = process_weights(query_correlations(p, arguments, recorded.shared_choice, generator))
        parts = [
            math.sqrt(weight) * _autoregressive(drawn["q"].shape, device, generator, process)
            for weight, process in zip(weights, PROCESSES, strict=True)
            if weight > 0
        ]
        drawn["q"] = sum(parts[1:], parts[0]).to(dtype)
    return replace(small, **drawn)


def _autoregressive(
    shape: tuple[int, ...], device: torch.device | str, generator: torch.Generator, process: Process
) -> Tensor:
    """Values of zero mean and unit variance, float32, that follow a process along dim 1, each column its own."""
    x = torch.randn(shape, generator=generator, device=device).flatten(2)[0]
    rho = process.decay
    # Within a chunk, the recurrence is a triangular matrix. From chunk to chunk, the last row is carried over.
    step = torch.arange(min(256, shape[1]), device=device)
    power = (step[:, None] - step).float()
    matrix = torch.where(power >= 0, rho ** power.clamp(min=0), 0.0) * math.sqrt(1 - rho**2)
    for order in range(process.order):
        carried = torch.randn(x.shape[1:], generator=generator, device=device)
        if order > 0:  # the second filter's state, given its first input
            carried = (carried + rho * x[0]) / math.sqrt(1 - rho**2)
        for start in range(0, shape[1], len(step)):
            rows = x[start : start + len(step)]
            decay = rho ** (step[: len(rows), None] + 1.0)
            rows.copy_(matrix[: len(rows), : len(rows)] @ rows + decay * carried)
            carried = rows[-1].clone()
        if order > 0:
            x /= math.sqrt((1 + rho**2) / (1 - rho**2))
    return x.view(shape)


def _clustered(shape: tuple[int, ...], device: torch.device | str, generator: torch.Generator) -> Tensor:
    """Unit normal values, float32, that share a direction of their head in runs along dim 1."""
    _, tokens, heads, dim = shape
    directions = torch.randn(heads, CLUSTERS, dim, generator=generator, device=device)
    starts = torch.rand(tokens, heads, generator=generator, device=device) < 1 / RUN_TOKENS
    run = starts.cumsum(0)
    of_run = torch.randint(CLUSTERS, (tokens + 1, heads), generator=generator, device=device)
    cluster = of_run.gather(0, run)
    x = torch.randn(shape, generator=generator, device=device)
    for head in range(heads):
        shared = directions[head][cluster[:, head]]
        x[0, :, head].mul_(math.sqrt(1 - CLUSTER_SHARE**2)).add_(shared, alpha=CLUSTER_SHARE)
    return x


def _draw_indices(p: OracleParameters, tokens: int, device: torch.device | str, generator: torch.Generator) -> Tensor:
    """Valid indices (1, T, S, n) int32: the query's own block and random earlier ones, ascending, then -1."""
    assert p.selection_block is not None
    blocks = -(-tokens // p.selection_block)
    n = min(p.selection_count, blocks)
    found = torch.full((1, tokens, p.scopes, p.selection_count), -1, dtype=torch.int32, device=device)
    block = torch.arange(blocks, device=device)
    for start in range(0, tokens, ROWS_AT_ONCE):
        own = torch.arange(start, min(start + ROWS_AT_ONCE, tokens), device=device)[:, None, None] // p.selection_block
        rank = torch.rand(own.shape[0], p.scopes, blocks, generator=generator, device=device)
        rank = rank.masked_fill(block == own, 2.0).masked_fill(block > own, -1.0)
        best, chosen = rank.topk(n, dim=-1)
        chosen = chosen.masked_fill(best < 0, blocks).sort(dim=-1).values
        found[0, start : start + own.shape[0], :, :n] = chosen.masked_fill(chosen == blocks, -1)
    return found


def selection_overlap(indices: Tensor) -> float | None:
    """The mean share of a query's blocks that the previous query also selected; None for fewer than two queries.

    `indices` is (B, T, S, n) int32 with -1 for empty slots, as in a package's auxiliary outputs.
    """
    both = chosen = 0
    for start in range(1, indices.shape[1], ROWS_AT_ONCE):
        later = indices[:, start : start + ROWS_AT_ONCE]
        earlier = indices[:, start - 1 : start - 1 + later.shape[1]]
        used = later >= 0
        both += int(((later[..., None] == earlier[..., None, :]).any(-1) & used).sum())
        chosen += int(used.sum())
    return both / chosen if chosen else None


SELECTION_BINS = 48
"""Rows and columns of a map of selected blocks."""


def selection_shares(indices: Tensor, block: int, bins: int = SELECTION_BINS) -> tuple[tuple[float, ...], ...]:
    """Where the selected blocks of the first sequence lie: for each range of queries, shares of slots by range of keys.

    `indices` is (B, T, S, n) int32 with -1 for empty slots, `block` the tokens of a selection block. Queries and keys
    are cut into `bins` ranges of equal length (fewer if there are fewer blocks). Each row adds up to 1.
    """
    tokens = indices.shape[1]
    bins = max(1, min(bins, -(-tokens // block)))
    counts = torch.zeros(bins * bins, dtype=torch.int64, device=indices.device)
    for start in range(0, tokens, ROWS_AT_ONCE):
        chunk = indices[0, start : start + ROWS_AT_ONCE].long()
        query = (start + torch.arange(len(chunk), device=chunk.device)) * bins // tokens
        cell = query[:, None, None] * bins + (chunk * block * bins // tokens).clamp(max=bins - 1)
        counts += torch.bincount(cell[chunk >= 0], minlength=bins * bins)
    rows = counts.view(bins, bins).double()
    shares = rows / rows.sum(1, keepdim=True).clamp(min=1)
    return tuple(tuple(round(share, 4) for share in row) for row in shares.tolist())
