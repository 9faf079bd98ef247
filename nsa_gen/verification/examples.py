"""Random examples of a spec: a call and a property, drawn from a seed, run and reported."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nsa_gen.verification.cases import Case, boundary_lengths
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.inputs import kinds_of
from nsa_gen.verification.oracle import argument_suffixes
from nsa_gen.verification.properties import PROPERTIES, Trial
from nsa_gen.verification.report import Row

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

T = TypeVar("T")
PRIMES = (1, 2, 3, 5, 7, 11, 13, 37, 127, 509, 1021)
INTERPRETER_QUERIES = 10
INTERPRETER_KEYS = 260
GPU_TOKENS = 1100


class Pick(Protocol):
    """Chooses one of several options: `random.Random(seed).choice`, or a strategy's draw."""

    def __call__(self, options: Sequence[T], /) -> T: ...


def drawn_case(p: OracleParameters, pick: Pick, *, interpreted: bool) -> Case:
    """A call: batched, late queries behind more keys, or packed with empty and one-token sequences; of any kind.

    Lengths lie around the spec's boundaries or are primes, as far as the interpreter has time for them.
    """
    rows, most = (INTERPRETER_QUERIES, INTERPRETER_KEYS) if interpreted else (GPU_TOKENS, GPU_TOKENS)
    near = {*PRIMES, *boundary_lengths(p)}
    if p.selection_block is not None:
        near |= {(p.selection_count + 4) * p.selection_block - 2, (p.selection_count + 2) * p.selection_block + 2}
    lengths = sorted(length for length in near if length <= rows)
    kind = pick(kinds_of(p))
    forms = ["batched", "packed", *(["late"] if argument_suffixes(p) else [])]
    form = pick(forms)
    if form == "packed":
        parts = pick((1, 2, 3, 4))
        sequences = tuple(pick((0, 1, *lengths)) for _ in range(parts))
        while sum(sequences) > rows + 4 or not any(sequences):
            sequences = (*sequences[:-2], max(1, min(sum(sequences[-2:]) // 2, rows)))
        return Case(sequences, kind=kind, batch=1, twice=False)
    tokens, tokens_kv = pick(lengths), None
    if form == "late":
        tokens_kv = pick([length for length in sorted(near) if tokens <= length <= most])
    batch = pick((1, 2)) if 2 * tokens <= rows else 1
    return Case(tokens, tokens_kv=tokens_kv, kind=kind, batch=batch, twice=False)


def drawn_property(p: OracleParameters, case: Case, pick: Pick) -> str:
    """The name of a property that applies to a case."""
    return pick([name for name, property in PROPERTIES.items() if property.applies(p, case)])


def drawn_trial(
    spec: Spec, module: Any, seed: int, device: str, build: Callable[[Spec], Any] | None
) -> tuple[str, Trial]:
    """The example of a seed: a property's name and the trial to check it on."""
    p, pick = OracleParameters.from_spec(spec), random.Random(seed).choice
    case = drawn_case(p, pick, interpreted=device == "cpu")
    return drawn_property(p, case, pick), Trial(spec, module, case, seed, device, build)


def run_examples(
    spec: Spec,
    module: Any,
    count: int,
    seed: int,
    device: str,
    *,
    build: Callable[[Spec], Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[str], list[Row], list[int]]:
    """Labels and rows of examples `seed`, `seed + 1`, ..., and the seeds of those that failed.

    The example of a seed is the same whatever the run it is part of, so that it can be repeated by itself.
    """
    labels: list[str] = []
    rows: list[Row] = []
    failed: list[int] = []
    for number in range(seed, seed + count):
        name, trial = drawn_trial(spec, module, number, device, build)
        labels.append(f"{name}: {trial.case.label}")
        if progress is not None:
            progress(f"{spec.name}: example {number - seed + 1} of {count}, seed {number}: {labels[-1]}")
        try:
            found = PROPERTIES[name].check(trial)
        except Exception as error:
            error.add_note(f"while verifying {spec.name}, {labels[-1]}, seed {number}")
            raise
        if not all(row.ok for row in found):
            failed.append(number)
        rows += found
    return labels, rows, failed


def reproduction(spec: Spec, seed: int, device: str, dtype: str | None, source: str | None) -> str:
    """The command that repeats the example of one seed; with the spec's text where it has no file."""
    file = source or f"{spec.name}.yaml"
    more = f" --dtype {dtype}" if dtype else ""
    command = f"nsa-gen verify {file} --examples 1 --seed {seed} --device {device}{more}"
    return command if source else f"{command}\nwith {file}:\n{spec.resolved_yaml()}"
