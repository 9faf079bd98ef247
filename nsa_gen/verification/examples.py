"""Random examples of a spec: a call and a property, drawn from a seed, run, shrunk, and repeated from their text."""

from __future__ import annotations

import random
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from nsa_gen.verification.cases import Case, boundary_lengths
from nsa_gen.verification.drawing import Pick
from nsa_gen.verification.properties import PROPERTIES, Trial
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.inputs import KINDS, kinds_of
from nsa_gen.verification.reference.oracle import argument_suffixes
from nsa_gen.verification.report import Row, raised
from nsa_gen.verification.schedules import drawn_schedules

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

PRIMES = (1, 2, 3, 5, 7, 11, 13, 37, 127, 509, 1021)
INTERPRETER_QUERIES = 10
INTERPRETER_KEYS = 260
GPU_TOKENS = 1100

Build = Callable[["Spec"], Any]
"""Generates and imports the package of a spec."""


@dataclass(frozen=True)
class Example:
    """One call of a package, the seed of its inputs, and the property that it must have."""

    property: str
    case: Case
    seed: int

    @property
    def text(self) -> str:
        """Property and call in the form that `parse_example` reads: `oracle: B=2 T=21 spread`."""
        batch = "" if isinstance(self.case.tokens, tuple) else f"B={self.case.batch} "
        return f"{self.property}: {batch}{self.case.label}"

    @property
    def label(self) -> str:
        """Its name in a row of the report."""
        return self.case.label

    def check(self, spec: Spec, module: Any, device: torch.device, build: Build | None) -> list[Row]:
        """Its rows, with schedules drawn from its seed."""
        trial = Trial(spec, module, self.case, self.seed, device.type, build)
        with drawn_schedules(module, device, self.seed):
            return PROPERTIES[self.property].check(trial)

    def applies(self, p: OracleParameters, device: str) -> bool:
        """Whether a spec can have this call, and the property is meaningful for it on a device."""
        possible = self.case.kind in kinds_of(p) and (self.case.tokens_kv is None or bool(argument_suffixes(p)))
        return possible and _applies(self.property, p, self.case, device)


@dataclass(frozen=True)
class ExampleResult:
    """An example and its rows; an exception is also a row."""

    example: Example
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether something was compared, and everything is within its bound."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def failing(self) -> frozenset[str]:
        """The quantities that are wrong."""
        return frozenset(row.quantity for row in self.rows if not row.ok)


_SHAPE = re.compile(
    r"(?P<property>\w+): "
    r"(packed (?P<packed>\d{1,9}(\+\d{1,9})*)|"
    r"B=(?P<batch>\d{1,9}) (T=(?P<tokens>\d{1,9})|Tq=(?P<q>\d{1,9}) Tkv=(?P<kv>\d{1,9})))"
    r"( (?P<kind>\w+))?",
    re.ASCII,
)


def parse_example(text: str, seed: int) -> Example:
    """The example that `Example.text` describes. Raises ValueError if the text describes none."""
    found = _SHAPE.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"example: expected a property and a call such as 'oracle: B=2 T=21 spread', 'oracle: B=1 Tq=3 Tkv=20' or "
            f"'packed: packed 3+0+9', got {text!r}"
        )
    name, kind = found["property"], found["kind"] or "gaussian"
    if name not in PROPERTIES:
        raise ValueError(f"example: expected a property out of {', '.join(PROPERTIES)}, got {name!r}")
    if kind not in KINDS:
        raise ValueError(f"example: expected a kind of input out of {', '.join(KINDS)}, got {kind!r}")
    if found["packed"] is not None:
        lengths = tuple(int(length) for length in found["packed"].split("+"))
        return Example(name, Case(lengths, kind=kind, batch=1, twice=False), seed)
    tokens, tokens_kv = (found["tokens"], None) if found["tokens"] else (found["q"], int(found["kv"]))
    if tokens_kv is not None and tokens_kv < int(tokens):
        raise ValueError(f"example: expected Tkv of at least Tq, got {text!r}")
    case = Case(int(tokens), tokens_kv=tokens_kv, kind=kind, batch=int(found["batch"]), twice=False)
    return Example(name, case, seed)


def require_example(spec: Spec, text: str, seed: int, device: str) -> Example:
    """The example that `text` describes. Raises ValueError if it describes none, or none that applies to the spec."""
    example = parse_example(text, seed)
    if not example.applies(OracleParameters.from_spec(spec), device):
        raise ValueError(f"example: expected a property and a call that {spec.name} can have on {device}, got {text!r}")
    return example


