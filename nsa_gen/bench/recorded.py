"""Which blocks neighbouring queries share: measure it in a model, record it in a few numbers, and draw such inputs.

A model's selection is recorded as statistics, not as data. Inputs are drawn so that the operator's own selection has
the recorded shares. Keys are drawn as in correlated inputs. Queries are a sum of processes with several correlation
times. The processes' weights follow from how much a selection changes with the correlation of two queries, which is
measured.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_gen._files import write_whole
from nsa_gen.verification.reference.dense import (
    OracleParameters,
    attend,
    block_importance,
    compress,
    mean_scores,
    select_blocks,
    visible_compressed,
)
from nsa_gen.verification.reference.oracle import branch_pairs

LAGS = (1, 8, 64)
"""Distances of the queries that are compared, in tokens."""
FORMAT = "nsa_gen selection statistics 1"
_ANGLES = 16
"""Number of measured correlations: cosines, because the changed share grows about linearly with the queries' angle."""
_PAIRS = 256
"""Pairs of queries per measurement."""


@dataclass(frozen=True)
class Process:
    """A stationary process of unit variance: noise through `order` filters y_t = decay * y_(t-1) + x_t.

    With one filter, the correlation falls at once; with two it is smooth at lag 0.
    """

    decay: float
    order: int = 1

    def correlation(self, lag: int) -> float:
        """The correlation of two values that are `lag` tokens apart."""
        smooth = (1 - self.decay**2) / (1 + self.decay**2) if self.order == 2 else 0.0
        return self.decay**lag * (1 + smooth * lag)


PROCESSES = (
    Process(0.0),
    *(Process(math.exp(-1 / time), order) for time in (1, 4, 16, 64, 256, 1024) for order in (1, 2)),
    Process(1.0),
)
"""The processes whose sum is a query; the last one is constant."""


