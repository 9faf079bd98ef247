"""The leaf values of a spec: what each may be, said once for validation, the JSON Schema and the reference page.

Each `Rule` is put beside a type with `typing.Annotated`. It rejects a value with the same sentence everywhere,
"expected ..., got ...", and YAML's traps (a boolean or 64.0 for a whole number) with it.
"""

from __future__ import annotations

import difflib
import keyword
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

REJECTED = "spec_value"
"""The pydantic error type of every rejected leaf value; its context carries ``message``, ``hint`` and ``index``."""

MAX_DESCRIPTION = 500
MAX_NAME = 64
RESERVED_NAMES = ("nsa_gen", "torch", "triton")
ORDERED_PASSES = ("forward", "backward", "decode")

_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def describe(value: object) -> str:
    """`value` in the words of an error message: ``the string '64'``, ``the boolean true``, ``a list``."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int():
            return f"the integer {value}"
        case float():
            return f"the number {value!r}"
        case str():
            shown = value if len(value) <= 40 else value[:37] + "..."
            return f"the string {shown!r}"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return f"a value of type {type(value).__name__}"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A suggestion for a mistyped `word`, or an empty string when nothing is near."""
    choices = list(choices)
    if _ALIASES.get(word.lower()) in choices:
        return f"did you mean {_ALIASES[word.lower()]!r}?"
    folded = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower()[:80], folded, n=1, cutoff=0.6)
    return f"did you mean {folded[near[0]]!r}?" if near else ""


def join(words: Iterable[str], last: str = "or") -> str:
    """``a, b or c``."""
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def reject(message: str, hint: str = "", index: int | None = None) -> PydanticCustomError:
    """The error a leaf raises; `index` names the item of a list that is wrong."""
    template = "{message} ({hint})" if hint else "{message}"
    return PydanticCustomError(REJECTED, template, {"message": message, "hint": hint, "index": index})


