"""What README.md shows is true: its spec is the shipped one, its pieces are valid, its commands are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nsa_gen.cli import main
from nsa_gen.spec import parse_spec, shipped_specs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def pieces() -> list[str]:
    """The lines of the section that shows the language piece by piece."""
    return [line for block in blocks("yaml")[1:] for line in block.splitlines()]


def commands() -> list[str]:
    """The nsa-gen commands that are shown to be typed."""
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith("nsa-gen ")]


def test_the_spec_is_the_shipped_one():
    assert blocks("yaml")[0].strip() == shipped_specs()["llama3_8b"].read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("piece", pieces())
def test_a_piece_of_a_spec_is_valid_in_place_of_the_same_piece_of_another(piece):
    fields = {
        "version": "1",
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
    parse_spec("\n".join(f"{key}: {value}" for key, value in fields.items()))


@pytest.mark.parametrize("command", commands())
def test_a_command_s_options_are_in_its_help(command, capsys):
    _, name, *arguments = shlex.split(command)
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    for option in (argument for argument in arguments if argument.startswith("-")):
        assert re.search(rf"(^|[ ,]){re.escape(option)}\b", text, flags=re.MULTILINE), option


def test_every_command_is_in_the_table_with_options_that_exist(capsys):
    rows = re.findall(r"^\| `nsa-gen (\w+)([^`]*)` \|", README, flags=re.MULTILINE)
    commands = [
        "new",
        "check",
        "generate",
        "explain",
        "compile",
        "verify",
        "tune",
        "cache",
        "export",
        "bench",
        "report",
        "demo",
        "env",
    ]
    assert [name for name, _ in rows] == commands
    for name, usage in rows:
        main([name, "--help"])
        text = capsys.readouterr().out
        for option in re.findall(r"--?[a-z]+", usage.replace("\\|", " ")):
            assert f"{option}" in text, (name, option)


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
