"""The JSON Schema for editors and the reference page, both derived from the model and the constraints.

python -m nsa_gen.spec.schema            write specs/nsa-spec.schema.json and docs/spec.md
python -m nsa_gen.spec.schema --check    exit 1 with a diff when a file is not what would be written
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa_gen._resources import specs_dir
from nsa_gen.spec.constraints import CONSTRAINTS
from nsa_gen.spec.emit import to_yaml
from nsa_gen.spec.model import Record, Spec, all_records, expectation, record_type
from nsa_gen.spec.shipped import load_spec, shipped_specs

SCHEMA_FILE = "nsa-spec.schema.json"


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the spec language.

    It holds every field rule. Rules between fields (`CONSTRAINTS`) are beyond an editor's help and are left to
    `parse_spec`.
    """
    schema = _tidy(Spec.model_json_schema())
    for _, record in all_records(Spec):
        if record.shorthand:
            full = schema["$defs"][record.__name__]
            field = full["properties"][record.shorthand[0]]
            one_value = {key: field[key] for key in field if key not in ("description", "default", "examples")}
            description = full.pop("description")
            schema["$defs"][record.__name__] = {"description": description, "anyOf": [one_value, full]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Spec of nsa_gen, versions 1 and 2"}
    return head | schema


def _tidy(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` without pydantic's titles and without null, which the language does not have.

    Keywords come in one order, so that another version of pydantic writes the same file.
    """
    tidied = dict(schema)
    tidied.pop("title", None)
    if {"type": "null"} in tidied.get("anyOf", ()):
        (only,) = (choice for choice in tidied.pop("anyOf") if choice != {"type": "null"})
        tidied = only | tidied
        tidied.pop("default", None)
    if "anyOf" in tidied:
        tidied["anyOf"] = [_tidy(choice) for choice in tidied["anyOf"]]
    if isinstance(tidied.get("default"), dict):
        tidied["default"] = {name: value for name, value in tidied["default"].items() if value is not None}
    for inner in ("$defs", "properties"):
        if inner in tidied:
            tidied[inner] = {name: _tidy(part) for name, part in tidied[inner].items()}
    return {key: tidied[key] for key in sorted(tidied, key=lambda key: (_LATE.get(key, 0), key))}


_LATE = {"required": 1, "properties": 2, "$defs": 3}
"""Keywords that are easier to read after the others."""


def reference() -> str:
    """The reference page of the spec language, in Markdown."""
    shipped = shipped_specs()
    parts = [
        "# Spec reference",
        "<!-- Written by `python -m nsa_gen.spec.schema`; do not edit. -->",
        "A spec is one YAML file that says which operator to generate. If the spec leaves out a branch, the operator "
        "does not have it. Unknown fields, duplicate fields, empty fields, tags, anchors and aliases are errors. Words "
        "such as `no` and `on` are read as strings, not as booleans. Numbers are written in plain decimal.",
        "To get completion and checks in an editor, start the file with",
        "```yaml\n# yaml-language-server: $schema=./nsa-spec.schema.json\n```",
        "## Example",
        f"```yaml\n{shipped['nsa_paper'].read_text(encoding='utf-8')}```",
        "This is `tiny` with every default written out:",
        f"```yaml\n{load_spec('tiny').resolved_yaml()}```",
        "## Shipped specs",
        _table(("name", "what it is"), [(f"`{name}`", load_spec(name).description) for name in shipped]),
        "## Fields",
    ]
    for path, record in all_records(Spec):
        parts += [f"### {f'`{path}`' if path else 'Top level'}", record.__doc__ or "", _field_table(record)]
    parts += ["## Rules between fields", _constraint_table()]
    return "\n\n".join(parts) + "\n"


def _field_table(record: type[Record]) -> str:
    rows = []
    for name, info in record.model_fields.items():
        inner = record_type(record, name)
        expected = "a mapping, see below" if inner and not inner.word else expectation(record, name)
        if info.is_required():
            default = "required"
        elif info.default is None:
            default = "none"
        elif isinstance(info.default, Record):
            default = _inline(info.default)
        else:
            default = f"`{to_yaml({name: info.default}).partition(': ')[2].strip()}`"
        rows.append((f"`{name}`", expected, default, info.description or ""))
    return _table(("field", "expected", "default", "meaning"), rows)


def _inline(record: Record) -> str:
    fields = record.model_dump(exclude_none=True)
    return "`{" + ", ".join(to_yaml({name: value}).strip() for name, value in fields.items()) + "}`"


def _constraint_table() -> str:
    rows = []
    for constraint in CONSTRAINTS:
        hint = f" ({constraint.hint})" if constraint.hint else ""
        rows.append((f"`{constraint.id}`", constraint.summary + hint, constraint.when.text))
    return _table(("rule", "error when it is violated", "applies when"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def artefacts() -> dict[Path, str]:
    """The files derived from the model and what they should hold."""
    root = specs_dir().parent
    schema = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    return {specs_dir() / SCHEMA_FILE: schema, root / "docs" / "spec.md": reference()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nsa_gen.spec.schema", description="Write what derives from the model."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is out of date")
    check = parser.parse_args(arguments).check
    stale = 0
    for path, text in artefacts().items():
        present = path.read_text(encoding="utf-8") if path.exists() else ""
        if present == text:
            continue
        stale += 1
        if check:
            before, after = present.splitlines(keepends=True), text.splitlines(keepends=True)
            sys.stdout.writelines(
                difflib.unified_diff(before, after, f"{path.name} (found)", f"{path.name} (expected)")
            )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"wrote {path}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
