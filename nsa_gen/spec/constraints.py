"""The constraints between fields of a spec, each written once as an expression over dotted field names.

The same list serves validation (`violations`), the reference page, property-based strategies and, by `to_sympy`,
symbolic use. The language is a small part of Python's expressions: ``and or not``, comparisons, ``+ - * // %``,
whole numbers, ``field == 'word'`` and ``present(field)``. Nothing else parses, and nothing is ever `eval`-ed.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sympy

Values = Mapping[str, object]
"""Field values by dotted path; a record (``compression``) maps to whether it is present."""

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True, slots=True)
class Constraint:
    """One rule between fields.

    Attributes:
        id: a stable name for tests and documentation.
        expression: what must hold.
        when: the rule applies only where this holds.
        at: the field an error points at; if it is not written, the first that is among those of `expression`.
        message: the error; ``{field}`` is replaced by that field's value.
        hint: how to mend it.
    """

    id: str
    expression: str
    at: str
    message: str
    hint: str = ""
    when: str = "True"

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field the rule reads, in order of appearance."""
        return field_names(f"({self.when}) and ({self.expression})")

    def holds(self, values: Values) -> bool | None:
        """Whether the rule holds (or does not apply); None when a value it needs is not known."""
        try:
            return not evaluate(self.when, values) or bool(evaluate(self.expression, values))
        except UnknownField:
            return None

    @property
    def summary(self) -> str:
        """`message` without values, for a page that explains the rule."""
        return re.sub(r"\{[a-z_.]+\}", "...", re.sub(r" \(\{[a-z_.]+\}\)", "", self.message))

    def explain(self, values: Values) -> str:
        """`message` with the values in their places."""
        return re.sub(r"\{([a-z_.]+)\}", lambda match: str(values.get(match[1], match[1])), self.message)


class UnknownField(LookupError):
    """An expression reads a field whose value is not known."""


_COMPUTED = "present(selection) and selection.indices == 'computed'"
_SCORED = f"present(compression) and {_COMPUTED}"
_MLP = "(compression.phi.key == 'mlp' or compression.phi.value == 'mlp')"

