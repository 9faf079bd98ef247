"""Python literals laid out as a formatter would."""

from __future__ import annotations


def python_literal(value: object, indent: int = 0) -> str:
    """Source of nested dicts, lists and scalars: double quotes, one entry a line, trailing commas."""
    inner = " " * (indent + 4)
    closing = " " * indent
    if isinstance(value, dict) and value:
        rows = (f"{inner}{_text(str(key))}: {python_literal(item, indent + 4)},\n" for key, item in value.items())
        return "{\n" + "".join(rows) + closing + "}"
    if isinstance(value, (list, tuple)) and value:
        rows = (f"{inner}{python_literal(item, indent + 4)},\n" for item in value)
        return "[\n" + "".join(rows) + closing + "]"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(value: str) -> str:
    quoted = repr(value)
    if quoted.startswith('"'):
        return quoted
    return '"' + quoted[1:-1].replace('"', '\\"').replace("\\'", "'") + '"'
