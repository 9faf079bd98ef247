"""The constraint language is small and safe, and its symbolic form means the same as its evaluation."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_gen.spec import CONSTRAINTS, RANGES, Spec
from nsa_gen.spec.constraints import UnknownField, evaluate, field_names, parse, sympy_values, to_sympy, violations
from nsa_gen.spec.model import flatten
from nsa_gen.spec.parse import all_fields
from tests.spec.spec_texts import valid_documents


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "a.b()",
        "a[0]",
        "[a]",
        "lambda: 1",
        "a ** 9",
        "a / 2",
        "present('a')",
        "present(a, b)",
        "present(a, key=b)",
        "absent(a)",
        "'word'",
        "'x' == a",
        "a < 'x'",
        "a + 1 == 'x'",
        "a < b < c",
        "a if b else c",
        "(a := 1)",
        "1.5",
        "f'{a}'",
        "().__class__",
        "-a",
    ],
)
def test_anything_outside_the_language_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"language|compared"):
        parse(expression)


def test_field_names_are_the_dotted_names_in_order() -> None:
    assert field_names("b.c % a == 0 and present(d.e.f) and b.c > 1") == ("b.c", "a", "d.e.f")


def test_unknown_fields_matter_only_where_they_are_reached() -> None:
    assert evaluate("present(a) and a.b == 1", {"a": False}) is False
    with pytest.raises(UnknownField):
        evaluate("present(a) and a.b == 1", {"a": True})


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda constraint: constraint.id)
def test_a_rule_names_existing_fields_and_shows_their_values(constraint) -> None:
    known = set(all_fields())
    assert set(constraint.fields) <= known
    assert constraint.at in known
    shown = dict.fromkeys(known, "VALUE")
    assert "{" not in constraint.explain(shown).replace("{size", "")
    assert "{" not in constraint.summary


def test_rules_have_distinct_names() -> None:
    assert len({constraint.id for constraint in CONSTRAINTS}) == len(CONSTRAINTS)


def test_a_rule_holds_where_it_does_not_apply_and_is_open_where_a_value_is_missing() -> None:
    (rule,) = (constraint for constraint in CONSTRAINTS if constraint.id == "stride_divides_compression_block")
    assert rule.holds({"compression": False}) is True
    assert rule.holds({"compression": True, "compression.block": 32}) is None
    assert rule.holds({"compression": True, "compression.block": 32, "compression.stride": 16}) is True
    assert rule.holds({"compression": True, "compression.block": 32, "compression.stride": 12}) is False


@given(valid_documents())
@settings(max_examples=60)
def test_valid_specs_violate_nothing(document: dict) -> None:
    assert list(violations(flatten(Spec, Spec.model_validate(document)))) == []


def arbitrary_values() -> st.SearchStrategy[dict[str, object]]:
    """Values of every field, each legal alone; most break some rule."""
    words = {
        "dtype": ["bfloat16", "float32"],
        "fp32_precision": ["ieee", "tf32"],
        "selection.indices": ["computed", "input"],
        **{f"compression.phi.{side}": ["mean", "mlp", "external"] for side in ("key", "value")},
        **{f"compression.position.{side}": ["none", "learned"] for side in ("key", "value")},
    }
    small = {path: st.sampled_from([value for value in rule.values() if value <= 64]) for path, rule in RANGES.items()}
    small["compression.phi.hidden"] = st.none() | small["compression.phi.hidden"]
    records = {name: st.booleans() for name in ("compression", "selection", "window")}
    return st.fixed_dictionaries({**small, **records, **{path: st.sampled_from(words[path]) for path in words}})


@given(arbitrary_values())
@settings(max_examples=60)
def test_the_symbolic_form_of_every_rule_means_the_same(values: dict[str, object]) -> None:
    for constraint in CONSTRAINTS:
        for expression in (constraint.when, constraint.expression):
            symbolic = to_sympy(expression).subs(sympy_values(expression, values))
            assert symbolic in (sympy.true, sympy.false)
            assert bool(symbolic) == evaluate(expression, values), (constraint.id, expression)


def test_the_symbols_of_a_formula_carry_the_names_of_the_fields() -> None:
    formula = to_sympy("compression.block % compression.stride == 0")
    assert {symbol.name for symbol in formula.free_symbols} == {"compression.block", "compression.stride"}
    assert all(symbol.is_integer for symbol in formula.free_symbols)
