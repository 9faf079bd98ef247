"""The calls with which a spec is verified: lengths around every boundary it has, and inputs of every kind."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nsa_gen.lowering import lower
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.inputs import Inputs, kinds_of, make_inputs
from nsa_gen.verification.reference.oracle import argument_suffixes
from nsa_gen.verification.schedules import Variation, most_unlike_the_defaults, variations, with_chunks

INTERPRETER_LONGEST = 130
INTERPRETER_TOKENS = 180
"""On the CPU, a program instance takes about 10 ms, and there is one per token, KV head and kernel. With this many
tokens, a spec with two KV heads takes less than two minutes."""
INTERPRETER_KEYS = 2600
"""Keys of the cases with few queries. The interpreter takes about 10 ms per 100 keys."""
GPU_LONGEST = 2**16 + 1
"""Tokens and keys of the longest cases on a GPU. The oracle is dense, so longer ones would be slow."""
FEW = 6
"""Queries of the cases that have more past blocks than slots."""
VARIED_KEYS = 600
"""Keys of the cases that run with other schedules, of which there are several."""
FEW_VARIED = 9
"""Queries of the cases that run with other schedules. Some of their lists are cut into two pieces of 16 slots."""
QUICK_NOTE = "a quick run: three small calls and one cache; without --quick far more is exercised"
FORWARD_ONLY = ("nan", "abyss")
"""Kinds of input whose gradients are meaningless: they are NaN, or depend on which probabilities underflow."""


@dataclass(frozen=True)
class Case:
    """One call: `tokens` is Tq, or the lengths of packed sequences.

    `twice` repeats the call to compare bits; the second time, nothing is recomputed. `gradients=False` leaves out the
    backward pass. `variation` says how the package runs, if not with the values in force.
    """

    tokens: int | tuple[int, ...]
    tokens_kv: int | None = None
    kind: str = "gaussian"
    batch: int = 2
    twice: bool = True
    gradients: bool = True
    variation: Variation | None = None

    @property
    def label(self) -> str:
        """A short name for the report."""
        if isinstance(self.tokens, tuple):
            shape = f"packed {'+'.join(map(str, self.tokens))}"
        elif self.tokens_kv is None:
            shape = f"T={self.tokens}"
        else:
            shape = f"Tq={self.tokens} Tkv={self.tokens_kv}"
        kind = "" if self.kind == "gaussian" else f" {self.kind}"
        return f"{shape}{kind}{f', {self.variation.label}' if self.variation else ''}"

    @property
    def rows(self) -> int:
        """Query tokens of all its sequences."""
        return sum(self.tokens) if isinstance(self.tokens, tuple) else self.tokens * self.batch


def inputs_of(spec: Any, case: Case, seed: int, device: str | torch.device) -> Inputs:
    """The inputs of a case, in the spec's dtype."""
    return make_inputs(
        spec,
        batch=case.batch,
        tokens=case.tokens,
        tokens_kv=case.tokens_kv,
        dtype=getattr(torch, spec.dtype),
        device=device,
        seed=seed,
        kind=case.kind,  # type: ignore[arg-type]
    )


def boundary_lengths(p: OracleParameters) -> list[int]:
    """Lengths at which something begins or ends: 1, l, l', w and n * l', their neighbours, and a few primes."""
    found = {1, 2, 37, 1021}
    for size in (p.compression_block, p.selection_block, p.window):
        if size is not None:
            found |= {size - 1, size, size + 1}
    if p.selection_block is not None:
        found |= {p.selection_count * p.selection_block + 1, 2 * p.selection_block + 3}
    return sorted(length for length in found if length >= 1)


