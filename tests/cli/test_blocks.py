"""Reports as blocks, and numbers with units."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nsa_gen.cli.blocks import Code, Heading, Table, Text, to_markdown, to_terminal
from nsa_gen.cli.tables import kib, si

BLOCKS = [
    Heading("Costs"),
    Text("A floor [in brackets]."),
    Table(("kernel", ">time"), [("window", "1.5 ms"), ("a|b", "ok")], footer=("all", "2 ms"), title="By kernel"),
    Code("nsa-gen check tiny"),
]


def test_markdown_has_a_table_with_aligned_columns_and_escaped_bars():
    assert to_markdown(BLOCKS) == (
        "## Costs\n\nA floor [in brackets].\n\n"
        "By kernel\n\n| kernel | time |\n| --- | --: |\n| window | 1.5 ms |\n| a\\|b | ok |\n| all | 2 ms |\n\n"
        "```sh\nnsa-gen check tiny\n```\n"
    )


def test_the_terminal_shows_the_same_words_and_takes_brackets_literally():
    output = io.StringIO()
    to_terminal(BLOCKS, Console(file=output, width=80))
    for word in ("Costs", "A floor [in brackets].", "By kernel", "a|b", "2 ms", "nsa-gen check tiny"):
        assert word in output.getvalue()


def test_a_row_with_a_cell_too_few_is_refused():
    with pytest.raises(ValueError, match="expected 2 cells"):
        Table(("kernel", "time"), [("window",)])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 s"),
        (1.26e12, "1.26 Ts"),
        (999.9e9, "1.00 Ts"),
        (126, "126 s"),
        (12.64, "12.6 s"),
        (0.00126, "1.26 ms"),
        (3.2e-8, "32.0 ns"),
        (2.5e18, "2500 Ps"),
    ],
)
def test_numbers_have_three_digits_and_a_prefix(value, expected):
    assert si(value, "s") == expected


def test_kib_are_exact_where_they_can_be():
    assert (kib(65536), kib(10000), kib(16)) == ("64 KiB", "9.8 KiB", "16 B")
