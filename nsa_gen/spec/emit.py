"""Writing a spec as canonical YAML: the same values give the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_READ_AS_OTHER_TYPE = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
"""Words that some YAML reader takes for a boolean or nothing; they are written in quotes."""


def to_yaml(document: Mapping[str, object], indent: str = "") -> str:
    """`document` as block-style YAML in its own key order; lists are written on one line."""
    lines: list[str] = []
    for key, value in document.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}:\n{to_yaml(value, indent + '  ')}")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            lines.append(f"{indent}{key}: [{', '.join(map(_scalar, value))}]\n")
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: object) -> str:
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _READ_AS_OTHER_TYPE
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        mantissa, exponent, power = repr(value).partition("e")
        # YAML 1.1 readers take 1e-05 for a string; with a point it is a number to all of them.
        return (mantissa if "." in mantissa else mantissa + ".0") + exponent + power
    return str(value)
