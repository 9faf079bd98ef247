"""Whatever the text, reading it gives a spec or a `SpecError` with places inside the text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_gen.spec import Spec, SpecError, parse_spec
from nsa_gen.spec.parse import all_fields
from tests.spec.spec_texts import as_text, base_document, valid_documents

FRAGMENTS = [
    "{",
    "}",
    "[",
    "]",
    ": ",
    ", ",
    "- ",
    "? ",
    "\n",
    "  ",
    "\t",
    "#",
    "&a ",
    "*a",
    "!!int ",
    "!x",
    "'",
    '"',
    "|",
    ">",
]
FRAGMENTS += [
    "<<",
    "---\n",
    "...\n",
    "%YAML 1.1\n",
    "\\x",
    "\\U00110000",
    "\0",
    "\x85",
    "\u2028",
    "\ud800",
    "é",
    "~",
    "1e999",
]
FRAGMENTS += sorted({field.rpartition(".")[2] + ": " for field in all_fields()})


def check(text: str | bytes) -> None:
    try:
        spec = parse_spec(text)
    except SpecError as error:
        lines = text.replace(b"\r" if isinstance(text, bytes) else "\r", b"\n" if isinstance(text, bytes) else "\n")
        count = len(lines.splitlines()) + 1
        assert error.problems
        assert len(str(error).split("\n")) == len(error.problems)
        assert all(problem.message and 0 <= problem.line <= count for problem in error.problems)
    else:
        assert isinstance(spec, Spec)


@given(st.text(max_size=200))
@settings(max_examples=100)
def test_any_text_is_read_or_refused(text: str) -> None:
    check(text)


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_any_bytes_are_read_or_refused(text: bytes) -> None:
    check(text)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join))
@settings(max_examples=200)
def test_any_heap_of_yaml_is_read_or_refused(text: str) -> None:
    check(text)


@given(valid_documents().map(as_text), st.integers(0, 400), st.integers(0, 12), st.sampled_from(FRAGMENTS))
@settings(max_examples=100)
def test_any_damage_to_a_spec_is_read_or_refused(text: str, at: int, length: int, fragment: str) -> None:
    check(text[:at] + fragment + text[at + length :])


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["mlp", "input"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([name for name in all_fields() if "." not in name]), json_like, max_size=4))
@settings(max_examples=100)
def test_any_value_in_any_field_is_read_or_refused(changes: dict[str, object]) -> None:
    check(as_text(base_document(**changes)))
