"""Which calls a spec is verified with: lengths around every boundary it has, and inputs of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.inputs import kinds_of
from nsa_gen.verification.oracle import argument_suffixes

INTERPRETER_LONGEST = 130
INTERPRETER_TOKENS = 180
"""On the CPU a program instance costs about 10 ms, and there is one a token, KV head and kernel: with these a spec of
two KV heads stays below two minutes."""
INTERPRETER_KEYS = 2600
"""Keys of the cases with few queries, of which the interpreter takes some 10 ms for 100."""
FEW = 6
"""Queries of the cases that put more blocks in the past than there are slots."""


FORWARD_ONLY = ("nan", "abyss")
"""Kinds of input whose gradients say nothing: they are NaN, or decided by which probabilities underflow."""


@dataclass(frozen=True)
class Case:
    """One call: `tokens` is Tq, or the lengths of packed sequences.

    `twice` repeats it to compare bits; `gradients=False` leaves out the backward pass; `other_schedules` calls the
    package by the schedules that are not its defaults.
    """

    tokens: int | tuple[int, ...]
    tokens_kv: int | None = None
    kind: str = "gaussian"
    batch: int = 2
    twice: bool = True
    gradients: bool = True
    other_schedules: bool = False

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
        return f"{shape}{kind}{', other schedules' if self.other_schedules else ''}"


def boundary_lengths(p: OracleParameters) -> list[int]:
    """Lengths at which something begins or ends: 1, l, l', w and n * l' with their neighbours, and a few primes."""
    found = {1, 2, 37, 1021}
    for size in (p.compression_block, p.selection_block, p.window):
        if size is not None:
            found |= {size - 1, size, size + 1}
    if p.selection_block is not None:
        found |= {p.selection_count * p.selection_block + 1, 2 * p.selection_block + 3}
    return sorted(length for length in found if length >= 1)


def default_cases(
    spec: Any, *, interpreted: bool, lengths: Sequence[int] | None, packed: bool, batch: int
) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """The cases of a spec and notes on what was left out. `lengths` replaces the boundary lengths."""
    p = OracleParameters.from_spec(spec)
    notes: list[str] = []
    block = p.selection_block or p.compression_block or 64
    if lengths is not None:
        chosen = list(lengths)
    elif not interpreted:
        chosen = boundary_lengths(p)
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
        cases.append(Case((min(block + 3, middle), 0, 1, tail)))
    if interpreted:
        cases.append(Case(middle, kind="strided", batch=2, twice=False))
        cases += [Case(middle, kind=kind, batch=1, twice=False) for kind in ("spread", "nan")]
    else:
        cases += [Case(middle, kind=kind, batch=batch) for kind in kinds_of(p) if kind != "gaussian"]
    if p.selection_block is not None:
        rows = min(middle, 11) if interpreted else middle
        late = middle + 2 if argument_suffixes(p) else None
        cases.append(Case(rows, tokens_kv=late, batch=batch, twice=not interpreted, other_schedules=True))
    if lengths is None:
        contested, left_out = _contested(p, interpreted, batch)
        cases += contested
        if left_out:
            notes.append(
                f"cases with up to {left_out} keys, more blocks than slots, were left out: the interpreter is slow; "
                "verify on a GPU"
            )
    return tuple(cases), tuple(notes)


def _contested(p: OracleParameters, interpreted: bool, batch: int) -> tuple[list[Case], int]:
    """Few queries behind more blocks than there are slots, so that importance decides, and how many keys are too many.

    With Tkv = (n + 2) l' + 2 a NaN two thirds into the keys makes every importance NaN but that of the last queries'
    own block, of which nothing is visible yet.
    """
    if p.selection_block is None:
        return [], 0
    block, count = p.selection_block, p.selection_count
    many, torn = (count + 4) * block - 2, (count + 2) * block + 2
    if interpreted and many > INTERPRETER_KEYS:
        return [], many
    rows = FEW if interpreted else max(FEW, min(4 * block, 256))
    twice = not interpreted
    if p.indices_given:
        return [Case(rows, many, kind, batch, twice, twice or kind == "counts") for kind in ("gaussian", "counts")], 0
    found = [Case(rows + 2, many, "gaussian", batch, twice, not interpreted)]
    found += [Case(rows, many, kind, batch, twice, not interpreted) for kind in ("ties", "abyss")]
    return [*found, Case(min(rows, torn), torn, "nan", batch, twice, False)], 0


def _affordable(p: OracleParameters) -> tuple[list[int], list[int]]:
    """The boundary lengths that the interpreter has time for, the most telling first, and those it has not."""
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
