"""Reading YAML with the place of every value, so that every mistake can be pointed at.

Scalars follow the core schema of YAML 1.2: ``no`` and ``on`` are words, ``0o17``, ``017``, ``1:30`` and ``1_000`` are
no numbers. Anchors, aliases, tags and merge keys are refused: a spec is small enough to be written out.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.error import MarkedYAMLError

from nsa_gen import _files
from nsa_gen.spec.errors import Problem, SpecError
from nsa_gen.spec.fields import describe

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_NODES = 10_000

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]{1,9})?")
_CONSTANTS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}

FieldPath = tuple[str | int, ...]


def dotted(path: FieldPath) -> str:
    """``("passes", 1)`` as ``passes[1]``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_key(part)}" for part in path)
    return text.removeprefix(".")


def _key(name: str) -> str:
    """A field name for a message of one line, however strange it is."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name) else describe(name).removeprefix("the string ")


@dataclass(frozen=True, slots=True)
class Place:
    """A 1-based line and column."""

    line: int
    column: int


@dataclass(slots=True)
class Document:
    """A parsed text: its plain value, where each part stands, and what was already found wrong.

    `refused` holds the paths whose value could not be taken over; what validation says about them is noise.
    """

    filename: str
    value: Any = None
    keys: dict[FieldPath, Place] = field(default_factory=dict)
    values: dict[FieldPath, Place] = field(default_factory=dict)
    refused: set[FieldPath] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def report(self, place: Place | None, path: FieldPath, message: str, hint: str = "") -> None:
        line, column = (place.line, place.column) if place else (0, 0)
        self.problems.append(Problem(self.filename, line, column, dotted(path), message, hint))

    def locate(self, path: FieldPath) -> tuple[FieldPath, Place]:
        """The deepest written part on the way to `path`, and where its value stands."""
        while path and path not in self.values:
            path = path[:-1]
        return path, self.values.get(path, Place(1, 1))


class _Abort(Exception):
    """The text cannot be read further. Its arguments are those of `Document.report`."""


class _Composer:
    """Turns YAML events into a `Document`, without recursion deeper than `MAX_DEPTH`."""

    def __init__(self, text: str, filename: str) -> None:
        self.document = Document(filename)
        self._text = text
        self._nodes = 0

    def compose(self) -> Document:
        try:
            self._loader = yaml.SafeLoader(self._text)
            self._compose_stream()
        except _Abort as abort:
            self.document.report(*abort.args)
        except yaml.reader.ReaderError as error:
            before = self._text[: error.position]
            place = Place(before.count("\n") + 1, len(before) - before.rfind("\n"))
            shown = f"U+{error.character:04X}" if isinstance(error.character, int) else repr(error.character)
            self.document.report(place, (), f"the character {shown} is not allowed in YAML", "remove it")
        except MarkedYAMLError as error:
            self._report_syntax(error)
        except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" is no character
            self.document.report(_place(self._loader.get_mark()), (), f"this is not valid YAML: {error}")
        return self.document

    def _compose_stream(self) -> None:
        self._loader.get_event()  # stream start
        if self._loader.check_event(yaml.StreamEndEvent):
            raise _Abort(Place(1, 1), (), "expected a mapping, but the file is empty", "a spec starts with version: 1")
        self._loader.get_event()  # document start
        self.document.value = self._node((), 0)
        self._loader.get_event()  # document end
        if self._loader.check_event(yaml.DocumentStartEvent):
            place = _place(self._loader.get_event().start_mark)
            raise _Abort(place, (), "expected one document, but a second one starts here", "one file holds one spec")

    def _report_syntax(self, error: MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        place = _place(mark) if mark else Place(1, 1)
        said = ", ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in said:
            self.document.report(place, (), "a tab cannot be used here", "indent with spaces")
        else:
            self.document.report(place, (), f"this is not valid YAML: {said}")

    def _node(self, path: FieldPath, depth: int) -> Any:
        event = self._loader.get_event()
        place = _place(event.start_mark)
        self._nodes += 1
        if depth > MAX_DEPTH:
            raise _Abort(place, path, f"nested more than {MAX_DEPTH} levels deep", "a spec has four levels")
        if self._nodes > MAX_NODES:
            raise _Abort(place, path, f"more than {MAX_NODES} values", "this is no spec")
        self.document.values.setdefault(path, place)
        self._refuse_machinery(event, path, place)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path, depth)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path, place)
        return None  # an alias, refused already

    def _refuse_machinery(self, event: yaml.NodeEvent, path: FieldPath, place: Place) -> None:
        if isinstance(event, yaml.AliasEvent):
            what, hint = f"aliases such as *{_key(event.anchor)}", "write the value out"
        elif event.anchor is not None:
            what, hint = f"anchors such as &{_key(event.anchor)}", "remove the anchor"
        elif event.tag is not None:
            what, hint = f"tags such as {_key(event.tag.replace('tag:yaml.org,2002:', '!!'))}", "remove the tag"
        else:
            return
        self._refuse(place, path, f"{what} are not part of the language", hint)

    def _refuse(self, place: Place, path: FieldPath, message: str, hint: str) -> None:
        self.document.report(place, path, message, hint)
        self.document.refused.add(path)

    def _mapping(self, path: FieldPath, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not self._loader.check_event(yaml.MappingEndEvent):
            key_event = self._loader.peek_event()
            place = _place(key_event.start_mark)
            if not isinstance(key_event, yaml.ScalarEvent):
                self.document.report(place, path, "a field name must be a plain word", "write name: value")
                self._node((*path, "?"), depth + 1)
                self._node((*path, "?"), depth + 1)
                continue
            self._loader.get_event()
            key = key_event.value
            where = (*path, key)
            self._refuse_machinery(key_event, where, place)
            self._refuse_surrogates(key, where, place)
            if key in result:
                first = self.document.keys[where]
                message = f"this field is already written at line {first.line}, column {first.column}"
                self.document.report(place, where, message, "keep one of the two")
                self._node(where, depth + 1)
                continue
            self.document.keys[where] = place
            result[key] = self._node(where, depth + 1)
        self._loader.get_event()
        return result

    def _sequence(self, path: FieldPath, depth: int) -> list[Any]:
        result: list[Any] = []
        while not self._loader.check_event(yaml.SequenceEndEvent):
            result.append(self._node((*path, len(result)), depth + 1))
        self._loader.get_event()
        return result

    def _scalar(self, event: yaml.ScalarEvent, path: FieldPath, place: Place) -> Any:
        text: str = event.value
        if event.style is not None:  # quoted or a block of text
            self._refuse_surrogates(text, path, place)
            return text
        value = resolve(text)
        if value is None and path:
            hint = "give it a value, or remove the line"
            self._refuse(self.document.keys.get(path, place), path, "this field is left empty", hint)
        return value

    def _refuse_surrogates(self, text: str, path: FieldPath, place: Place) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _Abort(
                place, (), "half of a surrogate pair is not a character", "write the character itself"
            ) from None


def _place(mark: yaml.Mark) -> Place:
    return Place(mark.line + 1, mark.column + 1)


def resolve(text: str) -> object:
    """The value of an unquoted scalar by the core schema of YAML 1.2, without octal and hexadecimal numbers."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def compose(text: str, filename: str) -> Document:
    """The document in `text`; what is wrong with it as YAML is in its problems."""
    return _Composer(text, filename).compose()


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a spec file; raises `SpecError` when it is missing, no file, unreadable or larger than 1 MiB."""
    try:
        return _files.read_bytes(Path(path), MAX_BYTES)
    except FileNotFoundError:
        message, hint = "there is no such file", ""
    except IsADirectoryError:
        message, hint = "expected a file, got a directory", "name the .yaml file in it"
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise _too_large(str(path)) from None
        message, hint = f"the file cannot be read: {getattr(error, 'strerror', None) or error}", ""
    raise SpecError([Problem(str(path), 0, 0, "", message, hint)])


def decode(text: str | bytes, filename: str) -> str:
    """`text` as a string without a byte order mark; raises `SpecError` when it is too large or not UTF-8."""
    size = len(text.encode(errors="surrogatepass")) if isinstance(text, str) else len(text)
    if size > MAX_BYTES:
        raise _too_large(filename)
    try:
        return _files.without_mark(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        assert isinstance(text, bytes)
        before = text[: error.start].decode("utf-8", errors="replace").removeprefix("\ufeff")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        message = f"expected UTF-8 text, got the byte 0x{text[error.start]:02x}"
        raise SpecError([Problem(filename, line, column, "", message, "save the file as UTF-8")]) from None
    except ValueError as error:
        raise SpecError([Problem(filename, 1, 1, "", str(error), "")]) from None


def _too_large(filename: str) -> SpecError:
    message = f"larger than {MAX_BYTES} bytes"
    return SpecError([Problem(filename, 0, 0, "", message, "a spec has a few dozen lines")])
