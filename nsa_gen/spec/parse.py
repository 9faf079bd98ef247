"""From a document to a `Spec`, or to every mistake in it with its place, what was expected and what came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from nsa_gen.spec.constraints import violations
from nsa_gen.spec.errors import SpecError
from nsa_gen.spec.fields import REJECTED, describe, did_you_mean, join
from nsa_gen.spec.model import BROKEN_CONSTRAINTS, Record, Spec, all_records, expectation, flatten, record_type
from nsa_gen.spec.source import Document, FieldPath, compose, decode, dotted


def parse_spec(text: str | bytes, filename: str = "<string>") -> Spec:
    """The spec written in `text`, YAML as a string or as UTF-8 bytes.

    Args:
        text: the YAML.
        filename: how errors call it.

    Raises:
        SpecError: naming every mistake with its line, column and field.
    """
    document = compose(decode(text, filename), filename)
    spec: Spec | None = None
    if isinstance(document.value, dict):
        spec = _validate(document)
    elif not document.problems:
        message = f"expected a mapping of fields, got {describe(document.value)}"
        document.report(document.locate(())[1], (), message, "a spec starts with version: 1")
    if spec is None or document.problems:
        raise SpecError(document.problems)
    return spec


def _validate(document: Document) -> Spec | None:
    """The spec, or None after reporting every mistake of fields and constraints."""
    try:
        return Spec.model_validate(document.value)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
    about_version = [error for error in errors if error["loc"] == ("version",) and error["type"] == REJECTED]
    if about_version:  # the text is in another language: judge nothing else by the rules of this one
        errors = about_version
    for error in errors:
        _report_field(document, error)
    if not about_version:
        _report_constraints(document, {dotted(error["loc"]) for error in errors})
    document.problems = list(dict.fromkeys(document.problems))
    return None


def _report_field(document: Document, error: Mapping[str, Any]) -> None:
    """Say what pydantic found wrong with one field, in our words and at its place."""
    path: FieldPath = error["loc"]
    kind = error["type"]
    if kind == BROKEN_CONSTRAINTS:
        return
    if kind == "extra_forbidden":
        document.report(document.keys[path], path, *_unknown_field(path))
        return
    written, place = document.locate(path)
    if any(path[:length] in document.refused for length in range(len(path) + 1)):
        return
    if kind == "missing":
        place = document.keys.get(written, place)
        document.report(place, path, f"this field is required; expected {_expected(path)}")
    elif kind == REJECTED:
        context = error["ctx"]
        if context["index"] is not None:
            path = (*path, context["index"])
            written, place = document.locate(path)
        document.report(place, written, context["message"], context["hint"])
    else:  # a record that is no mapping
        value = _value_at(document.value, written)
        document.report(place, written, f"expected {_expected(written)}, got {describe(value)}", _record_hint(written))


def _report_constraints(document: Document, unknown: set[str]) -> None:
    """Check the rules between fields on what is left of the document without the `unknown` values."""
    refused = unknown | {dotted(path) for path in document.refused}
    values = flatten(Spec, document.value)
    known = {
        name: value
        for name, value in values.items()
        if not any(name == path or name.startswith(path + ".") for path in refused)
    }
    for constraint in violations(known):
        paths: list[FieldPath] = [tuple(name.split(".")) for name in constraint.fields]
        written, place = document.locate(next((path for path in paths if path in document.values), paths[0]))
        document.report(place, written, constraint.explain(known), constraint.hint)


def _record_at(path: FieldPath) -> type[Record]:
    """The record class at a path that validation reported, so one that exists."""
    model: type[Record] = Spec
    for name in path:
        inner = record_type(model, str(name))
        if inner is None:
            raise LookupError(f"{dotted(path)} is no record")
        model = inner
    return model


def _expected(path: FieldPath) -> str:
    return expectation(_record_at(path[:-1]), str(path[-1]))


def _record_hint(path: FieldPath) -> str:
    fields = _record_at(path).model_fields
    needed = [name for name, info in fields.items() if info.is_required()] or list(fields)
    return f"write {path[-1]}: {{{', '.join(f'{name}: ...' for name in needed)}}}"


def _unknown_field(path: FieldPath) -> tuple[str, str]:
    """The message and the hint for a field that does not exist."""
    owner, name = _record_at(path[:-1]), str(path[-1])
    siblings = list(owner.model_fields)
    message = f"unknown field; expected {join(siblings)}"
    if name == "<<":
        return message, "merge keys are not part of the language: write the fields out"
    if name in all_fields() and "." in name:
        outer, _, inner = name.rpartition(".")
        return message, f"write {inner} inside {outer}"
    owners = [known.rpartition(".")[0] for known in all_fields() if known.split(".")[-1] == name]
    if owners:
        return message, f"{name} is a field of {join(owner or 'the spec itself' for owner in owners)}"
    return message, did_you_mean(name, siblings)


def all_fields() -> list[str]:
    """The dotted names of all fields of the language."""
    owners = all_records(Spec)
    return [f"{path}.{name}".removeprefix(".") for path, record in owners for name in record.model_fields]


def _value_at(value: Any, path: FieldPath) -> Any:
    for part in path:
        value = value[part]
    return value