@dataclass(frozen=True)
class Selection:
    """Statistics of a selection, as means over the queries that have a choice, and over scopes.

    Attributes:
        tokens: tokens of the sequences.
        block, count, initial, local: as in the spec's selection.
        shared: by lag, the share of a query's blocks that the query `lag` tokens earlier also selected.
        shared_choice: the same without blocks that are forced for either query; inputs are drawn to match it.
        forced: the share of forced blocks.
        popular: the share of selected blocks, without forced ones, that lie in the most popular tenth of blocks.
    """

    tokens: int
    block: int
    count: int
    initial: int
    local: int
    shared: Mapping[int, float]
    shared_choice: Mapping[int, float]
    forced: float
    popular: float

    def write(self, path: Path, **more: Any) -> None:
        """Write to a JSON file, together with `more`."""
        write_whole(path, json.dumps({"format": FORMAT, **asdict(self), **more}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Selection:
        """Read a file that `write` made. Raises OSError, or ValueError naming the file and the field."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{path}: expected JSON of the format {FORMAT!r}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            kind = found.get("format") if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"{path}: format: expected {FORMAT!r}, got {kind!r}")
        values: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            value = found.get(name)
            if name.startswith("shared"):
                shares = value if isinstance(value, dict) else {}
                if set(shares) != {str(lag) for lag in LAGS} or not all(_is_share(share) for share in shares.values()):
                    lags = ", ".join(map(str, LAGS))
                    raise ValueError(f"{path}: {name}: expected a share from 0 to 1 for each of {lags}, got {value!r}")
                value = {int(lag): float(share) for lag, share in shares.items()}
            elif not (_is_share(value) if name in ("forced", "popular") else type(value) is int and value >= 0):
                raise ValueError(f"{path}: {name}: expected a number, got {value!r}")
            values[name] = value
        return cls(**values)

    @classmethod
    def mean(cls, found: Sequence[Selection]) -> Selection:
        """The mean of several statistics of one spec and length."""
        first, n = found[0], len(found)
        by_lag = {
            name: {lag: sum(getattr(each, name)[lag] for each in found) / n for lag in LAGS}
            for name in ("shared", "shared_choice")
        }
        plain = {name: sum(getattr(each, name) for each in found) / n for name in ("forced", "popular")}
        return cls(first.tokens, first.block, first.count, first.initial, first.local, **by_lag, **plain)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def measure_selection(indices: Tensor, block: int, initial: int, local: int) -> Selection:
    """Statistics of selected blocks.

    indices (B, T, S, n) int32, ascending, -1 in empty slots. `block` is the number of tokens in a block, and `initial`
    and `local` are the numbers of forced blocks. A query has a choice if it has more than n candidates. Raises
    ValueError if none of the compared queries has a choice.
    """
    batch, tokens, scopes, count = indices.shape
    first = count * block  # the first query with more than n candidates
    if tokens <= first + max(LAGS):
        raise ValueError(
            f"indices: expected more than {first + max(LAGS)} tokens, so that queries choose {count} of more blocks of "
            f"{block}, got {tokens}"
        )
    blocks = -(-tokens // block)
    rows = indices[:, first:].long()
    numbers = _not_forced(rows, torch.arange(first, tokens, device=indices.device), block, initial, local)
    free = numbers >= 0
    shared, shared_choice = {}, {}
    for lag in LAGS:
        later, earlier = rows[:, lag:], rows[:, :-lag]
        shared[lag] = _found(later, earlier, later >= 0)
        shared_choice[lag] = _found(numbers[:, lag:], numbers[:, :-lag], free[:, lag:])
    popular = torch.zeros(batch, scopes, blocks + 1, dtype=torch.long, device=indices.device)
    where = torch.where(free, rows, blocks).permute(0, 2, 1, 3).flatten(2)
    popular = popular.scatter_add_(-1, where, torch.ones_like(where))[..., :blocks].sort(-1, descending=True).values
    most = popular[..., : max(1, blocks // 10)].sum() / popular.sum().clamp(min=1)
    forced = 1 - free.sum() / (rows >= 0).sum()
    return Selection(tokens, block, count, initial, local, shared, shared_choice, forced.item(), most.item())


def _not_forced(indices: Tensor, positions: Tensor, block: int, initial: int, local: int) -> Tensor:
    """Blocks (..., R, S, n) that queries at positions (R,) selected, with -2 in place of forced and empty ones."""
    own = (positions // block)[:, None, None]
    return torch.where((indices >= initial) & (indices <= own - local), indices, -2)


def _found(later: Tensor, earlier: Tensor, counted: Tensor) -> float:
    """Of the counted slots of `later`, the share whose block is also in `earlier`."""
    both = counted.clone()
    for start in range(0, later.shape[1], 4096):
        part = slice(start, start + 4096)
        both[:, part] &= (later[:, part, :, :, None] == earlier[:, part, :, None]).any(-1)
    return (both.sum() / counted.sum().clamp(min=1)).item()


def choose_blocks(p: OracleParameters, drawn: Mapping[str, Any], q: Tensor, positions: Tensor) -> Tensor:
    """The blocks (R, S, n) that queries (R, Hq, Dk) at positions (R,) select among the keys of one sequence.

    Uses the reference's formulas in float32. `drawn` has the sequence's arguments (1, T, ...) by name.
    """
    assert p.selection_block is not None
    learned = {name: x.float() for name, x in (drawn.get("compression") or {}).items()}
    pairs = {name: (k[0].float(), v[0].float()) for name, (k, v) in branch_pairs(p, drawn).items()}
    blocks = p.selection_blocks(drawn["q"].shape[1])
    by_head = q.float().unflatten(1, (p.kv_heads, p.group)).permute(1, 2, 0, 3)
    if p.scores == "mean":
        return select_blocks(p, mean_scores(p, by_head, pairs[p.selecting][0], blocks)[0], positions)[0]
    k, v = (
        (drawn[name][0].float() for name in ("k_cmp", "v_cmp")) if p.external else compress(p, *pairs["cmp"], learned)
    )
    visible = visible_compressed(p, positions, len(k))
    _, _, probabilities = attend(by_head, k.transpose(0, 1), v.transpose(0, 1), visible, p.scale)
    return select_blocks(p, block_importance(p, probabilities, blocks), positions)[0]


def query_correlations(
    p: OracleParameters, drawn: Mapping[str, Any], wanted: Mapping[int, float], generator: torch.Generator
) -> dict[int, float]:
    """The correlation of queries, by lag, at which their selections share as many blocks as `wanted` says.

    Measured on pairs of queries of rising correlation, which are `lag` tokens apart. A share below that of independent
    queries gives 0. Raises ValueError if the sequence is too short for a choice.
    """
    assert p.selection_block is not None
    tokens, device, first = drawn["q"].shape[1], drawn["q"].device, p.selection_count * p.selection_block
    if tokens <= first + max(wanted):
        raise ValueError(
            f"tokens: expected more than {first + max(wanted)}, so that queries have a choice, got {tokens}"
        )
    positions = torch.randint(first + max(wanted), tokens, (_PAIRS,), generator=generator, device=device)
    shape = (_PAIRS, p.query_heads, p.head_dim_qk)
    q, other = (torch.randn(shape, generator=generator, device=device) for _ in range(2))

    def chosen(x: Tensor, at: Tensor) -> Tensor:
        return _not_forced(choose_blocks(p, drawn, x, at).long(), at, p.selection_block, p.initial, p.local)[None]

    later, found = chosen(q, positions), {}
    angles = [math.pi / 2 * (1 - i / _ANGLES) for i in range(_ANGLES + 1)]
    for lag, share in wanted.items():
        turned = [math.cos(angle) * q + math.sin(angle) * other for angle in angles]
        shares = [_found(later, chosen(x, positions - lag), later >= 0) for x in turned]
        found[lag] = math.cos(_inverse(torch.tensor(shares).cummax(0).values.tolist(), angles, share))
    return found


def _inverse(values: Sequence[float], at: Sequence[float], wanted: float) -> float:
    """The place where a rising, piecewise linear function with these values takes the wanted one."""
    if wanted <= values[0]:
        return at[0]
    for (low, a), (high, b) in itertools.pairwise(zip(values, at, strict=True)):
        if wanted <= high:
            return b if high == low else a + (b - a) * (wanted - low) / (high - low)
    return at[-1]


def process_weights(correlations: Mapping[int, float]) -> list[float]:
    """Variances of the PROCESSES, which add up to 1, whose sum comes closest to these correlations.

    Of all sets of up to four processes with a least-squares fit without negative variances, the best fit is used.
    """
    lags = [0, *correlations]
    targets = torch.tensor([1.0, *correlations.values()], dtype=torch.float64)
    sure = torch.tensor([1e4] + [1.0] * len(correlations), dtype=torch.float64)  # variances add up to 1
    table = torch.tensor([[process.correlation(lag) for process in PROCESSES] for lag in lags], dtype=torch.float64)
    best, least = [1.0] + [0.0] * (len(PROCESSES) - 1), math.inf
    for size in range(1, len(lags) + 1):
        for some in itertools.combinations(range(len(PROCESSES)), size):
            columns = table[:, some]
            fit = torch.linalg.lstsq(sure[:, None] * columns, sure * targets).solution.clamp(min=0)
            fit = fit / fit.sum().clamp(min=1e-9)
            error = (columns @ fit - targets).square().sum().item()
            if error < least - 1e-12:
                best, least = [0.0] * len(PROCESSES), error
                for i, weight in zip(some, fit.tolist(), strict=True):
                    best[i] = weight
    return best