def drawn_case(p: OracleParameters, pick: Pick, *, interpreted: bool) -> Case:
    """A random call: batched, with fewer queries than keys, or packed; sometimes empty; of any kind of input.

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
        while sum(sequences) > rows + 4:
            sequences = (*sequences[:-2], max(1, min(sum(sequences[-2:]) // 2, rows)))
        return Case(sequences, kind=kind, batch=1, twice=False)
    tokens, tokens_kv = pick((*lengths, *lengths, 0)), None
    if form == "late":
        tokens_kv = pick([length for length in sorted(near) if tokens <= length <= most])
    batch = pick((1, 2, 1, 2, 1, 2, 0)) if 2 * tokens <= rows else 1
    return Case(tokens, tokens_kv=tokens_kv, kind=kind, batch=batch, twice=False)


def drawn_property(p: OracleParameters, case: Case, pick: Pick, device: str) -> str:
    """The name of a random property that applies to a case on a device, "cpu" or "cuda"."""
    return pick([name for name in PROPERTIES if _applies(name, p, case, device)])


def _applies(name: str, p: OracleParameters, case: Case, device: str) -> bool:
    property = PROPERTIES[name]
    return property.applies(p, case) and (device == "cuda" or not property.cuda)


def drawn_example(spec: Spec, seed: int, device: str) -> Example:
    """The example of a seed. It depends on nothing else."""
    p, pick = OracleParameters.from_spec(spec), random.Random(seed).choice
    case = drawn_case(p, pick, interpreted=device == "cpu")
    return Example(drawn_property(p, case, pick, device), case, seed)


def run_example(spec: Spec, module: Any, example: Example, device: str, build: Build | None = None) -> ExampleResult:
    """Check an example. An exception, of the package or of a CUDA device, is a failed row with its message."""
    try:
        rows = example.check(spec, module, torch.device(device), build)
    except Exception as error:
        rows = [raised(example.label, error)]
    return ExampleResult(example, tuple(rows))


def reproduction(spec: Spec, example: Example, device: str, dtype: str | None, source: str | None) -> str:
    """The command that repeats an example, together with the spec's text if it has no file."""
    file = source or f"{spec.name}.yaml"
    more = f" --dtype {dtype}" if dtype else ""
    told = shlex.quote(example.text)
    command = f"nsa-gen verify {file} --example {told} --seed {example.seed} --device {device}{more}"
    return command if source else f"{command}\nwith {file}:\n{spec.resolved_yaml()}"


# Shrinking finds, for a failing example, a smaller one that fails in the same way: first a smaller call, then a simpler
# spec. It is greedy: of the simpler examples next to the current one, the first that still fails replaces it, until
# none does or time is up. "Still fails" means that one of the same quantities is wrong under the same property.

SECONDS = 60.0
"""Seconds to search for something smaller. The interpreter needs some seconds per try."""


@dataclass(frozen=True)
class Shrunk:
    """The smallest failing example found, its spec, and how many others were tried."""

    spec: Spec
    result: ExampleResult
    tries: int


def shrink(
    spec: Spec,
    failed: ExampleResult,
    device: str,
    run: Callable[[Spec, Example], ExampleResult],
    *,
    vary_spec: bool = False,
    seconds: float = SECONDS,
    progress: Callable[[str], None] | None = None,
) -> Shrunk:
    """Shrink a failed example of a package; `run` runs an example of a spec.

    With `vary_spec`, the spec is simplified too. This is right if the generator made the package, because other
    packages then have the same fault. If the package's origin is unknown, its spec is kept.
    """
    until = time.monotonic() + seconds
    best = Shrunk(spec, failed, 0)

    def fails(other: Spec, example: Example) -> bool:
        nonlocal best
        if time.monotonic() >= until or not example.applies(OracleParameters.from_spec(other), device):
            return False
        best = replace(best, tries=best.tries + 1)
        if progress is not None:
            progress(f"{other.name}: smaller? try {best.tries}: {example.text}")
        found = run(other, example)
        if not found.failing & failed.failing:
            return False
        best = replace(best, spec=other, result=found)
        return True

    def smaller_calls() -> Iterator[tuple[Spec, Example]]:
        example = best.result.example
        return ((best.spec, replace(example, case=case)) for case in smaller_cases(example.case))

    def with_simpler_specs() -> Iterator[tuple[Spec, Example]]:
        example = best.result.example
        return ((simpler, example) for simpler in simpler_specs(best.spec))

    def descend(candidates: Callable[[], Iterator[tuple[Spec, Example]]]) -> bool:
        """Move to the first candidate that fails until none does. Returns whether any did."""
        before = best.result
        while any(fails(other, example) for other, example in candidates()):
            pass
        return best.result is not before

    descend(smaller_calls)
    if vary_spec and descend(with_simpler_specs):
        descend(smaller_calls)
    return best


