"""Specs that no person chose: the same ones on every run, so that a failing one can be named by its number."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from nsa_gen.spec import Spec, load_spec, parse_spec, shipped_specs
from tests.spec.spec_texts import as_text, valid_documents


def structure(spec: Spec) -> tuple[object, ...]:
    """What decides which code is generated, sizes apart."""
    compression, selection = spec.compression, spec.selection
    return (
        spec.branches,
        compression and (compression.phi.key, compression.phi.value, compression.position),
        selection and selection.indices,
        spec.combine.gate,
        spec.kv,
        spec.passes,
        spec.dtype,
    )


@functools.cache
def drawn_specs(count: int) -> tuple[Spec, ...]:
    """`count` specs of different structure out of everything the language allows, named drawn_0, drawn_1, ..."""
    found: dict[tuple[object, ...], Spec] = {}

    @settings(
        max_examples=12 * count,
        derandomize=True,
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
    # Hypothesis begins with simple examples and tries neighbours of one example in a row: take them from everywhere.
    assert len(found) >= count
    chosen = [list(found.values())[number * len(found) // count] for number in range(count)]
    return tuple(spec.replace(name=f"drawn_{number}") for number, spec in enumerate(chosen))


@functools.cache
def specs(drawn: int) -> dict[str, Spec]:
    """The shipped specs and `drawn` drawn ones, by name."""
    shipped = {name: load_spec(name) for name in shipped_specs()}
    return shipped | {spec.name: spec for spec in drawn_specs(drawn)}
