"""Specs that no person chose: the same ones on every run, so that a failing one can be named by its number."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from nsa_gen.spec import Spec, load_spec, parse_spec, shipped_specs
from tests.spec.spec_texts import as_text, valid_documents

DRAWN = 30
"""How many there are: drawing them takes seconds, and every process that runs tests of them draws them all."""


def scorer(spec: Spec) -> str:
    """What blocks are ranked by, in a word."""
    assert spec.selection is not None
    return "indexer" if spec.selection.index_dim else str(spec.selection.scores)


def structure(spec: Spec) -> tuple[object, ...]:
    """What decides which code is generated, sizes apart."""
    compression, selection = spec.compression, spec.selection
    return (
        spec.branches,
        compression and (compression.phi.key, compression.phi.value, compression.position, compression.output),
        selection and (selection.indices, scorer(spec), selection.scope, selection.pool, selection.sink),
        spec.window and spec.window.sink,
        spec.combine.gate,
        spec.combine.sink,
        spec.kv,
        spec.passes,
        spec.cache is not None,
        spec.dtype,
    )


def features(spec: Spec) -> set[tuple[str, object]]:
    """Choices of the language that a spec makes."""
    made: set[tuple[str, object]] = {
        ("branches", spec.branches),
        ("gate", spec.combine.gate),
        ("joint", bool(spec.combine.joint)),
        ("sink of joint branches", spec.combine.sink),
        ("kv", spec.kv),
        ("passes", spec.passes),
        ("cache", spec.cache is not None),
        ("dtype", spec.dtype),
    }
    if spec.compression:
        phi, position = spec.compression.phi, spec.compression.position
        made |= {("phi", phi.key), ("phi", phi.value), ("position", position.key), ("position", position.value)}
        made.add(("output", spec.compression.output))
    if spec.selection:
        made |= {("indices", spec.selection.indices), ("scores", scorer(spec))}
        made.add(("sink of selection", spec.selection.sink))
    if spec.window:
        made.add(("sink", spec.window.sink))
    return made


def drawn_specs(count: int = DRAWN) -> tuple[Spec, ...]:
    """The first of `DRAWN` specs of different structure out of everything the language allows: drawn_0, drawn_1, ..."""
    assert count <= DRAWN
    return _drawn()[:count]


def structures(examples: int, derandomize: bool = True) -> list[Spec]:
    """One spec of each structure among so many drawn ones; others on every run unless `derandomize`."""
    found: dict[tuple[object, ...], Spec] = {}

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(valid_documents())
    def draw(document: dict[str, Any]) -> None:
        spec = parse_spec(as_text({**document, "name": "drawn"}))
        found.setdefault(structure(spec), spec)

    draw()
    return list(found.values())


@functools.cache
def _drawn() -> tuple[Spec, ...]:
    pool = structures(12 * DRAWN)
    assert len(pool) >= DRAWN
    # What is drawn changes with hypothesis' version and the project's sources. So: first a spec for every feature that
    # was drawn at all, then others from everywhere, since neighbours of one example come in a row.
    covered: set[tuple[str, object]] = set()
    telling = []
    for number, spec in enumerate(pool):
        if features(spec) - covered:
            telling.append(number)
            covered |= features(spec)
    spread = [number * len(pool) // DRAWN for number in range(DRAWN)]
    numbers = list(dict.fromkeys([*telling, *spread, *range(len(pool))]))[:DRAWN]
    return tuple(pool[number].replace(name=f"drawn_{index}") for index, number in enumerate(numbers))


def spec_names(drawn: int = DRAWN) -> list[str]:
    """The names of `specs(drawn)`, without drawing any: what tests are collected by."""
    return [*shipped_specs(), *(f"drawn_{index}" for index in range(drawn))]


@functools.cache
def specs(drawn: int = DRAWN) -> dict[str, Spec]:
    """The shipped specs and `drawn` drawn ones, by name."""
    shipped = {name: load_spec(name) for name in shipped_specs()}
    return shipped | {spec.name: spec for spec in drawn_specs(drawn)}
