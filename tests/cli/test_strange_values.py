"""Numbers, lists, names and durations on the command line: what is none ends with 2 and a line, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from nsa_gen.cli.common import MOST_TOKENS, parse_whole, seconds, split_list

NUMBERS = {
    ("explain", "tiny", "--tokens"): 1,
    ("verify", "tiny", "--seed"): 0,
    ("verify", "tiny", "--examples"): 1,
    ("tune", "tiny", "--dry-run", "--seed"): 0,
    ("tune", "tiny", "--dry-run", "--jobs"): 1,
    ("compile", "tiny", "--jobs"): 1,
    ("bench", "tiny", "--seed"): 0,
    ("cache", "why", "tiny", "--gpu", "h100", "--tokens"): 1,
    ("cache", "why", "tiny", "--gpu", "h100", "--batch"): 1,
}
LENGTHS = [
    ("verify", "tiny", "--length"),
    ("tune", "tiny", "--dry-run", "--shapes"),
    ("tune", "tiny", "--dry-run", "--batch"),
    ("bench", "tiny", "--tokens"),
]
NAMES = [
    ("compile", "tiny", "--target"),
    ("demo", "tiny", "--target"),
    ("tune", "tiny", "--dry-run", "--passes"),
    ("bench", "tiny", "--passes"),
    ("bench", "tiny", "--inputs"),
    ("bench", "tiny", "--against"),
]
GPUS = [
    ("explain", "tiny", "--gpu"),
    ("tune", "tiny", "--dry-run", "--gpu"),
    ("cache", "why", "tiny", "--gpu"),
]
DURATIONS = [("tune", "tiny", "--dry-run", "--budget"), ("bench", "tiny", "--budget")]
CHOICES = [("verify", "tiny", "--device"), ("verify", "tiny", "--dtype"), ("tune", "tiny", "--effort")]

NO_NUMBERS = ["", " ", "٣", "３", "²", "1_0", "+5", "-1", "0x10", "1.0", "1e3", "nan", "9" * 40, "9" * 5000, "five"]
NO_NAMES = ["", " ", ",", "sm_90,,sm_80", "forward,", "nobody", "ｓｍ＿９０", "x" * 5000]
NO_DURATIONS = ["", " ", "0", "0.5", "-1", "nan", "inf", "1e9", "٣s", "5 m", "5m 3s", "1_0", "9" * 40, "5d", "."]


def refused(call, arguments: tuple[str, ...], value: str) -> None:
    """The value in the place of the last option ends the command with 2, naming the option."""
    answer = call(*arguments[:-1], f"{arguments[-1]}={value}")
    assert answer.returncode == 2, (answer.stdout, answer.stderr)
    assert answer.stdout == "" and "Traceback" not in answer.stderr
    said = " ".join(answer.stderr.split())
    assert arguments[-1] in said and len(said) < 600


@pytest.mark.parametrize("arguments", NUMBERS, ids=" ".join)
def test_what_is_no_number_is_a_wrong_call(call, arguments):
    for value in NO_NUMBERS:
        refused(call, arguments, value)
    if NUMBERS[arguments]:
        refused(call, arguments, "0")


@pytest.mark.parametrize("arguments", LENGTHS, ids=" ".join)
def test_what_is_no_list_of_numbers_is_a_wrong_call(call, arguments):
    for value in [*NO_NUMBERS, "0", ",", "63,,65", "63,", "63;65", "63,٣"]:
        refused(call, arguments, value)


@pytest.mark.parametrize("arguments", NAMES, ids=" ".join)
def test_what_is_no_list_of_names_is_a_wrong_call(call, arguments):
    for value in NO_NAMES:
        refused(call, arguments, value)


@pytest.mark.parametrize("arguments", GPUS + CHOICES, ids=" ".join)
def test_what_is_no_name_is_a_wrong_call(call, arguments):
    for value in ("", " ", "nobody", "ｈ１００"):
        refused(call, arguments, value)


@pytest.mark.parametrize("arguments", DURATIONS, ids=" ".join)
def test_what_is_no_duration_is_a_wrong_call(call, arguments):
    for value in NO_DURATIONS:
        refused(call, arguments, value)


def test_an_example_with_strange_digits_or_sizes_is_a_wrong_call(call):
    for text in ("", "oracle: B=٣ T=21", "oracle: B=1 T=" + "9" * 40, "packed: packed 3+" + "9" * 5000):
        answer = call("verify", "tiny", "--device", "cpu", "--example", text)
        assert answer.returncode == 2 and "Traceback" not in answer.stderr


def test_results_of_a_benchmark_are_not_named_as_its_journal(call):
    """The journal is deleted at the end, and the results would be with it."""
    answer = call("bench", "tiny", "-o", "results.jsonl")
    assert answer.returncode == 2 and "journal" in answer.stderr and not Path("results.jsonl").exists()


def test_what_is_written_twice_counts_once_and_zeros_may_lead():
    assert split_list(["a,b", "b, a ,c"]) == ["a", "b", "c"]
    assert [parse_whole(text) for text in ("7", "007", " 7 ", str(MOST_TOKENS))] == [7, 7, 7, MOST_TOKENS]
    assert [seconds(text) for text in ("90s", " 5m", "1.5h", "300", "1")] == [90, 300, 5400, 300, 1]
    with pytest.raises(typer.BadParameter, match="at most 5"):
        parse_whole("6", 1, 5)
