"""Lay out code whose length depends on the spec, as the formatter would: on one line if it fits."""

from __future__ import annotations

from collections.abc import Iterable

LINE_LENGTH = 120


def fit(head: str, items: Iterable[str], tail: str, indent: int = 0, *, literal: bool = False) -> str:
    """``head`` + comma-separated items + ``tail``, such as ``f(``, arguments and ``)``, without a final newline.

    All is on one line if that fits. Otherwise all items are on one separate line, or else each item is on its own line.
    The items of a ``literal`` are never together on a separate line.
    """
    items = list(items)
    space, inner = " " * indent, " " * (indent + 4)
    line = f"{space}{head}{', '.join(items)}{tail}"
    if len(line) <= LINE_LENGTH:
        return line
    middle = f"{inner}{', '.join(items)}"
    if len(middle) <= LINE_LENGTH and not literal:
        return f"{space}{head}\n{middle}\n{space}{tail}"
    rows = "".join(f"{inner}{item},\n" for item in items)
    return f"{space}{head}\n{rows}{space}{tail}"


def tuple_of(head: str, names: Iterable[str], indent: int = 0) -> str:
    """``head`` + a tuple of quoted names + a comma, such as the keyword argument ``inputs=("q", "k"),``."""
    names = [f'"{name}"' for name in names]
    if len(names) == 1:
        return f"{' ' * indent}{head}({names[0]},),"
    return fit(f"{head}(", names, "),", indent, literal=True)
