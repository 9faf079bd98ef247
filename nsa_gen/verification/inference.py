"""Compare prefill and decode with a cache, step by step, with the dense oracle.

A `Scenario` is a cache and what happens to it: tokens are added, alone or in chunks, with or without attention; tokens
are removed; sequences begin as copies of others. The oracle knows each sequence as the plain list of its tokens.
Whatever the cache does in between, each output must be that of one long forward.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_gen.verification.calls import Call, steady_products
from nsa_gen.verification.cases import GPU_LONGEST, Case, boundary_lengths, inputs_of
from nsa_gen.verification.checking import check_call
from nsa_gen.verification.drawing import Pick
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.gradients import References
from nsa_gen.verification.reference.inputs import Inputs, make_indices
from nsa_gen.verification.reference.oracle import SINKS, argument_suffixes, reference_attention
from nsa_gen.verification.report import Row

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

PAGE_SIZES = (16, 32, 64, 128, 256)
OF_QUERIES = ("q", "q_idx", "gates")
"""A token's tensors that a cache does not keep."""
POOL = 512
"""Tokens drawn at a time."""
FIXED_KEYS = 2600
"""Most tokens of the fixed scenarios: as many as the interpreter has time for."""
SCENARIOS = {"cpu": 1, "cuda": 12}
"""The number of drawn scenarios that `verify` runs on each kind of device."""


@dataclass(frozen=True)
class Step:
    """One step of a scenario.

    `kind` is "fill" (tokens are written), "prefill" or "decode" (tokens are written and attended to), "truncate" or
    "fork". `counts` are the new tokens of each sequence, or the tokens kept; for a fork: source, target and tokens.
    """

    kind: str
    counts: tuple[int, ...]

    @property
    def text(self) -> str:
        """The step in short: `decode 1 1`."""
        return " ".join((self.kind, *map(str, self.counts)))


@dataclass(frozen=True)
class Scenario:
    """A cache and the steps it goes through. Without `page_size`, the cache is contiguous."""

    batch: int
    capacity: int
    page_size: int | None
    steps: tuple[Step, ...]
    kind: str = "gaussian"
    seed: int = 0

    @property
    def text(self) -> str:
        """The scenario in one line."""
        layout = "contiguous" if self.page_size is None else f"pages of {self.page_size}"
        kind = "" if self.kind == "gaussian" else f" {self.kind}"
        return f"B={self.batch} {layout}{kind}: {', '.join(step.text for step in self.steps)}"


def drawn_scenario(p: OracleParameters, pick: Pick, *, interpreted: bool, seed: int = 0) -> Scenario:
    """A random scenario: its lengths lie around the spec's boundaries, and its steps are of every kind."""
    batch = pick((1, 2) if interpreted else (1, 2, 3))
    longest = (70 if interpreted else 700) + (p.selection_count + 3) * (p.selection_block or 16)
    capacity = min(longest, 400 if interpreted else GPU_LONGEST)
    near = [length for length in boundary_lengths(p) if length <= capacity - 40]
    kind = pick(("gaussian", "gaussian", "spread", "ties" if p.selection_block and not p.indices_given else "gaussian"))
    lengths = [0] * batch
    steps: list[Step] = []

    def grow(kind: str, counts: list[int]) -> None:
        counts = [min(count, capacity - held) for count, held in zip(counts, lengths, strict=True)]
        if any(counts):
            lengths[:] = [held + more for held, more in zip(lengths, counts, strict=True)]
            steps.append(Step(kind, tuple(counts)))

    most = 6 if interpreted else 400
    if pick((True, False)):
        grow("prefill", [pick((0, 1, 3, most)) for _ in range(batch)])
    grow("fill", [pick(near) + pick((0, 0, 1, 2)) for _ in range(batch)])
    for _ in range(pick((2, 3)) if interpreted else pick((4, 6, 9))):
        choice = pick(("decode", "decode", "decode", "prefill", "fill", "truncate", "fork"))
        if choice == "decode":
            new = pick((1, 1, 1, 2, 3, 8))
            new = min(new, 3) if interpreted else new
            grow("decode", [new if pick((True, True, True, False)) else pick((0, new)) for _ in range(batch)])
        elif choice in ("prefill", "fill"):
            grow(choice, [pick((0, 1, 5, most)) for _ in range(batch)])
        elif choice == "truncate":
            kept = tuple(max(0, held - pick((0, 1, 2, 7, p.compression_stride or 4))) for held in lengths)
            steps.append(Step("truncate", kept))
            lengths[:] = kept
        elif batch > 1:
            source, target = (0, 1) if pick((True, False)) else (1, 0)
            kept_tokens = max(0, lengths[source] - pick((0, 0, 1, 9)))
            steps.append(Step("fork", (source, target, kept_tokens)))
            lengths[target] = kept_tokens
    grow("decode", [1] * batch)
    page_size = pick((None, *(PAGE_SIZES[:3] if interpreted else PAGE_SIZES)))
    return Scenario(batch, capacity, page_size, tuple(steps), kind, seed)


