"""YAML is read with the place of every value, and its traps are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nsa_gen.spec import SpecError, load_spec, parse_spec
from nsa_gen.spec.source import MAX_BYTES, resolve
from tests.spec.spec_texts import as_text, base_document, only_problem, problems_of

GOOD = as_text(base_document())


def test_an_error_is_one_line_that_an_editor_can_jump_to() -> None:
    problem = only_problem(GOOD.replace("stride: 16", "stride: 0"))
    assert str(problem) == (
        "s.yaml:6:34: compression.stride: expected a whole number in 1..256, got the integer 0 "
        "(the nearest legal value is 1)"
    )


def test_every_mistake_is_reported_at_once_in_the_order_of_the_text() -> None:
    text = (
        "version: 1\n"
        "name: no-good\n"
        "heads: {query: 64.0, kv: yes}\n"
        "head_dim: 100\n"
        "dtype: bf16\n"
        "windwo: {size: 3}\n"
        "selection: {block: 60, cuont: 3, count: '4'}\n"
        "passes: [forward, encode]\n"
        "compression: {block: 32, stride: 12, phi: mlp}\n"
        "window: 512\n"
        "dtype: float16\n"
    )
    found = [(p.line, p.column, p.field) for p in problems_of(text)]
    assert found == [
        (2, 7, "name"),
        (3, 16, "heads.query"),
        (3, 26, "heads.kv"),
        (4, 11, "head_dim"),
        (5, 8, "dtype"),
        (6, 1, "windwo"),
        (7, 20, "selection.block"),
        (7, 24, "selection.cuont"),
        (7, 41, "selection.count"),
        (8, 19, "passes[1]"),
        (9, 34, "compression.stride"),
        (9, 43, "compression.phi"),
        (10, 9, "window"),
        (11, 1, "dtype"),
    ]


def test_str_of_a_spec_error_has_one_line_a_problem() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(GOOD.replace("block: 32", "block: 0").replace("size: 512", "size: 0"), "two.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert [line.split(" ")[0] for line in lines] == ["two.yaml:6:22:", "two.yaml:8:16:"]


def test_a_duplicate_field_is_refused_with_both_places() -> None:
    problem = only_problem(GOOD + "dtype: float16\n")
    assert (problem.line, problem.column, problem.field) == (9, 1, "dtype")
    assert "line 5, column 1" in problem.message


def test_a_duplicate_inside_a_flow_mapping_is_refused_with_both_places() -> None:
    problem = only_problem(GOOD.replace("block: 32,", "block: 32, block: 16,"))
    assert (problem.line, problem.column, problem.field) == (6, 26, "compression.block")
    assert "line 6, column 15" in problem.message


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "n", "No", "OFF"])
def test_a_word_that_old_yaml_reads_as_a_boolean_stays_a_word(word: str) -> None:
    assert parse_spec(GOOD.replace("name: example", f"name: {word}")).name == word


@pytest.mark.parametrize("written", ["true", "True", "false", "FALSE"])
def test_a_boolean_is_no_number(written: str) -> None:
    problem = only_problem(GOOD.replace("query: 8", f"query: {written}"))
    assert (problem.line, problem.column, problem.field) == (3, 16, "heads.query")
    assert f"got the boolean {written.lower()}" in problem.message


@pytest.mark.parametrize("written", ["0o17", "017", "0x10", "0b1000", "1_000", "1:30", "+-8", "8e", "eight", "08"])
def test_what_is_no_plain_decimal_number_is_never_read_as_another_number(written: str) -> None:
    problem = only_problem(GOOD.replace("query: 8", f"query: {written}"))
    assert problem.field == "heads.query"
    assert problem.message == f"expected a whole number in 1..1024, got the string '{written}'"


@pytest.mark.parametrize(("written", "got"), [("64.0", "64.0"), ("6.4e1", "64.0"), ("64.5", "64.5"), (".inf", "inf")])
def test_a_number_with_a_point_or_an_exponent_is_no_whole_number(written: str, got: str) -> None:
    problem = only_problem(GOOD.replace("query: 8", f"query: {written}"))
    assert problem.message == f"expected a whole number in 1..1024, got the number {got}"


def test_a_quoted_number_is_refused_with_the_advice_to_unquote_it() -> None:
    problem = only_problem(GOOD.replace("query: 8", "query: '8'"))
    assert (problem.line, problem.column) == (3, 16)
    assert problem.message.endswith("got the string '8'")
    assert problem.hint == "remove the quotes"


def test_a_number_of_a_thousand_digits_is_refused_without_a_traceback() -> None:
    assert only_problem(GOOD.replace("query: 8", "query: " + "9" * 5000)).field == "heads.query"
    assert only_problem(GOOD + "scale: " + "9" * 5000).field == "scale"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("12", 12), ("-3", -3), ("+4", 4), ("0", 0), ("1.5", 1.5), ("1e-3", 0.001), (".5", 0.5), ("2.", 2.0)],
        *[("~", None), ("", None), ("null", None), ("true", True), ("no", "no"), ("2001-01-01", "2001-01-01")],
    ],
)
def test_unquoted_scalars_follow_the_core_schema(text: str, value: object) -> None:
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("name: !!python/object/apply:os.system [ls]", 1, 7, "tags such as"),
        ("name: !!str example", 1, 7, "tags such as"),
        ("name: !custom example", 1, 7, "tags such as"),
        ("name: ! example", 1, 7, "tags such as"),
        ("name: &here example", 1, 7, "anchors such as &here"),
        ("name: *there", 1, 7, "aliases such as *there"),
        ("heads: &loop {query: *loop, kv: 2}", 1, 8, "anchors such as &loop"),
    ],
)
def test_tags_anchors_and_aliases_are_refused(text: str, line: int, column: int, words: str) -> None:
    problem = problems_of(text)
    here = [p for p in problem if (p.line, p.column) == (line, column)]
    assert any(words in p.message for p in here), problem


def test_a_merge_key_is_refused_with_the_reason() -> None:
    problem = only_problem(GOOD + "<<: {size: 3}\n")
    assert (problem.line, problem.column) == (9, 1)
    assert "merge keys" in problem.hint


def test_a_refused_value_does_not_hide_other_mistakes_or_add_noise() -> None:
    text = GOOD.replace("query: 8", "query: !!int 8").replace("size: 512", "size: 0")
    assert [(p.field, p.line, p.column) for p in problems_of(text)] == [("heads.query", 3, 16), ("window.size", 8, 16)]


def test_an_empty_branch_is_not_silently_left_out() -> None:
    problem = only_problem(GOOD.replace("window: {size: 512}", "window:"))
    assert (problem.line, problem.column, problem.field) == (8, 1, "window")
    assert problem.message == "this field is left empty"


@pytest.mark.parametrize("empty", ["~", "null", ""])
def test_an_empty_compression_does_not_blame_the_selection_for_missing_it(empty: str) -> None:
    text = GOOD.replace("compression: {block: 32, stride: 16}", f"compression: {empty}")
    assert only_problem(text).field == "compression"


def test_a_tab_as_indentation_is_named() -> None:
    problem = only_problem("version: 1\nheads:\n\tquery: 3\n")
    assert (problem.line, problem.column) == (3, 1)
    assert (problem.message, problem.hint) == ("a tab cannot be used here", "indent with spaces")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "\n\n", "\ufeff"])
def test_an_empty_file_is_refused(text: str) -> None:
    problem = only_problem(text)
    assert (problem.line, problem.column) == (1, 1)
    assert "the file is empty" in problem.message


@pytest.mark.parametrize(
    ("text", "got"),
    [("- 1\n- 2\n", "a list"), ("llama", "the string 'llama'"), ("3", "the integer 3"), ("---\n", "nothing")],
)
def test_a_file_that_is_no_mapping_is_refused(text: str, got: str) -> None:
    assert only_problem(text).message == f"expected a mapping of fields, got {got}"


def test_a_second_document_is_refused_where_it_starts() -> None:
    problem = only_problem(GOOD + "---\n" + GOOD)
    assert (problem.line, problem.column) == (9, 1)
    assert "one document" in problem.message


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [("a: [1, 2\n", 2, 1), ("a: b: c\n", 1, 5), ("a: 'x\n", 2, 1), ("a: @x\n", 1, 4), ("%YAML 9.1\n---\na: 1\n", 1, 1)],
)
def test_broken_yaml_is_refused_where_it_breaks(text: str, line: int, column: int) -> None:
    problem = only_problem(text)
    assert (problem.line, problem.column) == (line, column)
    assert problem.message.startswith("this is not valid YAML: ")


@pytest.mark.parametrize("escape", ["\\UFFFFFFFF", "\\U00110000", "\\ud800"])
def test_an_escape_that_is_no_character_is_refused_on_its_line(escape: str) -> None:
    problem = only_problem(GOOD + f'description: "{escape}"\n')
    assert problem.line == 9


def test_a_control_character_is_refused_where_it_stands() -> None:
    problem = only_problem("version: 1\nname: a\x07b\n")
    assert (problem.line, problem.column) == (2, 8)
    assert "U+0007" in problem.message


def test_bytes_that_are_not_utf8_are_refused_where_they_stand() -> None:
    problem = only_problem(b"version: 1\nname: caf\xe9\n")
    assert (problem.line, problem.column) == (2, 10)
    assert "0xe9" in problem.message
    assert "UTF-8" in only_problem("version: 1".encode("utf-16")).message


def test_a_byte_order_mark_and_windows_line_ends_are_read() -> None:
    plain = parse_spec(GOOD)
    assert parse_spec(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()) == plain
    assert parse_spec("\ufeff" + GOOD) == plain


def test_columns_count_characters_and_not_bytes() -> None:
    problem = only_problem(GOOD.replace("name: example", "name: example # été") + "{é: 1}: 3\n")
    assert problem.line == 9
    assert only_problem(GOOD.replace("{size: 512}", "{'é': 1, size: 512}")).column == 10
    assert only_problem(GOOD.replace("{size: 512}", "{size: 512, 'éé': 1}")).column == 21


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "{? ", '["'])
def test_deep_nesting_is_refused_without_exhausting_the_stack(opening: str) -> None:
    assert problems_of(opening * 20_000)


def test_too_many_values_are_refused() -> None:
    assert "more than 10000 values" in problems_of("- a\n" * 20_000)[-1].message


def test_a_text_above_one_mebibyte_is_refused() -> None:
    assert only_problem("#" * (MAX_BYTES + 1)).message == f"larger than {MAX_BYTES} bytes"
    assert only_problem(b"#" * (MAX_BYTES + 1)).message == f"larger than {MAX_BYTES} bytes"


def test_a_field_name_that_is_no_word_is_refused_but_the_rest_is_still_checked() -> None:
    problems = problems_of("? [a]\n: 3\n" + GOOD.replace("size: 512", "size: 0"))
    assert [(p.line, p.column, p.field) for p in problems] == [(1, 3, ""), (10, 16, "window.size")]


def test_a_strange_field_name_cannot_break_the_line_of_its_error() -> None:
    problem = only_problem(GOOD + '"a\\nb": 3\n')
    assert problem.field == "'a\\nb'"
    assert "\n" not in str(problem)


def test_a_file_is_read_by_path_and_named_as_given(tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(GOOD)
    assert load_spec(path) == load_spec(str(path)) == parse_spec(GOOD)
    path.write_text(GOOD.replace("size: 512", "size: 0"))
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert str(caught.value).startswith(f"{path}:8:16: window.size: ")


def test_a_missing_file_a_directory_and_an_unreadable_name_are_refused(tmp_path: Path) -> None:
    for path, words in [
        (tmp_path / "missing.yaml", "no such file"),
        (tmp_path, "got a directory"),
        (tmp_path / "nul\0.yaml", "cannot be read"),
        (tmp_path / ("x" * 5000 + ".yaml"), "cannot be read"),
    ]:
        with pytest.raises(SpecError, match=words) as caught:
            load_spec(path)
        (problem,) = caught.value.problems
        assert (problem.file, problem.line, problem.column) == (str(path), 0, 0)


def test_one_byte_order_mark_is_left_out_and_two_are_a_problem() -> None:
    mark = "\ufeff"
    for given in (GOOD, GOOD.encode()):
        marked = [mark * times + GOOD if isinstance(given, str) else (mark * times + GOOD).encode() for times in (1, 2)]
        assert parse_spec(marked[0]) == parse_spec(given)
        problem = only_problem(marked[1])
        assert (problem.line, problem.column) == (1, 1) and "stands twice" in problem.message


def test_an_endless_file_is_refused() -> None:
    if not os.path.exists("/dev/zero"):
        pytest.skip("needs /dev/zero")
    with pytest.raises(SpecError, match="expected a regular file"):
        load_spec("/dev/zero")