CONSTRAINTS: tuple[Constraint, ...] = (
    Constraint(
        id="some_branch",
        expression="present(compression) or present(selection) or present(window)",
        at="compression",
        message="at least one branch must be present: expected compression, selection or window, got none",
        hint="for example: window: {size: 512}",
    ),
    Constraint(
        id="groups_are_whole",
        expression="heads.query % heads.kv == 0",
        at="heads.query",
        message="heads.query ({heads.query}) must be a multiple of heads.kv ({heads.kv})",
        hint="every key head serves the same number of query heads",
    ),
    Constraint(
        id="tf32_needs_float32",
        when="fp32_precision == 'tf32'",
        expression="dtype == 'float32'",
        at="fp32_precision",
        message="tf32 products exist for float32 inputs only, but dtype is {dtype}",
        hint="remove fp32_precision, or set dtype: float32",
    ),
    Constraint(
        id="stride_divides_compression_block",
        when="present(compression)",
        expression="compression.block % compression.stride == 0",
        at="compression.stride",
        message="compression.stride ({compression.stride}) must divide compression.block ({compression.block})",
    ),
    Constraint(
        id="computed_selection_needs_compression",
        when=_COMPUTED,
        expression="present(compression)",
        at="selection",
        message="computed selection ranks blocks by the compressed scores, but there is no compression branch",
        hint="add compression, or set selection.indices: input",
    ),
    Constraint(
        id="stride_divides_selection_block",
        when=_SCORED,
        expression="selection.block % compression.stride == 0",
        at="compression.stride",
        message="compression.stride ({compression.stride}) must divide selection.block ({selection.block})",
    ),
    Constraint(
        id="compression_block_fits_selection_block",
        when=_SCORED,
        expression="compression.block <= selection.block",
        at="compression.block",
        message="compression.block ({compression.block}) must not exceed selection.block ({selection.block})",
    ),
    Constraint(
        id="forced_blocks_fit_count",
        when=_COMPUTED,
        expression="selection.initial + selection.local <= selection.count",
        at="selection.count",
        message="selection.count ({selection.count}) must hold the forced blocks: "
        "initial ({selection.initial}) + local ({selection.local})",
        hint="count includes the forced blocks",
    ),
    Constraint(
        id="given_indices_force_nothing",
        when="present(selection) and selection.indices == 'input'",
        expression="selection.initial == 0 and selection.local == 0",
        at="selection.initial",
        message="with indices: input the caller chooses every block; initial and local would have no effect",
        hint="remove initial and local",
    ),
    Constraint(
        id="external_is_both_or_neither",
        when="present(compression)",
        expression="(compression.phi.key == 'external') == (compression.phi.value == 'external')",
        at="compression.phi",
        message="external must be chosen for both key and value or for neither, "
        "got key: {compression.phi.key}, value: {compression.phi.value}",
        hint="write phi: external",
    ),
    Constraint(
        id="external_has_no_position",
        when="present(compression) and (compression.phi.key == 'external' or compression.phi.value == 'external')",
        expression="compression.position.key == 'none' and compression.position.value == 'none'",
        at="compression.position",
        message="an external phi is computed by the caller, so there is nothing to add a learned position to",
        hint="remove position",
    ),
    Constraint(
        id="mlp_needs_hidden",
        when=f"present(compression) and {_MLP}",
        expression="present(compression.phi.hidden)",
        at="compression.phi",
        message="phi mlp needs its hidden width",
        hint="for example: phi: {key: mlp, value: mlp, hidden: 256}",
    ),
    Constraint(
        id="hidden_needs_mlp",
        when=f"present(compression) and not {_MLP}",
        expression="not present(compression.phi.hidden)",
        at="compression.phi.hidden",
        message="hidden is the width of an mlp, but phi is key: {compression.phi.key}, value: {compression.phi.value}",
        hint="remove hidden, or choose mlp",
    ),
)


def violations(values: Values) -> Iterator[Constraint]:
    """The constraints that do not hold for `values`; those that need an unknown value are passed over."""
    return (constraint for constraint in CONSTRAINTS if constraint.holds(values) is False)


@functools.cache
def parse(expression: str) -> ast.expr:
    """The checked syntax tree of `expression`; raises ValueError for anything outside the language."""
    tree = ast.parse(expression, mode="eval").body
    _check(tree, expression)
    return tree


@functools.cache
def field_names(expression: str) -> tuple[str, ...]:
    """The dotted names in `expression`, in order of appearance, without repetition."""
    found: dict[str, None] = {}

    def walk(node: ast.AST) -> None:
        if isinstance(node, (ast.Name, ast.Attribute)):
            found[_dotted(node)] = None
            return
        children = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
        for child in children:
            walk(child)

    walk(parse(expression))
    return tuple(found)


def evaluate(expression: str, values: Values) -> Any:
    """The value of `expression`; raises `UnknownField` when a field it reaches is not in `values`."""
    return _evaluate(parse(expression), values)


def to_sympy(expression: str) -> sympy.Basic:
    """`expression` as a sympy formula.

    A numeric field becomes a non-negative integer symbol of its dotted name; ``field == 'word'`` and ``present(field)``
    become Boolean symbols named ``field=word`` and ``present(field)``. `sympy_values` gives the matching substitution.
    """
    return _to_sympy(parse(expression))


def sympy_values(expression: str, values: Values) -> dict[sympy.Symbol, object]:
    """What to substitute in ``to_sympy(expression)`` so that it takes the value it has for `values`."""
    import sympy

    def value_of(symbol: sympy.Symbol) -> object:
        name = symbol.name
        if name.startswith("present("):
            return sympy.true if _is_present(values.get(name[8:-1])) else sympy.false
        if "=" in name:
            field, _, word = name.partition("=")
            return sympy.true if values.get(field) == word else sympy.false
        return values.get(name, 1)  # under an absent branch: any number will do, the guard is false

    return {symbol: value_of(symbol) for symbol in to_sympy(expression).free_symbols}