def scenario_of_seed(spec: Spec, seed: int, device: str) -> Scenario:
    """The scenario of a seed. It depends on nothing else."""
    pick = random.Random(f"inference {seed}").choice
    return drawn_scenario(OracleParameters.from_spec(spec), pick, interpreted=device == "cpu", seed=seed)


def fixed_scenarios(p: OracleParameters) -> tuple[Scenario, ...]:
    """Scenarios for every kind of cache, contiguous and with pages of every size. Two have more blocks than slots.

    Tokens are added one and several at a time, to one sequence and to several of different lengths, which share pages.
    """
    many = min((p.selection_count + 1) * (p.selection_block or 16) + 5, FIXED_KEYS)
    few = min(many, (p.selection_block or 16) + 9)

    def scenario(batch: int, page_size: int | None, *steps: Step) -> Scenario:
        return Scenario(batch, many + 40, page_size, steps)

    ones = Step("decode", (1, 1))
    return (
        scenario(1, None, Step("fill", (many,)), Step("decode", (1,)), Step("decode", (3,))),
        scenario(
            2, PAGE_SIZES[0], Step("fill", (many, few)), ones, Step("fork", (0, 1, many - 3)),
            Step("truncate", (many, many - 4)), ones,
        ),
        scenario(1, PAGE_SIZES[-1], Step("fill", (few,)), Step("prefill", (5,)), Step("decode", (2,))),
        *(scenario(1, size, Step("fill", (few,)), Step("decode", (1,))) for size in PAGE_SIZES[1:-1]),
    )  # fmt: skip


