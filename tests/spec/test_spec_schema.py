"""The JSON Schema and the reference page are what the model says, and the schema judges as the model does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nsa_gen._resources import specs_dir
from nsa_gen.spec import CONSTRAINTS, Spec, schema, shipped_specs
from nsa_gen.spec.model import BROKEN_CONSTRAINTS
from nsa_gen.spec.parse import all_fields
from tests.spec.spec_texts import base_document, valid_documents

SCHEMA = schema.json_schema()


def complaints(value: Any, rule: dict[str, Any], path: str = "$") -> Iterator[str]:
    """What JSON Schema's rules say against `value`; knows exactly the keywords that the schema uses."""
    for keyword, wanted in rule.items():
        match keyword:
            case "$schema" | "$defs" | "title" | "description" | "default" | "examples":
                continue
            case "$ref":
                yield from complaints(value, SCHEMA["$defs"][wanted.removeprefix("#/$defs/")], path)
                continue
            case "properties" if isinstance(value, dict):
                for name in value.keys() & wanted.keys():
                    yield from complaints(value[name], wanted[name], f"{path}.{name}")
                continue
            case "items" if isinstance(value, list):
                for item in value:
                    yield from complaints(item, wanted, path + "[]")
                continue
            case "properties" | "items":
                continue
        if not holds(keyword, wanted, value, rule):
            yield f"{path}: {keyword} {wanted!r} does not hold for {value!r}"


def holds(keyword: str, wanted: Any, value: Any, rule: dict[str, Any]) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    match keyword:
        case "type":
            if wanted == "boolean":
                return isinstance(value, bool)
            kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}
            return isinstance(value, kinds[wanted]) and not isinstance(value, bool)
        case "enum":
            return any(same(value, choice) for choice in wanted)
        case "const":
            return same(value, wanted)
        case "anyOf":
            return any(not list(complaints(value, choice)) for choice in wanted)
        case "not":
            return bool(list(complaints(value, wanted)))
        case "required":
            return not isinstance(value, dict) or value.keys() >= set(wanted)
        case "additionalProperties":
            assert wanted is False
            return not isinstance(value, dict) or value.keys() <= rule["properties"].keys()
        case "minimum":
            return not number or value >= wanted
        case "maximum":
            return not number or value <= wanted
        case "exclusiveMinimum":
            return not number or value > wanted
        case "exclusiveMaximum":
            return not number or value < wanted
        case "multipleOf":
            return not number or value % wanted == 0
        case "maxLength":
            return not isinstance(value, str) or len(value) <= wanted
        case "pattern":
            return not isinstance(value, str) or re.search(wanted.replace("$", r"\Z"), value) is not None
        case "uniqueItems":
            return not isinstance(value, list) or all(item not in value[:index] for index, item in enumerate(value))
        case "contains":
            return not isinstance(value, list) or any(not list(complaints(item, wanted)) for item in value)
    raise NotImplementedError(keyword)


def same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def test_the_committed_schema_and_reference_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert schema.main(["--check"]) == 0, "run python -m nsa_gen.spec.schema\n" + capsys.readouterr().out


def test_check_fails_with_a_diff_and_writes_nothing_and_a_run_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "specs").mkdir()
    stale = tmp_path / "specs" / schema.SCHEMA_FILE
    stale.write_text((specs_dir() / schema.SCHEMA_FILE).read_text().replace('"maximum": 65536', '"maximum": 9'))
    before = stale.read_text()
    for path in shipped_specs().values():
        (tmp_path / "specs" / path.name).write_text(path.read_text())
    monkeypatch.setattr(schema, "specs_dir", lambda: tmp_path / "specs")
    assert schema.main(["--check"]) == 1
    diff = capsys.readouterr().out
    assert '-          "maximum": 9' in diff
    assert '+          "maximum": 65536' in diff
    assert stale.read_text() == before
    assert not (tmp_path / "docs").exists()
    assert schema.main([]) == 0
    assert schema.main(["--check"]) == 0


@pytest.mark.parametrize("name", sorted(shipped_specs()))
def test_every_shipped_spec_is_valid_by_the_schema(name: str) -> None:
    text = shipped_specs()[name].read_text()
    assert list(complaints(yaml.safe_load(text), SCHEMA)) == []


@given(valid_documents())
@settings(max_examples=40)
def test_every_valid_document_is_valid_by_the_schema(document: dict[str, Any]) -> None:
    assert list(complaints(document, SCHEMA)) == []


ODD_VALUES = [0, 1, -1, 7, 12, 16, 64, 100, 256, 257, 512, 1024, 65536, 65537, True, False, "16", "", "mean", "auto"]
ODD_VALUES += ["none", "class", "torch", "no-name", "x" * 65, "forward", [], ["backward"], ["forward", "forward"], {}]
ODD_VALUES += [{"key": "mlp"}, {"qk": 16}, {"qk": 16, "v": 24}, {"size": 3}, {"size": 3, "colour": 1}, 0.5, -0.5]


@given(valid_documents(), st.sampled_from(all_fields()), st.sampled_from(ODD_VALUES), st.booleans())
@settings(max_examples=150)
def test_the_schema_accepts_what_the_field_rules_accept(
    document: dict[str, Any], field: str, value: Any, remove: bool
) -> None:
    *owners, name = field.split(".")
    record: Any = document
    for owner in owners:
        record = record.get(owner) if isinstance(record, dict) else None
    if not isinstance(record, dict):
        return
    if remove:
        record.pop(name, None)
    else:
        record[name] = value
    try:
        Spec.model_validate(document)
        accepted = True
    except ValidationError as error:
        accepted = all(one["type"] == BROKEN_CONSTRAINTS for one in error.errors())
    assert (list(complaints(document, SCHEMA)) == []) == accepted


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bf16"}, {"head_dim": 100}, {"window": {"sise": 3}}, {"name": "a-b"}, {"passes": ["backward"]}],
)
def test_the_schema_refuses_what_an_editor_should_underline(changes: dict[str, Any]) -> None:
    assert list(complaints(base_document(**changes), SCHEMA))


def test_every_field_is_described_for_the_editor() -> None:
    records = {"Spec": SCHEMA, **SCHEMA["$defs"]}
    for name, record in records.items():
        full = next((choice for choice in record.get("anyOf", ()) if "properties" in choice), record)
        assert record["description"], name
        assert full["additionalProperties"] is False
        for field, rule in full["properties"].items():
            described = rule.get("description") or SCHEMA["$defs"][rule["$ref"].rpartition("/")[2]]["description"]
            assert described.endswith("."), f"{name}.{field}"


def test_the_reference_names_every_field_and_every_rule() -> None:
    page = schema.reference()
    for field in all_fields():
        assert f"| `{field.rpartition('.')[2]}` |" in page
    for constraint in CONSTRAINTS:
        assert f"| `{constraint.id}` | {constraint.summary}" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (3, 4, 5) for line in tables)