def default_cases(
    spec: Any,
    *,
    interpreted: bool,
    lengths: Sequence[int] | None,
    packed: bool,
    batch: int,
    gradients: bool = True,
    quick: bool = False,
) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """The cases of a spec, and notes on what was left out. `lengths` replaces the boundary lengths.

    `gradients`: there is a backward pass, whose branches may be recomputed. `quick`: only three small calls.
    """
    p = OracleParameters.from_spec(spec)
    if quick:
        return _quick_cases(p, packed), (QUICK_NOTE,)
    notes: list[str] = []
    block = p.selection_block or p.compression_block or 64
    slow = "the interpreter is slow; verify on a GPU" if interpreted else "the dense oracle is slow"
    if lengths is not None:
        chosen = list(lengths)
    elif not interpreted:
        chosen = [length for length in boundary_lengths(p) if length <= GPU_LONGEST]
        if len(chosen) < len(boundary_lengths(p)):
            notes.append(f"lengths above {GPU_LONGEST} were left out: {slow}")
    else:
        chosen, left_out = _affordable(p)
        if left_out:
            notes.append(
                f"lengths {', '.join(map(str, left_out))} were left out: the interpreter is slow; "
                "name them with lengths, or verify on a GPU"
            )
    if interpreted:
        batch = 1
    cases = [Case(length, batch=batch, twice=not interpreted) for length in chosen]
    middle = min(INTERPRETER_LONGEST // 2, block + 5) if interpreted else 3 * block + 7
    if argument_suffixes(p):
        cases.append(Case(3, tokens_kv=middle + 2, batch=batch, twice=not interpreted))
    if packed:
        tail = (p.compression_block or 5) + 3
        cases.append(Case((min(block + 3, middle), 0, 1, tail), twice=not interpreted))
    if interpreted:
        cases.append(Case(middle, kind="strided", batch=2, twice=False))
        cases += [Case(middle, kind=kind, batch=1, twice=False) for kind in ("spread", "nan")]
    else:
        cases += [Case(middle, kind=kind, batch=batch) for kind in kinds_of(p) if kind != "gaussian"]
    contested, left_out_keys = _contested(p, interpreted, batch)
    program = lower(spec)
    ways = variations(program, interpreted, gradients and "backward" in spec.passes)

    def varied(case: Case, way: Variation | None) -> Case:
        assert way is not None
        return replace(case, variation=with_chunks(program, way, case.rows))

    if lengths is None:
        if packed and (chosen_inside := _contested_inside(p)) is not None:
            if sum(chosen_inside) <= (INTERPRETER_LONGEST if interpreted else GPU_LONGEST):
                cases.append(Case(chosen_inside, batch=1, twice=not interpreted, gradients=not interpreted))
            else:
                notes.append(
                    f"packed {'+'.join(map(str, chosen_inside))}, a sequence of more blocks than slots, was left out: "
                    f"{slow}"
                )
        turns = itertools.islice(itertools.cycle(ways), 3, None)
        cases += contested if interpreted else [varied(*each) for each in zip(contested, turns, strict=False)]
        calls = _varied_calls(p, interpreted, packed, middle, len(ways))
        cases += [varied(*each) for each in zip(calls, ways, strict=True)]
        if left_out_keys:
            notes.append(f"cases with up to {left_out_keys} keys, more blocks than slots, were left out: {slow}")
    elif p.selection_block is not None:
        rows = min(middle, FEW_VARIED) if interpreted else middle
        case = Case(rows, tokens_kv=_late(p, middle + 2), batch=batch)
        cases.append(varied(case, most_unlike_the_defaults(program, ways)))
    return tuple(cases), tuple(notes)


def _quick_cases(p: OracleParameters, packed: bool) -> tuple[Case, ...]:
    """A sequence longer than one selection block, few queries at the end of many keys, and packed sequences."""
    block = p.selection_block or p.compression_block or 16
    few = Case(FEW_VARIED, tokens_kv=_late(p, 2 * block + 3), kind="spread", batch=1, twice=False)
    sequences = [Case((block // 2 + 3, 0, 1, 5), batch=1, twice=False)] if packed else []
    return Case(block + 1, batch=1, twice=False), few, *sequences


def _late(p: OracleParameters, keys: int) -> int | None:
    """Tkv of a call with few queries. None, which means Tq, if no branch reads raw keys."""
    return keys if argument_suffixes(p) else None


def _varied_calls(p: OracleParameters, interpreted: bool, packed: bool, middle: int, count: int) -> list[Case]:
    """Small calls, one for each way to run a package: few queries with many keys, packed sequences, a batch.

    Of eight numbers, the three of packed calls cover each choice of schedule, and each branch recomputed and not.
    """
    rows = FEW_VARIED if interpreted else min(middle, 200)
    keys = middle + 2
    if p.selection_block is not None and (many := _boundary_keys(p)) <= (VARIED_KEYS if interpreted else many):
        keys = many
    twice = not interpreted
    late = Case(rows, tokens_kv=_late(p, keys), kind="counts" if p.indices_given else "gaussian", batch=1, twice=twice)
    batched = Case(rows // 2, tokens_kv=_late(p, middle + 2), batch=2)
    sequences = [Case(lengths, batch=1, twice=not interpreted) for lengths in packed_offsets(p, interpreted)]
    if not packed:
        sequences = [batched]
    forms = "lbpLbppl" if count == 8 else "lppp"
    found: list[Case] = []
    for number in range(count):
        form = forms[number % len(forms)]
        if form == "p":
            found.append(sequences[sum(case in sequences for case in found) % len(sequences)])
        else:
            found.append({"l": late, "L": replace(late, kind="late"), "b": batched}[form])
    return found


def packed_offsets(p: OracleParameters, interpreted: bool) -> list[tuple[int, ...]]:
    """Lengths of packed sequences whose complete compressed blocks begin at tokens of every remainder by the stride.

    Returns as many batches as the interpreter has time for, or one. In a batch for the interpreter, the second sequence
    has two complete blocks, because with one block, scores have no gradient.
    """
    block, stride = p.compression_block or 8, p.compression_stride or 1
    if not interpreted:
        return [(block + 1,) * max(2, stride)]
    firsts = sorted({1, max(1, stride // 2), max(1, stride - 1)})
    return [(first, block + stride) for first in firsts]


def _contested_inside(p: OracleParameters) -> tuple[int, int] | None:
    """Lengths of packed sequences of which the second begins inside a stride and has more blocks than slots."""
    if p.selection_block is None or not p.computed:
        return None
    stride = p.compression_stride if p.scores == "compression" else p.selection_block
    return max(1, (stride or 1) - 1), p.selection_count * p.selection_block + p.selection_block * 3 // 4


def start_remainders(p: OracleParameters, tokens: tuple[int, ...]) -> set[int]:
    """The remainders, by the stride, of the tokens at which packed sequences with complete blocks begin."""
    starts = zip(itertools.accumulate((0, *tokens)), tokens, strict=False)
    return {start % (p.compression_stride or 1) for start, length in starts if p.compressed_blocks(length)}


def _boundary_keys(p: OracleParameters) -> int:
    """Tkv with more blocks than slots, and with a last compressed block that extends past the last block's start."""
    assert p.selection_block is not None
    return (p.selection_count + 3) * p.selection_block + (p.compression_stride or 4)


def _contested(p: OracleParameters, interpreted: bool, batch: int) -> tuple[list[Case], int]:
    """Cases with few queries and more blocks than slots, so that importance decides; and the keys, if too many, or 0.

    With Tkv = (n + 2) l' + 2, a NaN two thirds into the keys makes every importance NaN except that of the last
    queries' own block, of which nothing is visible yet. In kind late, the keys that stand out are in a compressed block
    that extends into the last selection block. The block's first queries share a tile with one that sees it, but must
    not see it.
    """
    if p.selection_block is None:
        return [], 0
    block, count = p.selection_block, p.selection_count
    many, torn = (count + 4) * block - 2, (count + 2) * block + 2
    if many > (INTERPRETER_KEYS if interpreted else GPU_LONGEST):
        return [], many
    rows = FEW if interpreted else max(FEW, min(4 * block, 256))
    twice = not interpreted
    if p.indices_given:
        return [Case(rows, many, kind, batch, twice) for kind in ("gaussian", "counts")], 0
    found = [Case(rows + 2, many, "gaussian", batch, twice), Case(rows + 2, _boundary_keys(p), "late", batch, twice)]
    found += [Case(rows, many, kind, batch, twice) for kind in ("ties", "abyss") if kind in kinds_of(p)]
    return [*found, Case(min(rows, torn), torn, "nan", batch, twice)], 0


def _affordable(p: OracleParameters) -> tuple[list[int], list[int]]:
    """The boundary lengths that the interpreter has time for, the most important first, and the remaining ones."""
    lengths = boundary_lengths(p)
    short, selection, window = (size or 0 for size in (p.compression_block, p.selection_block, p.window))
    telling = (1, short, selection + 1, window + 1, 37, short - 1, selection, window, selection - 1, window - 1)
    order = [length for length in dict.fromkeys(telling) if length in lengths]
    order += [length for length in lengths if length not in order]
    taken: list[int] = []
    for length in order:
        if length <= INTERPRETER_LONGEST and sum(taken) + length <= INTERPRETER_TOKENS:
            taken.append(length)
    return sorted(taken), [length for length in lengths if length not in taken]
