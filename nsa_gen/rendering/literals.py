"""Python literals, laid out as a formatter would, and arbitrary text escaped for a docstring."""

from __future__ import annotations

import textwrap

from nsa_gen.rendering.layout import LINE_LENGTH


def python_literal(value: object, indent: int = 0) -> str:
    """Source of nested dicts, lists and scalars. Strings have double quotes; an entry is on one line if it fits."""
    inner = " " * (indent + 4)
    closing = " " * indent
    if isinstance(value, dict) and value:
        rows = (_entry(f"{inner}{_text(str(key))}: ", item, indent) for key, item in value.items())
        return "{\n" + "".join(rows) + closing + "}"
    if isinstance(value, (list, tuple)) and value:
        return "[\n" + "".join(_entry(inner, item, indent) for item in value) + closing + "]"
    return _inline(value)


def _entry(head: str, item: object, indent: int) -> str:
    line = f"{head}{_inline(item)},"
    return f"{line}\n" if len(line) <= LINE_LENGTH else _row(f"{head}{python_literal(item, indent + 4)},")


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(str(key))}: {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, str):
        return _text(value)
    return number(value) if isinstance(value, float) else repr(value)


def number(value: float) -> str:
    """The shortest exact notation of a float, as formatters write it: 1e20, not 1e+20."""
    return repr(value).replace("e+", "e")


def docstring_text(text: str) -> str:
    """Text wrapped to the line length and escaped for use between the triple quotes of a docstring."""
    escaped = text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return "\n".join(textwrap.wrap(escaped, LINE_LENGTH - 4, break_on_hyphens=False))


def _row(line: str) -> str:
    """A line of a literal. A string that is too long is not split; ruff is told to accept it."""
    last = line.rsplit("\n", 1)[-1]
    return f"{line}  # noqa: E501\n" if len(last) > LINE_LENGTH else f"{line}\n"


def _text(value: str) -> str:
    quoted = repr(value)
    if quoted.startswith('"') or value.count('"') > value.count("'"):  # as formatters do: fewer backslashes
        return quoted
    return '"' + quoted[1:-1].replace('"', '\\"').replace("\\'", "'") + '"'
