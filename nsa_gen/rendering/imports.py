"""Imports of emitted modules: templates import what any spec needs, and unused imports of a module are removed."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from itertools import groupby

from nsa_gen.rendering.layout import LINE_LENGTH


def used_imports(text: str) -> str:
    """A module's text with its top-level imports reduced to the names it uses, and with relative imports sorted.

    A string in `__all__` counts as a use. Order and layout are those of ruff.
    """
    tree = ast.parse(text)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    used = _used(tree)
    replaced: dict[int, tuple[int, list[str]]] = {}
    for _, nodes in groupby(imports, key=_block_of(imports)):
        block = list(nodes)
        relative = [node for node in block if isinstance(node, ast.ImportFrom) and node.level]
        if relative:
            block = sorted(block, key=_order)
        lines = [line for node in block for line in _kept(node, used)]
        first, last = min(node.lineno for node in block), max(node.end_lineno or node.lineno for node in block)
        replaced[first] = last, lines
    old, new = text.split("\n"), []
    number = 1
    while number <= len(old):
        if number in replaced:
            last, lines = replaced[number]
            new += lines
            # If a block is removed, the blank line after it is removed, too.
            number = last + 1 + (not lines and last < len(old) and not old[last].strip())
        else:
            new.append(old[number - 1])
            number += 1
    return "\n".join(new)


def import_from(module: str, names: Iterable[str]) -> str:
    """``from module import names``, sorted as ruff sorts them: constants, classes, functions."""
    ordered = sorted(set(names), key=_name_order)
    line = f"from {module} import {', '.join(ordered)}"
    if len(line) <= LINE_LENGTH:
        return line
    rows = "".join(f"    {name},\n" for name in ordered)
    return f"from {module} import (\n{rows})"


def _name_order(name: str) -> tuple[int, str]:
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, name.lower()


def _used(tree: ast.Module) -> set[str]:
    """Names that a module uses outside its imports, and those in its `__all__`."""
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            used |= set(ast.literal_eval(node.value))
    return used


def _block_of(imports: list[ast.Import | ast.ImportFrom]):
    """A key function that gives import statements on consecutive lines the same block number."""
    block_of: dict[ast.stmt, int] = {}
    block, end = 0, -1
    for node in imports:
        if node.lineno != end + 1:
            block += 1
        block_of[node] = block
        end = node.end_lineno or node.lineno
    return block_of.__getitem__


def _order(node: ast.Import | ast.ImportFrom) -> tuple[int, str]:
    return (-node.level, node.module or "") if isinstance(node, ast.ImportFrom) else (0, node.names[0].name)


def _kept(node: ast.Import | ast.ImportFrom, used: set[str]) -> list[str]:
    """The lines of an import statement, reduced to the names in use."""
    names = [alias for alias in node.names if (alias.asname or alias.name.partition(".")[0]) in used]
    if isinstance(node, ast.Import):
        return [ast.unparse(node)] if names else []
    if not names:
        return []
    if any(alias.asname for alias in names):
        return [ast.unparse(ast.ImportFrom(node.module, names, node.level))]
    module = "." * node.level + (node.module or "")
    return import_from(module, [alias.name for alias in names]).split("\n")
