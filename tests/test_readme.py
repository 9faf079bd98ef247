"""What README.md shows is true: its spec, commands, numbers, table of GPUs and links."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from nsa_gen.hardware import GPUS, TARGETS
from nsa_gen.spec import load_spec, parse_spec
from tests.figures import script, speed_ups
from tests.test_documents import blocks, commands_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(section: str, text: str = README) -> list[list[str]]:
    """The cells of the first table of a section, without its head."""
    rows = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    first = next(number for number, line in enumerate(rows) if line.startswith("| ---") or line.startswith("| --:"))
    found = []
    for line in rows[first + 1 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_it_has_at_most_two_hundred_lines_and_shows_use_first():
    assert len(README.splitlines()) <= 200
    ((first, code), *_) = blocks(ROOT / "README.md")
    assert first == "python" and len(code.splitlines()) <= 12


def test_the_spec_is_the_shipped_one_by_another_name():
    ((_, text),) = [block for block in blocks(ROOT / "README.md") if block[0] == "yaml"]
    assert parse_spec(text) == load_spec("llama3_8b").replace(name="my_attention", description="")


PACKAGES = ("sfnsa", "nsa-triton", "fsa", "fla")


def test_the_tables_of_speed_ups_are_the_results():
    short, long = [], []
    latest = script().LATEST
    for run in (latest, script().ALL_PACKAGES):
        for record in speed_ups(run):
            place = [str(record["group"]), f"{record['tokens']:,}"]
            ratios = {name: f"{record[name]:.2f}" if name in record else "" for name in ("nsa_gen", *PACKAGES)}
            best = max((name for name in PACKAGES if name in record), key=record.__getitem__)
            assert best == "sfnsa"
            if run == latest:
                short.append([*place, ratios["nsa_gen"], f"{ratios[best]} ({best})"])
            long.append([*place, *ratios.values()])
    assert table("When dense attention is faster") == short
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (\d+) \| ([\d,]+) ((?:\| [\d. ]*){5})\|$", performance, re.MULTILINE)
    assert [[group, tokens, *(cell.strip() for cell in cells.split("|")[1:])] for group, tokens, cells in found] == long


def test_decode_takes_what_the_results_say():
    folder = ROOT / "docs" / "results" / "h100_2026-11-23_one_loop"
    times = json.loads((folder / "decode.json").read_text(encoding="utf-8"))["jobs"][0]["result"]["decode"]
    one, many = ({row["batch"]: row for row in times if row["tokens"] == 65536}[batch] for batch in (1, 32))
    sentence = re.search(
        r"takes (\d+) µs for one sequence\s+and (\d+) µs for 32, dense (\d+) and ([\d,]+)", README
    ).groups()
    assert [int(number.replace(",", "")) for number in sentence] == [
        round(one["decode_us"]), round(many["decode_us"]), round(one["dense_us"]), round(many["dense_us"]),
    ]  # fmt: skip


def test_the_table_of_gpus_has_every_architecture_of_the_hardware_table():
    rows = table("Which GPUs")
    for target in TARGETS:
        assert [row for row in rows if re.search(rf"\b{target}\b", row[1])], target
    names = " ".join(row[0] for row in rows)
    for gpu in GPUS:
        assert re.search(rf"\b{gpu.product}\b", names), gpu.product
    compiled = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ncompile-versions:")[2].partition("\n\n")[0]
    for row in rows:
        for target in re.findall(r"\b(?:sm_\d+|gfx\w+)\b", row[1]):
            assert ("make test" in row[3]) == (target in compiled), target


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/results/README.md"])
def test_every_file_it_links_to_exists(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target.partition("#")[0]).exists(), target


def test_every_command_is_in_the_table_of_commands_with_options_that_exist(capsys):
    from nsa_gen.cli import main
    from nsa_gen.cli.app import app

    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `nsa-gen (\w+)([^`]*)` \|", text, flags=re.MULTILINE)
    known = [command.name for command in app.registered_commands] + [each.name for each in app.registered_groups]
    assert sorted(name for name, _ in rows) == sorted(known)
    groups = {
        each.name: {command.name for command in each.typer_instance.registered_commands}
        for each in app.registered_groups
    }
    for name, usage in rows:
        inner = [usage.split()[0]] if usage.split()[:1] and usage.split()[0] in groups.get(name, ()) else []
        main([name, *inner, "--help"])
        shown = capsys.readouterr().out
        for option in re.findall(r"--?[a-z]+", usage.replace("\\|", " ")):
            assert option in shown, (name, option)


def test_files_that_it_names_exist():
    for path in re.findall(r"`((?:docs|nsa_gen|tests|generated|examples)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    (sentence,) = re.findall(r"Read (`spec\.py`.*?)\. \[The tour\]", README, flags=re.DOTALL)
    for name in re.findall(r"`([\w/]+\.py)`", sentence):
        assert (ROOT / "generated" / "llama3_8b" / name).exists(), name


def pieces() -> list[tuple[int, str]]:
    """The lines of the page that shows the language piece by piece; the last block's need version 2."""
    found = [text for kind, text in blocks(ROOT / "docs" / "spec-examples.md") if kind == "yaml"][1:]
    versions = [1] * (len(found) - 1) + [2]
    return [(version, line) for version, text in zip(versions, found, strict=True) for line in text.splitlines()]


def test_the_page_by_example_begins_with_a_shipped_spec():
    first = next(text for kind, text in blocks(ROOT / "docs" / "spec-examples.md") if kind == "yaml")
    assert first.strip() == (ROOT / "specs" / "llama3_8b.yaml").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize(("version", "piece"), pieces())
def test_a_piece_of_a_spec_is_valid_in_place_of_the_same_piece_of_another(version, piece):
    fields = {
        "version": str(version),
        "name": "piece",
        "heads": "{query: 8, kv: 4}",
        "head_dim": "64",
        "dtype": "float32",
        "window": "{size: 512}",
        "compression": "{block: 32, stride: 16}",
        "selection": "{block: 64, count: 16}",
    }
    name, _, value = piece.partition(":")
    fields[name] = value.strip()
    text = "\n".join(f"{key}: {value}" for key, value in fields.items())
    parse_spec(text)
    if version == 2:  # and it does need it
        with pytest.raises(Exception, match="version 2"):
            parse_spec(text.replace("version: 2", "version: 1"))


def test_the_commands_of_the_readme_are_the_steps_in_order():
    lines = [line for kind, text in blocks(ROOT / "README.md") if kind == "sh" for line in commands_of(text)]
    names = [shlex.split(line)[1] for line in lines if line.startswith("nsa-gen")]
    assert names == ["new", "check", "generate", "explain", "compile", "verify", "tune", "bench"]
