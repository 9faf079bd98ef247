"""From an example that fails to a small one that fails in the same way: a smaller call, then a simpler spec.

Greedy: of the simpler examples next to the present one the first that still fails takes its place, until none does or
time is up. "Still fails" means that one of the same quantities is wrong under the same property.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nsa_gen.verification.cases import Case
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.examples import Example, ExampleResult

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

SECONDS = 60.0
"""How long to look for something smaller; the interpreter needs some seconds for each try."""


@dataclass(frozen=True)
class Shrunk:
    """The smallest failing example found, its spec, and how many others were tried on the way."""

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

    With `vary_spec` the spec becomes simpler too: right where the generator made the package, so that its fault will
    be in other packages; a package of unknown making keeps its spec.
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
        """Take the first candidate that fails until none does; whether any did."""
        before = best.result
        while any(fails(other, example) for other, example in candidates()):
            pass
        return best.result is not before

    descend(smaller_calls)
    if vary_spec and descend(with_simpler_specs):
        descend(smaller_calls)
    return best


def smaller_cases(case: Case) -> Iterator[Case]:
    """Simpler calls next to this one: plain inputs, fewer sequences, fewer tokens; each is a step down."""
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
    """Fewer tokens: the fewest first, then halves, quarters and one less, so that a boundary is found in few steps."""
    return sorted({less for less in (1, 2, length // 4, length // 2, length * 3 // 4, length - 1) if 0 < less < length})


def simpler_specs(spec: Spec) -> Iterator[Spec]:
    """Simpler legal specs next to this one: a branch less, no gates, nothing learned, fewer heads, smaller sizes."""
    document = {**spec.model_dump(), "name": "minimal", "description": ""}
    seen = {type(spec).model_validate(document)}
    for change in _changes(document):
        try:
            simpler = type(spec).model_validate({**document, **change})
        except ValueError:
            continue  # the change alone breaks a constraint
        if simpler not in seen:
            seen.add(simpler)
            yield simpler


def _changes(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    compression, selection, window = (document[name] for name in ("compression", "selection", "window"))
    yield from ({name: None} for name in ("window", "selection", "compression"))
    yield {"combine": {"gate": "none"}}
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
    if selection is not None:
        if selection["indices"] == "computed":
            yield {"selection": {**selection, "initial": 0, "local": 0}}
        for count in (1, selection["count"] // 2):
            if 0 < count < selection["count"]:
                yield {"selection": {**selection, "count": count}}
        if selection["block"] > 16:
            yield {"selection": {**selection, "block": 16}}
    if window is not None:
        if window.get("sink", "none") != "none":
            yield {"window": {**window, "sink": "none"}}
        for size in (1, 2, window["size"] // 2):
            if 0 < size < window["size"]:
                yield {"window": {**window, "size": size}}
