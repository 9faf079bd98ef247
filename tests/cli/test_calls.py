"""The command line as a whole: help, exit codes, pipes, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("new", "check", "generate", "explain", "compile", "verify", "bench", "report", "demo", "env")


def test_help_lists_every_command_and_shows_an_example(call):
    answer = call("--help")
    assert answer.returncode == 0
    assert "Example:" in answer.stdout
    for command in COMMANDS:
        assert f"\n  {command} " in answer.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example_of_itself(call, command):
    answer = call(command, "--help")
    assert answer.returncode == 0
    _, _, example = answer.stdout.partition("Example:")
    assert f"nsa-gen {command}" in example.split("Options:")[0]
    assert "--json" in answer.stdout


def test_version_is_the_package_s(call):
    import nsa_gen

    assert call("--version").stdout == f"nsa-gen {nsa_gen.__version__}\n"


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
        (["explain", "tiny", "--tokens", "0"], "tokens"),
        (["compile", "tiny", "--target", "sm_90,sm_91"], "sm_91"),
        (["compile", "tiny", "--jobs", "0"], "jobs"),
        (["verify", "tiny", "--length", "64,x"], "'x'"),
        (["verify", "tiny", "--length", "0"], "'0'"),
        (["verify", "tiny", "--device", "tpu"], "tpu"),
        (["verify", "tiny", "--dtype", "float64"], "float64"),
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
