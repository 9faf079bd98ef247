"""Finds, in the source of kernels, loops that carry a value on which the bounds of a loop inside them depend.

Triton 3.6.0 and 3.7.1 lose such a value: when they look for values that a `for` carries in vain, the bounds of inner
loops do not count as uses, so the inner loop keeps its first bounds for ever. What a `while` carries is kept.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator


def carried_bounds(modules: Iterable[ast.Module]) -> list[str]:
    """ "function:line: names" for each `for` of a kernel that carries what bounds a loop inside it.

    Whatever else such a value is used for: that may keep it alive, but no reader can tell.
    """
    functions: dict[str, list[ast.FunctionDef]] = {}
    for tree in modules:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list):
                functions.setdefault(node.name, []).append(node)
    loops = [
        (function.name, node)
        for same_name in functions.values()
        for function in same_name
        for node in ast.walk(function)
        if isinstance(node, ast.For) and _is_loop(node)
    ]
    lost = [(name, node.lineno, _carried(node) & _reaching_bounds(node.body, functions)) for name, node in loops]
    return [f"{name}:{line}: {', '.join(sorted(names))}" for name, line, names in lost if names]


def _is_loop(node: ast.For) -> bool:
    """Whether it is a loop of the compiled kernel, not one that is unrolled."""
    return "static_range" not in ast.unparse(node.iter)


def _names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, context)}


def _reaching_bounds(
    body: list[ast.stmt], functions: dict[str, list[ast.FunctionDef]], within: tuple[ast.FunctionDef, ...] = ()
) -> set[str]:
    """Names of which the bounds of a loop in `body` depend, or of one in a function that it calls.

    `within` are the functions on the way there: kernels do not call themselves, but modules share some names.
    """
    nodes = [node for statement in body for node in ast.walk(statement)]
    reaching: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.For) and _is_loop(node):
            reaching |= _names(node.iter, ast.Load)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            for called in functions.get(node.func.id, ()):
                if called in within:
                    continue
                bounding = _reaching_bounds(called.body, functions, (*within, called))
                for parameter, argument in _bound(called, node):
                    if parameter in bounding:
                        reaching |= _names(argument, ast.Load)
    while True:
        more = set(reaching)
        for node in nodes:
            if isinstance(node, ast.stmt) and _names(node, ast.Store) & reaching:
                more |= set().union(*(_names(each, ast.Load) for each in _decides(node)))
        if more == reaching:
            return reaching
        reaching = more


def _bound(function: ast.FunctionDef, call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """The arguments of a call by the parameters that take them."""
    yield from zip((each.arg for each in function.args.args), call.args, strict=False)
    yield from ((keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg is not None)


def _decides(statement: ast.stmt) -> list[ast.AST]:
    """What decides the values of the names that a statement assigns, the statements inside it apart."""
    if isinstance(statement, ast.If | ast.While):
        return [statement.test]
    if isinstance(statement, ast.For):
        return [statement.iter]
    if isinstance(statement, ast.AugAssign):
        return [statement.value, ast.Name(ast.unparse(statement.target), ast.Load())]
    return [statement]


def _carried(loop: ast.For) -> set[str]:
    """Names that a step of a loop may read as the step before has left them."""
    assigned = set().union(*(_names(statement, ast.Store) for statement in loop.body))
    read: set[str] = set()
    _read_before_assigned(loop.body, _names(loop.target, ast.Store), read)
    return assigned & read


def _read_before_assigned(body: list[ast.stmt], assigned: set[str], read: set[str]) -> set[str]:
    """Add to `read` what `body` may read before it assigns it; returns the names that are assigned after it."""
    for statement in body:
        for expression in _decides(statement):
            read |= _names(expression, ast.Load) - assigned
        if isinstance(statement, ast.If):
            branches = [_read_before_assigned(each, assigned, read) for each in (statement.body, statement.orelse)]
            assigned = branches[0] & branches[1]
        elif isinstance(statement, ast.For) and not _is_loop(statement):
            assigned = _read_before_assigned(statement.body, assigned | _names(statement.target, ast.Store), read)
        elif isinstance(statement, ast.For | ast.While):  # of no steps, perhaps
            inside = _names(statement.target, ast.Store) if isinstance(statement, ast.For) else set()
            _read_before_assigned(statement.body, assigned | inside, read)
        else:
            assigned = assigned | _names(statement, ast.Store)
    return assigned
