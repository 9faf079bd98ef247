"""What a tuned configuration depends on: digests of the kernels' code and of the search space of the tuner.

A tuned configuration is invalid if one of them differs. They cover as little as possible: a change of a comment, of a
docstring or of a module that launches nothing does not invalidate results that took minutes on a GPU.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from nsa_gen.lowering import Plan

TUNED_SCHEMA = 1
"""Version of the format of tuned files."""
MEASUREMENT = "interleaved-2"
"""Version of the measurement. Increase it when earlier times are no longer comparable.

Since 2, a short timed run directly follows an untimed one.
"""

ATTENTION, DECODE = "operator.py", "decode.py"
"""Modules that launch tuned kernels: those of forward and backward, and those of decode. Their imports count, too."""
_NOT_CODE = (
    "arguments.py",
    "configs.py",
    "registration.py",
    "runtime/arguments.py",
    "runtime/launch.py",
    "runtime/lookup.py",
    "runtime/registration.py",
)
_DIGITS = 12


def kernels_digest(files: Mapping[str, str], root: str = ATTENTION) -> str:
    """Twelve hex digits of the code that runs: a root module and every module that it imports, directly or not.

    Left out are `configs.py` and `runtime/lookup.py`, which only choose numbers; `runtime/launch.py`, which runs only
    on the host; the checks of arguments; and the registration of operators. The digest of a module ignores comments,
    docstrings and blank lines.

    Args:
        files: modules of a package by file name; those that are not Python are ignored.
        root: ATTENTION or DECODE.
    """
    found: dict[str, str] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name in found or name not in files:
            continue
        found[name] = _HEADER.sub("", files[name])
        waiting += [path for path in _imports(name, found[name]) if path not in _NOT_CODE]
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + b"\0" + code_of(found[name]).encode() + b"\0")
    return digest.hexdigest()[:_DIGITS]


def space_digest(program: Plan, root: str = ATTENTION) -> str:
    """Twelve hex digits of what may be tuned: kernels and decisions, their tunables with values, and constraints.

    With the root DECODE it covers only decode's kernels; with ATTENTION, all other kernels and the decisions.
    """
    lines = []
    for kernel in (each for each in program.kernels if (each.direction == "decode") == (root == DECODE)):
        rules = sorted(str(rule) for rule in kernel.constraints)
        lines.append(f"{kernel.name} {[(each.name, each.values) for each in kernel.tunables]} {rules}")
    for decision in program.decisions if root == ATTENTION else ():
        lines.append(f"{decision.name} {[(each.name, each.values) for each in decision.tunables]}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGITS]


@functools.lru_cache(maxsize=1024)
def code_of(source: str) -> str:
    """A module's text without comments, docstrings, blank lines and trailing space."""
    lines = _STRING_OR_COMMENT.sub(lambda found: found[1] or "", source).splitlines()
    tree = ast.parse(source)
    for node in (tree, *_statements(tree)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            for row in range(first.lineno, (first.end_lineno or first.lineno) + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


# Comments at the top of a module. Otherwise equal modules of several specs may differ in them.
_HEADER = re.compile(r"\A(#.*\n)+")
# A string (a "#" in it does not begin a comment) or a comment. Many times faster than Python's tokenizer.
_STRING_OR_COMMENT = re.compile(
    r"""(\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|\#[^\n]*""",
    re.DOTALL,
)


@functools.lru_cache(maxsize=1024)
def _imports(path: str, source: str) -> tuple[str, ...]:
    """Paths of what the module at `path` imports from its own package. Those of names, not modules, do not exist."""
    found: list[str] = []
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = PurePosixPath(path).parents[node.level - 1] / (node.module or "").replace(".", "/")
            found += [f"{folder}.py", *(f"{folder / alias.name}.py" for alias in node.names)]
    return tuple(found)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """All statements within a node, nested ones included. Expressions, which are most of a tree, are skipped."""
    for name in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, name, ()):
            if isinstance(child, ast.stmt):
                yield child
            yield from _statements(child)