def _is_present(value: object) -> bool:
    return value is not None and value is not False


def _dotted(node: ast.AST) -> str:
    return ast.unparse(node)


def _is_word(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _check(node: ast.AST, expression: str) -> None:
    match node:
        case ast.BoolOp(values=values):
            parts = values
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            parts = [operand]
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _ARITHMETIC:
            parts = [left, right]
        case ast.Compare(ops=[op], left=left, comparators=[right]) if type(op) in _COMPARISONS:
            if _is_word(right):
                if not isinstance(left, (ast.Name, ast.Attribute)) or not isinstance(op, (ast.Eq, ast.NotEq)):
                    raise ValueError(f"a word is compared with == or != to a field only: {expression}")
                parts = [left]
            else:
                parts = [left, right]
        case ast.Call(func=ast.Name(id="present"), args=[ast.Name() | ast.Attribute() as field], keywords=[]):
            parts = [field]
        case ast.Attribute(value=ast.Name() | ast.Attribute() as owner):
            parts = [owner]
        case ast.Name() | ast.Constant(value=bool() | int()):
            parts = []
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not part of the constraint language, in: {expression}")
    for part in parts:
        _check(part, expression)


def _evaluate(node: ast.AST, values: Values) -> Any:
    match node:
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_evaluate(part, values) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_evaluate(part, values) for part in parts)
        case ast.UnaryOp(operand=operand):
            return not _evaluate(operand, values)
        case ast.BinOp(op=op, left=left, right=right):
            return _ARITHMETIC[type(op)](_evaluate(left, values), _evaluate(right, values))
        case ast.Compare(ops=[op], left=left, comparators=[right]):
            return _COMPARISONS[type(op)](_evaluate(left, values), _evaluate(right, values))
        case ast.Call(args=[field]):
            return _is_present(_look_up(field, values))
        case ast.Constant(value=value):
            return value
        case _:
            return _look_up(node, values)


def _look_up(node: ast.AST, values: Values) -> object:
    name = _dotted(node)
    if name not in values:
        raise UnknownField(name)
    return values[name]


def _to_sympy(node: ast.AST) -> Any:
    import sympy

    match node:
        case ast.BoolOp(op=op, values=parts):
            return (sympy.And if isinstance(op, ast.And) else sympy.Or)(*map(_to_sympy, parts))
        case ast.UnaryOp(operand=operand):
            return sympy.Not(_to_sympy(operand))
        case ast.BinOp(op=op, left=left, right=right):
            return _ARITHMETIC[type(op)](_to_sympy(left), _to_sympy(right))
        case ast.Compare(ops=[op], left=left, comparators=[ast.Constant(value=str() as word)]):
            proposition = sympy.Symbol(f"{_dotted(left)}={word}")
            return proposition if isinstance(op, ast.Eq) else sympy.Not(proposition)
        case ast.Compare(ops=[op], left=left, comparators=[right]):
            return _relation(op, left, right)
        case ast.Call(args=[field]):
            return sympy.Symbol(f"present({_dotted(field)})")
        case ast.Constant(value=value):
            return sympy.sympify(value)
        case _:
            return sympy.Symbol(_dotted(node), integer=True, nonnegative=True)


def _relation(op: ast.cmpop, left: ast.expr, right: ast.expr) -> Any:
    import sympy

    if isinstance(left, (ast.Compare, ast.BoolOp)):  # equality of two truth values
        same = sympy.Equivalent(_to_sympy(left), _to_sympy(right))
        return same if isinstance(op, ast.Eq) else sympy.Not(same)
    relations = {
        ast.Eq: sympy.Eq,
        ast.NotEq: sympy.Ne,
        ast.Lt: sympy.Lt,
        ast.LtE: sympy.Le,
        ast.Gt: sympy.Gt,
        ast.GtE: sympy.Ge,
    }
    return relations[type(op)](_to_sympy(left), _to_sympy(right))
