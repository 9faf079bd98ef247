"""The command line as a whole: help, exit codes, pipes, Ctrl-C."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from nsa_gen.cli.app import app
from nsa_gen.cli.blocks import Table, to_terminal

NO_JSON = {("cache",), ("export",), ("cache", "export"), ("cache", "clear")}
COMMANDS = (
    "new",
    "check",
    "generate",
    "explain",
    "compile",
    "verify",
    "tune",
    "bench",
    "report",
    "demo",
    "doctor",
    "env",
    "cache",
    "export",
)


def commands() -> dict[tuple[str, ...], Any]:
    """Every command of the application, those of groups too, by what is typed."""

    def below(group: Any, path: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
        found = {}
        for name, command in group.commands.items():
            found[*path, name] = command
            if hasattr(command, "commands"):
                found |= below(command, (*path, name))
        return found

    return below(typer.main.get_command(app), ())


def test_help_lists_every_command_and_shows_an_example(call):
    answer = call("--help")
    assert answer.returncode == 0
    assert "Example:" in answer.stdout
    listed = answer.stdout.partition("Commands:")[2]
    assert tuple(line.split()[0] for line in listed.splitlines() if line.strip()) == COMMANDS
    assert "..." not in listed  # no summary is too long for its line


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_the_help_of_every_command_has_an_example_of_itself_and_a_sentence_an_option(call, path):
    answer = call(*path, "--help")
    assert answer.returncode == 0
    _, _, example = answer.stdout.partition("Example:")
    assert f"nsa-gen {' '.join(path)}" in example.split("Options:")[0]
    for parameter in commands()[path].params:
        assert getattr(parameter, "help", "") or parameter.name == "help", parameter.name


@pytest.mark.parametrize("path", [path for path in commands() if path not in NO_JSON], ids=" ".join)
def test_every_command_that_answers_can_answer_in_json(call, path):
    assert "--json" in call(*path, "--help").stdout


def examples() -> list[str]:
    """The lines of all examples of all helps."""
    helps = [command.help or "" for command in commands().values()]
    return [line.strip() for text in helps for line in text.splitlines() if line.strip().startswith("nsa-gen ")]


@pytest.mark.parametrize("line", examples())
def test_the_options_of_an_example_exist(line):
    words = shlex.split(line.partition(" > ")[0])[1:]
    known = commands()
    path = next(tuple(words[:length]) for length in (2, 1) if tuple(words[:length]) in known)
    options = {name for parameter in known[path].params for name in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options


@pytest.mark.parametrize("arguments", [["explain", "tiny"], ["cache", "list"], ["chek"]])
def test_what_is_piped_has_no_colour_and_nothing_cut_off(nsa_gen, arguments, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "")
    answer = nsa_gen(*arguments)
    assert "\x1b" not in answer.stdout + answer.stderr
    assert "…" not in answer.stdout + answer.stderr


def test_without_colour_a_terminal_gets_the_same_words():
    block = Table(("what", "result"), [("window", "ok"), ("selection", "fails")], title="Results")
    texts = []
    for no_color in (False, True):
        stream = io.StringIO()
        to_terminal([block], Console(file=stream, force_terminal=True, no_color=no_color, width=60))
        texts.append(re.sub("\x1b\\[[0-9;]*m", "", stream.getvalue()))
    assert texts[0] == texts[1] and "fails" in texts[1]


def test_a_narrow_terminal_loses_no_column():
    block = Table(
        ("kernel", ">time", "limited by", "schedule"), [("selected_forward", "1.23 ms", "memory", "one pass")]
    )
    stream = io.StringIO()
    to_terminal([block], Console(file=stream, width=24))
    for word in ("kernel", "limited", "schedule", "selected_forward", "1.23 ms", "memory"):
        assert word in stream.getvalue()


def test_version_is_the_package_s(call):
    import nsa_gen

    assert call("--version").stdout == f"nsa-gen {nsa_gen.__version__}\n"


def test_a_shell_completes_commands_and_options(nsa_gen, monkeypatch):
    monkeypatch.setenv("_NSA_GEN_COMPLETE", "complete_bash")
    for words, place, expected in (("nsa-gen ver", "1", ["verify"]), ("nsa-gen verify --qu", "2", ["--quick"])):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", place)
        assert nsa_gen().stdout.split() == expected
    monkeypatch.setenv("_NSA_GEN_COMPLETE", "source_bash")
    assert "COMP_WORDS" in nsa_gen().stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["chek"], "chek"),
        ([], "Usage"),
        (["check"], "SPEC"),
        (["check", "tinny"], "did you mean tiny?"),
        (["check", "no/such/file.yaml"], "no/such/file.yaml"),
        (["check", "."], "folder"),
        (["check", "tiny", "--jsn"], "--jsn"),
        (["generate", "tiny", "tiny"], "same folder"),
        (["explain", "tiny", "--gpu", "h1000"], "h100"),
        (["check", "/dev/null"], "no regular file"),
        (["explain", "tiny", "--tokens", "0"], "tokens"),
        (["explain", "tiny", "--tokens", "9" * 400], "--tokens"),
        (["compile", "tiny", "--target", "sm_90,sm_91"], "sm_91"),
        (["compile", "tiny", "--jobs", "0"], "jobs"),
        (["verify", "tiny", "--length", "64,x"], "'x'"),
        (["verify", "tiny", "--length", "0"], "'0'"),
        (["verify", "tiny", "--length", "9" * 5000], "at most 2147483647"),
        (["verify", "tiny", "--device", "tpu"], "tpu"),
        (["verify", "tiny", "--dtype", "float64"], "float64"),
        (["report", "no/such.json"], "no/such.json"),
        (["explain", "tiny", "--measured", "no/such.json"], "no/such.json"),
        (["new"], "NAME"),
        (["new", "a.b"], "a_b"),
    ],
)
def test_a_wrong_call_ends_with_2_and_names_what_is_wrong_on_stderr(call, arguments, named):
    answer = call(*arguments)
    assert answer.returncode == 2
    assert named in answer.stderr + answer.stdout * (not arguments)
    assert "Traceback" not in answer.stderr


def test_a_file_that_may_not_be_read_is_a_wrong_call(call, tmp_path, monkeypatch):
    secret = tmp_path / "secret.yaml"
    secret.write_text("version: 1\n")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != secret)  # root may read everything
    answer = call("check", str(secret))
    assert answer.returncode == 2
    assert "permission" in answer.stderr


@pytest.mark.parametrize("command", ["generate", "explain", "compile", "verify", "demo"])
def test_an_invalid_spec_ends_with_1_and_its_problems_on_stderr(call, invalid_spec, command):
    answer = call(command, str(invalid_spec))
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert f"{invalid_spec}:4:" in answer.stderr
    assert "heads.query" in answer.stderr


def test_a_fault_of_our_own_is_told_from_a_no_by_its_exit_code(call, monkeypatch):
    import nsa_gen.spec

    def broken(_):
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(nsa_gen.spec, "load_spec", broken)
    answer = call("check", "tiny")
    assert answer.returncode == 70
    assert "broken on purpose" in answer.stderr
    assert "report" in answer.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["check", "tiny"], ["check", "tiny", "--json"]])
def test_a_reader_that_goes_away_is_no_error_message(arguments, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        ended = subprocess.run(
            [sys.executable, "-m", "nsa_gen", *arguments],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
    assert ended.stderr == ""
    assert ended.returncode == 141


@pytest.mark.parametrize("arguments", [["explain", "tiny"], ["explain", "tiny", "--json"]])
def test_a_reader_that_goes_away_from_a_table_is_no_answer_either(nsa_gen, arguments, tmp_path):
    process = subprocess.run(
        f"{shlex.join([sys.executable, '-m', 'nsa_gen', *arguments])} | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (141, "")


def test_where_letters_are_ascii_the_others_are_written_by_their_numbers(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    ended = subprocess.run(
        [sys.executable, "-m", "nsa_gen", "explain", "tiny", "--tokens", "8192"],
        env=environment, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert b"\\xb5s" in ended.stdout and ended.stdout.isascii()


@pytest.mark.parametrize(("stream", "code"), [(">&-", 0), ("2>&-", 0)])
def test_a_standard_stream_may_be_closed(stream, code, tmp_path):
    command = f"{shlex.quote(sys.executable)} -m nsa_gen check tiny {stream}"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == code and ended.stderr == ""


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "arguments",
    [["new", "mine", "--from", "deep.json"], ["explain", "tiny", "--measured", "deep.json"],
     ["cache", "import", "deep.json"]],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_json_that_is_nested_too_deeply_is_refused(call, tmp_path, arguments):
    (tmp_path / "deep.json").write_text(DEEP)
    answer = call(*arguments)
    assert answer.returncode == 1
    assert "deep.json" in answer.stderr and "nested too deeply" in answer.stderr and "Traceback" not in answer.stderr


def test_ctrl_c_ends_with_130_and_one_line(tmp_path):
    program = (
        "import signal, sys, time, nsa_gen.spec\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a caller in the background has it ignored
        "def wait(_):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "nsa_gen.spec.load_spec = wait\n"
        "from nsa_gen.cli import main\n"
        "sys.exit(main(['check', 'tiny']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "nsa-gen: interrupted\n"
