"""Laying out code whose length depends on the spec, as the formatter would: on one line where it fits."""

from __future__ import annotations

from collections.abc import Iterable

LINE_LENGTH = 120


def fit(head: str, items: Iterable[str], tail: str, indent: int = 0, *, literal: bool = False) -> str:
    """``head`` + the items, separated by commas + ``tail``, such as ``f(``, arguments, ``)``; without a final newline.

    On one line if that fits, else with all items on a line of their own, else with one item a line. The entries of a
    ``literal`` never share a line of their own.
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