class Rule:
    """What a field may be; stands beside its type with `typing.Annotated`.

    Attributes:
        expected: the legal values in words.
        check: returns the value as the spec holds it, or raises `PydanticCustomError`.
        schema: the JSON Schema of the field.
    """

    expected: str
    check: Callable[[Any], Any]
    schema: dict[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if get_origin(source) is Literal and list(get_args(source)) != self.schema["enum"]:
            raise TypeError(f"the choices {self.schema['enum']} stand beside {source}")
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return self.schema


@dataclass(frozen=True)
class Leaf(Rule):
    """A rule of one field."""

    expected: str
    check: Callable[[Any], Any]
    schema: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class IntegerRange(Rule):
    """Whole numbers from `minimum` to `maximum`, both included; booleans, 64.0 and strings are refused."""

    minimum: int
    maximum: int
    multiple_of: int = 1
    power_of_two: bool = False

    @property
    def expected(self) -> str:  # type: ignore[override]
        kind = "a whole number"
        if self.power_of_two:
            kind = "a power of two"
        elif self.multiple_of > 1:
            kind = f"a multiple of {self.multiple_of}"
        return f"{kind} in {self.minimum}..{self.maximum}"

    @property
    def schema(self) -> dict[str, Any]:  # type: ignore[override]
        if self.power_of_two:
            return {"type": "integer", "enum": list(self.values())}
        shape = {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}
        return shape | ({"multipleOf": self.multiple_of} if self.multiple_of > 1 else {})

    def __contains__(self, value: int) -> bool:
        if not self.minimum <= value <= self.maximum or value % self.multiple_of:
            return False
        return not self.power_of_two or value & (value - 1) == 0

    def values(self) -> tuple[int, ...]:
        """Every legal value, ascending."""
        first = -(-self.minimum // self.multiple_of) * self.multiple_of
        return tuple(filter(self.__contains__, range(first, self.maximum + 1, self.multiple_of)))

    def check(self, value: object) -> int:  # type: ignore[override]
        """`value` itself when legal; raises `PydanticCustomError` when not."""
        if type(value) is int and value in self:
            return value
        raise reject(f"expected {self.expected}, got {describe(value)}", self._mend(value))

    def _mend(self, value: object) -> str:
        if isinstance(value, bool):
            return "write the number itself"
        if isinstance(value, float) and value.is_integer() and int(value) in self:
            return f"write {int(value)}"
        if isinstance(value, str):
            if re.fullmatch(r"[1-9][0-9]{0,9}", value) and int(value) in self:
                return "remove the quotes"
            if re.fullmatch(r"[-+]?[0-9][0-9a-fA-FoxXbB_:.]*", value):
                return "write plain decimal digits, without prefix, leading zero or separator"
        if type(value) is int:
            legal = self.values()
            near = [each for each in legal if each < value][-1:] + [each for each in legal if each > value][:1]
            return f"the nearest {'legal value is' if len(near) == 1 else 'are'} {join(map(str, near), 'and')}"
        return ""


RANGES: Mapping[str, IntegerRange] = MappingProxyType(
    {
        "heads.query": IntegerRange(1, 1024),
        "heads.kv": IntegerRange(1, 1024),
        "head_dim.qk": IntegerRange(16, 256, multiple_of=8),
        "head_dim.v": IntegerRange(16, 256, multiple_of=8),
        "compression.block": IntegerRange(1, 256),
        "compression.stride": IntegerRange(1, 256),
        "compression.phi.hidden": IntegerRange(16, 1024, multiple_of=16),
        "selection.block": IntegerRange(16, 1024, power_of_two=True),
        "selection.count": IntegerRange(1, 1024),
        "selection.initial": IntegerRange(0, 1024),
        "selection.local": IntegerRange(0, 1024),
        "selection.scores.indexer.dim": IntegerRange(16, 256, power_of_two=True),
        "window.size": IntegerRange(1, 65536),
    }
)
"""The legal values of every whole-number field, by dotted path."""


def one_of(*choices: str) -> Rule:
    """One of the words of the annotated `typing.Literal`."""
    expected = join(choices) if len(choices) == 2 else f"one of {join(choices)}"

    def check(value: object) -> str:
        if isinstance(value, str) and value in choices:
            return value
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise reject(f"expected {expected}, got {describe(value)}", hint)

    return Leaf(expected, check, {"type": "string", "enum": list(choices)})


@dataclass(frozen=True)
class WordOrRecord(Rule):
    """One of some words, or a mapping that the record beside them in the annotated union reads.

    Attributes:
        words: the rule of the words.
        record: what a mapping must be, in words.
        written: how a value is written that names the record as if it were a word, by that name.
    """

    words: Rule
    record: str
    written: Mapping[str, str] = field(hash=False)

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"{self.words.expected.removeprefix('one of ').replace(' or ', ', ')} or {self.record}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        words, record = get_args(source)
        if list(get_args(words)) != self.words.schema["enum"]:
            raise TypeError(f"the choices {self.words.schema['enum']} stand beside {words}")

        def check(value: Any, read: Callable[[Any], Any]) -> Any:
            if isinstance(value, (Mapping, record)):
                return read(value)
            if isinstance(value, str) and value in self.words.schema["enum"]:
                return value
            hint = ""
            if isinstance(value, str):
                hint = f"write {self.written[value]}" if value in self.written else ""
                hint = hint or did_you_mean(value, (*self.words.schema["enum"], *self.written))
            raise reject(f"expected {self.expected}, got {describe(value)}", hint)

        def dump(value: Any) -> Any:
            return value.model_dump() if isinstance(value, record) else value

        plain = core_schema.plain_serializer_function_ser_schema(dump)
        return core_schema.no_info_wrap_validator_function(check, handler.generate_schema(record), serialization=plain)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [self.words.schema, handler(schema["schema"])]}


def _check_flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    hint = "remove the quotes" if value in ("true", "false") else ""
    raise reject(f"expected {FLAG.expected}, got {describe(value)}", hint)


FLAG = Leaf("true or false", _check_flag, {"type": "boolean"})
"""A boolean."""


def _check_version(value: object) -> int:
    if type(value) is int and value in VERSION.schema["enum"]:
        return value
    raise reject(f"unknown version: expected {VERSION.expected}, got {describe(value)}")


VERSION = Leaf("the number 1 or 2", _check_version, {"type": "integer", "enum": [1, 2]})
"""The version of the spec language."""


def _check_name(value: object) -> str:
    if not isinstance(value, str):
        hint = "put it in quotes if it is meant as a name" if isinstance(value, bool) else ""
        raise reject(f"expected {PACKAGE_NAME.expected}, got {describe(value)}", hint)
    if not re.fullmatch(_NAME, value, re.ASCII) or len(value) > MAX_NAME:
        mended = re.sub(r"[^A-Za-z0-9]+", "_", value).strip("_")[:MAX_NAME]
        mended = mended if re.match(r"[A-Za-z]", mended) else f"nsa_{mended}" if mended else ""
        hint = f"for example {mended!r}" if mended else ""
        raise reject(f"expected {PACKAGE_NAME.expected}, got {describe(value)}", hint)
    if keyword.iskeyword(value):
        raise reject(f"{value!r} is a keyword of Python and cannot be imported", f"for example '{value}_attention'")
    if value in RESERVED_NAMES:
        raise reject(f"{value!r} would hide the package of that name", f"for example '{value}_attention'")
    return value


_NAME = r"[A-Za-z][A-Za-z0-9_]*"
PACKAGE_NAME = Leaf(
    f"a Python identifier of at most {MAX_NAME} ASCII characters that does not start with an underscore",
    _check_name,
    {
        "type": "string",
        "pattern": f"^{_NAME}$",
        "maxLength": MAX_NAME,
        "not": {"enum": sorted({*keyword.kwlist, *RESERVED_NAMES})},
    },
)
"""An ASCII Python identifier: the name of a folder and of an importable package."""


def _check_paragraph(value: object) -> str:
    if not isinstance(value, str):
        hint = "put it in quotes" if isinstance(value, (bool, int, float)) else ""
        raise reject(f"expected {PARAGRAPH.expected}, got {describe(value)}", hint)
    text = " ".join(value.split())
    if len(text) > MAX_DESCRIPTION:
        raise reject(f"expected {PARAGRAPH.expected}, got {len(text)} characters")
    if not text.isprintable():
        unprintable = next(character for character in text if not character.isprintable())
        raise reject(f"expected {PARAGRAPH.expected}, got the character U+{ord(unprintable):04X} in it")
    return text


PARAGRAPH = Leaf(
    f"printable text of at most {MAX_DESCRIPTION} characters",
    _check_paragraph,
    {"type": "string", "maxLength": MAX_DESCRIPTION},
)
"""Free text, read as one paragraph: each run of white space, line ends included, becomes one space."""


def _check_scale(value: object) -> float | str:
    if value == "auto" and isinstance(value, str):
        return "auto"
    if type(value) in (int, float) and 0 < value < 1e30:  # also false for NaN
        return float(value)
    hint = did_you_mean(value, ("auto",)) if isinstance(value, str) else ""
    raise reject(f"expected {SOFTMAX_SCALE.expected} below 1e30, got {describe(value)}", hint)


SOFTMAX_SCALE = Leaf(
    "'auto' or a positive number",
    _check_scale,
    {"anyOf": [{"const": "auto"}, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e30}]},
)
"""``auto``, or a positive finite number (an integer is read as that number)."""


