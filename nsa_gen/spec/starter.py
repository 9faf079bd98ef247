"""A new spec to start from: the text of a spec with a comment on every field, taken from the model."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from nsa_gen.spec.emit import to_yaml
from nsa_gen.spec.model import Record, Spec, expectation, record_type
from nsa_gen.spec.parse import parse_spec

SCHEMA_LINE = "# yaml-language-server: $schema=./nsa-spec.schema.json"
"""What editors read to complete and check a spec: the schema lies beside it."""

_WIDTH = 110


def starter_text(spec: Spec, opening: Iterable[str] = ()) -> str:
    """`spec` as YAML for a person to go on from; reading it back gives an equal spec.

    The first line names the schema for editors, `opening` follows as comments. Every field says what it means and
    expects; branches and fields that `spec` lacks are there as comments, with an example.
    """
    lines = [SCHEMA_LINE, *(f"# {line}" for line in opening), *_fields(spec, "")]
    text = "\n".join(lines) + "\n"
    if parse_spec(text) != spec:
        raise AssertionError(f"the text of {spec.name} does not read back as the same spec")
    return text


def _fields(record: Record, indent: str) -> Iterable[str]:
    kind = type(record)
    for name, info in kind.model_fields.items():
        value = getattr(record, name)
        inner = record_type(kind, name)
        description = info.description or ""
        if inner is None or (inner.word and not isinstance(value, Record)):
            comment = _with_expectation(description, expectation(kind, name))
            example = info.examples[0] if value is None and info.examples else value
            yield from _commented(_leaf(name, example), comment, indent, off=value is None)
            continue
        apart = [""] if not indent else []
        if value is None:
            yield from (*apart, f"{indent}# {description}", f"{indent}# {_example(name, inner)}")
        else:
            yield from (*apart, f"{indent}# {inner.__doc__}", f"{indent}{name}:")
            yield from _fields(value, indent + "  ")


def _commented(text: str, comment: str, indent: str, *, off: bool) -> Iterable[str]:
    """A field with its comment behind it, or above it where the line would be too long; `off` makes it a comment."""
    line = f"{indent}{'# ' if off else ''}{text}"
    if len(line) + len(comment) + 3 <= _WIDTH:
        return [f"{line} # {comment}"]
    return [*(f"{indent}# {part}" for part in textwrap.wrap(comment, _WIDTH - len(indent))), line]


def _leaf(name: str, value: Any) -> str:
    return to_yaml({name: value}).rstrip("\n")


def _example(name: str, record: type[Record]) -> str:
    """A record with examples for the fields that it must have."""
    needed = {field: info.examples[0] for field, info in record.model_fields.items() if info.examples}
    return f"{name}: {{{', '.join(_leaf(field, value) for field, value in needed.items())}}}"


def _with_expectation(description: str, expected: str) -> str:
    """What a field means, and what it may be where the meaning does not name every choice already."""
    choices = expected.removeprefix("one of ").replace(" or ", ", ").split(", ")
    if all(choice in description for choice in choices):
        return description
    return f"{description.removesuffix('.')} ({expected})."