def smaller_cases(case: Case) -> Iterator[Case]:
    """Simpler calls next to this one: plain inputs, fewer sequences, fewer tokens. Each is a step down."""
    if case.kind != "gaussian":
        yield replace(case, kind="gaussian")
    if isinstance(case.tokens, tuple):
        lengths = case.tokens
        if len(lengths) > 1:
            for length in sorted(set(lengths)):
                yield replace(case, tokens=(length,))
            for number in range(len(lengths)):
                yield replace(case, tokens=lengths[:number] + lengths[number + 1 :])
        elif lengths:
            yield replace(case, tokens=lengths[0])
        for number, length in enumerate(lengths):
            for less in _less(length):
                yield replace(case, tokens=(*lengths[:number], less, *lengths[number + 1 :]))
        return
    for batch in range(1, case.batch):
        yield replace(case, batch=batch)
    if case.tokens_kv is not None:
        yield replace(case, tokens_kv=None)
        for less in _less(case.tokens_kv):
            if less >= case.tokens:
                yield replace(case, tokens_kv=less)
    for less in _less(case.tokens):
        yield replace(case, tokens=less)


def _less(length: int) -> list[int]:
    """Fewer tokens: first the fewest, then halves, quarters and one less, so that a boundary is found in few steps."""
    return sorted({less for less in (1, 2, length // 4, length // 2, length * 3 // 4, length - 1) if 0 < less < length})


def simpler_specs(spec: Spec) -> Iterator[Spec]:
    """Simpler legal specs next to this one: one branch less, no gates, nothing learned, fewer heads, smaller sizes."""
    document = {**spec.model_dump(), "name": "minimal", "description": ""}
    seen = {type(spec).model_validate(document)}
    for change in _changes(document):
        try:
            simpler = type(spec).model_validate({**document, **change})
        except ValueError:
            continue  # the change alone violates a constraint
        if simpler not in seen:
            seen.add(simpler)
            yield simpler


def _changes(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    compression, selection, window = (document[name] for name in ("compression", "selection", "window"))
    yield from ({name: None} for name in ("window", "selection", "compression"))
    combine = document["combine"]
    yield {"combine": {**combine, "gate": "none"}}
    if combine.get("joint"):
        yield {"combine": {"gate": combine["gate"]}}
        yield {"combine": {**combine, "sink": "none"}}
    yield {"kv": "shared"}
    yield {"scale": "auto"}
    yield {"fp32_precision": "ieee"}
    group = document["heads"]["query"] // document["heads"]["kv"]
    yield {"heads": {"query": 1, "kv": 1}}
    yield {"heads": {"query": group, "kv": 1}}
    for qk, v in ((16, 16), (16, document["head_dim"]["v"]), (document["head_dim"]["qk"], 16)):
        if qk <= document["head_dim"]["qk"] and v <= document["head_dim"]["v"]:
            yield {"head_dim": {"qk": qk, "v": v}}
    if compression is not None:
        plain = {**compression, "position": {"key": "none", "value": "none"}}
        yield {"compression": {**plain, "phi": {"key": "mean", "value": "mean", "hidden": None}}}
        yield {"compression": plain}
        yield {"compression": {**compression, "block": compression["stride"]}}
        if not compression.get("output", True):
            yield {"compression": {**compression, "output": True}}
    if selection is not None:
        if selection["indices"] == "computed":
            yield {"selection": {**selection, "initial": 0, "local": 0}}
        for count in (1, selection["count"] // 2):
            if 0 < count < selection["count"]:
                yield {"selection": {**selection, "count": count}}
        for field, value in (("scope", "group"), ("pool", "sum"), ("sink", "none")):
            if selection.get(field, value) != value:
                yield {"selection": {**selection, field: value}}
        if selection["block"] > 16:
            yield {"selection": {**selection, "block": 16}}
    if window is not None:
        if window.get("sink", "none") != "none":
            yield {"window": {**window, "sink": "none"}}
        for size in (1, 2, window["size"] // 2):
            if 0 < size < window["size"]:
                yield {"window": {**window, "size": size}}
