"""Rules between fields name existing fields, apply where they should, and are open where a value is missing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from nsa_gen.spec import CONSTRAINTS, Spec
from nsa_gen.spec.constraints import violations
from nsa_gen.spec.model import flatten
from nsa_gen.spec.parse import all_fields
from tests.spec.spec_texts import valid_documents


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda constraint: constraint.id)
def test_a_rule_names_existing_fields_and_shows_their_values(constraint) -> None:
    known = set(all_fields())
    assert set(constraint.fields) <= known
    assert constraint.at in known
    shown = dict.fromkeys(known, "VALUE")
    assert "{" not in constraint.explain(shown).replace("{size", "")
    assert "{" not in constraint.summary and constraint.when.text


def test_rules_have_distinct_names() -> None:
    assert len({constraint.id for constraint in CONSTRAINTS}) == len(CONSTRAINTS)


def test_a_rule_holds_where_it_does_not_apply_and_is_open_where_a_value_is_missing() -> None:
    (rule,) = (constraint for constraint in CONSTRAINTS if constraint.id == "stride_divides_compression_block")
    assert not rule.broken({"compression": False})
    assert not rule.broken({"compression": True, "compression.block": 32})
    assert not rule.broken({"compression": True, "compression.block": 32, "compression.stride": 16})
    assert rule.broken({"compression": True, "compression.block": 32, "compression.stride": 12})


@given(valid_documents())
@settings(max_examples=60)
def test_valid_specs_violate_nothing(document: dict) -> None:
    assert list(violations(flatten(Spec, Spec.model_validate(document)))) == []