class _Sequence:
    """The truth about one sequence: its tokens' tensors by name, and compressed blocks given by the caller."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @property
    def length(self) -> int:
        """The number of tokens."""
        return next(x.shape[0] for name, x in self.tensors.items() if not name.endswith("_cmp"))

    def first(self, p: OracleParameters, tokens: int) -> _Sequence:
        """A new sequence of the first `tokens` tokens."""
        blocks = p.compressed_blocks(tokens)
        return _Sequence({n: x[: blocks if n.endswith("_cmp") else tokens] for n, x in self.tensors.items()})


class _Source:
    """An endless supply of a spec's tokens, drawn a pool at a time. Tied keys are of one pool and repeat by position.

    `parameters` are phi's and `sinks` are the spec's, both of the first pool. `scales` are those of a cache's codes, by
    the name of the tensor. Numbers beyond two or five saturate.
    """

    def __init__(self, spec: Spec, scenario: Scenario, device: str) -> None:
        self._spec, self._scenario, self._device = spec, scenario, device
        self._pools = 0
        self.generator = torch.Generator().manual_seed(scenario.seed)
        made = self._draw()
        self.parameters = made.compression
        self.sinks = {name: x for name in SINKS if (x := getattr(made, name)) is not None}
        coded = [name for name in self._pool if name[:1] in "kv" and not name.endswith(("_cmp", "_idx"))]
        coded = coded if spec.cache else []
        heads = spec.heads.kv
        self.scales = {name: (0.005 + 0.007 * torch.rand(heads, generator=self.generator)).to(device) for name in coded}

    @property
    def _tied(self) -> bool:
        return self._scenario.kind == "ties"

    def _draw(self) -> Inputs:
        self._pools += 1
        seed = self._scenario.seed + (0 if self._tied else 7919 * self._pools)
        made = inputs_of(self._spec, Case(POOL, kind=self._scenario.kind, batch=1), seed, self._device)
        skipped = {"do", "compression", "indices", "counts", "cu_seqlens", *SINKS}
        self._pool = {name: x[0] for name, x in made.arguments().items() if x is not None and name not in skipped}
        self._used = 0
        return made

    def take(self, position: int, tokens: int, blocks: int) -> dict[str, Tensor]:
        """Tensors of new tokens, and of the compressed blocks that they complete."""
        if not self._tied and self._used + tokens > POOL:
            self._draw()
        first = position % (POOL // 2) if self._tied else self._used
        self._used += tokens
        taken = {}
        for name, x in self._pool.items():
            rows = torch.arange(blocks if name.endswith("_cmp") else tokens, device=x.device)
            taken[name] = x[(rows + first) % x.shape[0]]
        return taken


def run_scenario(spec: Spec, module: Any, scenario: Scenario, device: str) -> list[Row]:
    """Run a scenario. Returns the comparisons of every step that attends, one sequence at a time."""
    if device == "cpu":
        steady_products()
    p = OracleParameters.from_spec(spec)
    source = _Source(spec, scenario, device)
    widest = max((max(step.counts) for step in scenario.steps if step.kind == "decode"), default=1)
    cache = module.NSACache(
        scenario.batch, scenario.capacity, page_size=scenario.page_size, max_new_tokens=widest, device=device
    )
    if source.scales:
        cache.set_scales(**source.scales)
    nothing = _Sequence(source.take(0, 1, 1)).first(p, 0)
    sequences = [nothing.first(p, 0) for _ in range(scenario.batch)]
    rows: list[Row] = []
    for number, step in enumerate(scenario.steps):
        if step.kind == "truncate":
            # Every other time on the device, so that the host does not see the lengths.
            kept = torch.tensor(step.counts, dtype=torch.int32, device=device) if number % 2 else list(step.counts)
            cache.truncate(kept)
            sequences = [each.first(p, tokens) for each, tokens in zip(sequences, step.counts, strict=True)]
        elif step.kind == "fork":
            origin, target, tokens = step.counts
            cache.fork(origin, target, tokens)
            sequences[target] = sequences[origin].first(p, tokens)
        else:
            label = f"{scenario.text[:60]} | step {number + 1}: {step.text}"
            rows += _advance(p, module, cache, sequences, step, source, label)
    return rows


def _advance(
    p: OracleParameters,
    module: Any,
    cache: Any,
    sequences: list[_Sequence],
    step: Step,
    source: _Source,
    label: str,
) -> list[Row]:
    """Add new tokens to the cache and to the truth and, if the step attends, compare both."""
    taken = []
    for sequence, count in zip(sequences, step.counts, strict=True):
        before = sequence.length
        taken.append(source.take(before, count, p.compressed_blocks(before + count) - p.compressed_blocks(before)))
        for name, x in taken[-1].items():
            held = coded(x, source.scales[name]) if name in source.scales else x
            sequence.tensors[name] = torch.cat((sequence.tensors[name], held))
    padded = {name: _pad([each[name] for each in taken]) for name in taken[0]}
    learned = {} if source.parameters is None else {"compression": module.CompressionParameters(**source.parameters)}
    uniform = len(set(step.counts)) == 1
    cache.extend(step.counts[0] if uniform else list(step.counts))
    cache.write(**{name: x for name, x in padded.items() if name not in OF_QUERIES}, **learned)
    if step.kind == "fill":
        return []
    given: dict[str, Tensor] = {}
    if p.indices_given:
        lists = [
            make_indices(p, torch.arange(sequence.length - count, sequence.length), source.generator, False)
            for sequence, count in zip(sequences, step.counts, strict=True)
        ]
        given["indices"] = _pad(lists, -1).to(padded["q"].device)
    attend = module.nsa_decode if step.kind == "decode" else module.nsa_prefill
    others = {name: padded[name] for name in OF_QUERIES[1:] if name in padded}
    o, aux = attend(padded["q"], cache, **others, **given, **source.sinks, return_aux=True)
    found: list[Row] = []
    for b, (sequence, count) in enumerate(zip(sequences, step.counts, strict=True)):
        found += _padding(f"{label} | sequence {b}", o[b, count:])
        if count:
            lists = {name: x[b : b + 1, :count] for name, x in given.items()}
            shown = {name: x[b : b + 1, :count] for name, x in aux._asdict().items()}
            told = replace(_inputs(p, sequence, count, source), **lists)
            found += _compare(p, told, o[b : b + 1, :count], shown, f"{label} | sequence {b}")
    return found


def coded(x: Tensor, scale: Tensor) -> Tensor:
    """What a cache of e4m3 codes holds of x (tokens, Hkv, D): x over its head's scale (Hkv,), rounded and saturated."""
    codes = (x.float() * (1.0 / scale)[:, None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return (codes.float() * scale[:, None]).to(x.dtype)


def _pad(parts: list[Tensor], value: float = math.nan) -> Tensor:
    """Rows of all sequences as (B, most rows, ...), padded with NaN, so that reading padding shows, or with `value`."""
    whole = parts[0].new_full((len(parts), max(x.shape[0] for x in parts), *parts[0].shape[1:]), value)
    for b, x in enumerate(parts):
        whole[b, : x.shape[0]] = x
    return whole


def _padding(label: str, o: Tensor) -> list[Row]:
    """Check the rows that pad the batch: o is 0."""
    wrong = int((o != 0).sum())
    problem = "o is not 0" if wrong else ""
    return [Row(label, "padding", "elements", float(wrong), 0.0, not wrong, problem)] if o.shape[0] else []


def _inputs(p: OracleParameters, sequence: _Sequence, count: int, source: _Source) -> Inputs:
    """The same as one call: every key of the sequence, and the queries of the newest tokens.

    If no branch reads raw keys, there are as many keys as queries, so the call has all queries.
    """
    arguments: dict[str, Any] = {}
    rows = count if argument_suffixes(p) else sequence.length
    for name, x in sequence.tensors.items():
        arguments[name] = (x[-rows:] if name in OF_QUERIES else x)[None]
    do = arguments["q"].new_zeros((1, rows, p.query_heads, p.head_dim_v))
    return Inputs(do=do, compression=source.parameters, **source.sinks, **arguments)


def _compare(p: OracleParameters, inputs: Inputs, o: Tensor, aux: dict[str, Tensor], label: str) -> list[Row]:
    """The rows of `verify` for a call that was already made. For earlier queries, o is the oracle's."""
    if inputs.q.shape[1] > o.shape[1]:
        whole = reference_attention(p, **inputs.arguments()).tensors()
        earlier = inputs.q.shape[1] - o.shape[1]
        aux = {name: torch.cat((whole[name][:, :earlier].to(x.dtype), x), 1) for name, x in aux.items()}
        o = torch.cat((whole["o"][:, :earlier], o), 1)
    case = Case(inputs.q.shape[1], batch=1, twice=False, gradients=False)
    rows = check_call(p, case, inputs, Call(o, aux, {}), References())
    return [replace(row, case=label) for row in rows]
