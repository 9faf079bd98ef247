"""Tuning all shipped specs: every one gets its turn whatever becomes of the others, and the table tells."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nsa_gen.tuning import Bucket, BucketResult, TuneReport
from tools.tune_shipped import main


def report(name: str, **changes: Any) -> str:
    ms = {"forward": {"default": 10.0, "tuned": 8.0}, "backward": {"default": 20.0, "tuned": 19.0}}
    result = BucketResult(Bucket(8192), {"window_forward": {"num_warps": 8}}, 1.11, 0.002, {"independent": ms})
    fields = {"results": (result,), "measured": 100, "seconds": 61.0, **changes}
    return json.dumps(TuneReport(name, "sm_90", None, {}, **fields).to_json())


def test_each_spec_is_tuned_into_its_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, report(command[4]))

    assert main(["--out", str(tmp_path), "--specs", "tiny,mha_16", "--budget", "5m"], run) == 0
    assert [each[4] for each in commands] == ["tiny", "mha_16"]
    assert commands[0][-2:] == ["--budget", "5m"] and str(tmp_path / "tiny" / "tuned") in commands[0]
    text = capsys.readouterr().out
    assert "8192 1.110x +- 0.002, ms: inde for 10.00 -> 8.00, inde bac 20.00 -> 19.00; 1 changed" in text
    assert json.loads((tmp_path / "tiny.json").read_text())["measured"] == 100


def test_a_spec_that_fails_is_a_line_and_the_status_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {
        "tiny": subprocess.CompletedProcess([], 2, ""),
        "mha_16": subprocess.CompletedProcess([], 1, report("mha_16", quarantined={"t8192_b1: x": "wrong: o 2 of 1"})),
        "llama3_8b": subprocess.CompletedProcess([], 0, report("llama3_8b")),
    }
    arguments = ["--out", str(tmp_path), "--specs", ",".join(answers)]
    assert main(arguments, lambda command: answers[command[4]]) == 1
    text = capsys.readouterr().out
    assert "tiny         FAILED with exit status 2" in text and "WRONG t8192_b1: x: wrong: o 2 of 1" in text
    assert "llama3_8b      8192 1.110x" in text


def test_an_unknown_spec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--specs", "unheard_of"])