def _check_passes(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        hint = f"write [{value}]" if value in ORDERED_PASSES else ""
        raise reject(f"expected {PASSES.expected}, got {describe(value)}", hint)
    for index, item in enumerate(value):
        if item not in ORDERED_PASSES:
            hint = did_you_mean(item, ORDERED_PASSES) if isinstance(item, str) else ""
            raise reject(f"expected one of {join(ORDERED_PASSES)}, got {describe(item)}", hint, index)
        if item in value[:index]:
            raise reject(f"{item!r} is listed twice", "list each pass once", index)
    if "forward" not in value:
        got = f"{join(value, 'and')} without forward" if value else "an empty list"
        raise reject(f"expected {PASSES.expected}, got {got}", "add 'forward'")
    return tuple(name for name in ORDERED_PASSES if name in value)


def _check_joint(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or sorted(value, key=str) not in ([], sorted(JOINABLE)):
        got = f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else describe(value)
        raise reject(f"expected {JOINT.expected}, got {got}", "write [selection, window]")
    return JOINABLE if value else ()


JOINABLE = ("selection", "window")
JOINT = Leaf(
    "[selection, window] or an empty list",
    _check_joint,
    {"enum": [[], list(JOINABLE), list(reversed(JOINABLE))]},
)
"""No branches, or selection and window, in any order as written, kept in that order."""


PASSES = Leaf(
    "a list of forward and, if wanted, backward and decode",
    _check_passes,
    {
        "type": "array",
        "items": {"enum": list(ORDERED_PASSES)},
        "uniqueItems": True,
        "contains": {"const": "forward"},
    },
)
"""``forward`` and, if wanted, ``backward`` and ``decode``, in any order as written, kept in that order."""
