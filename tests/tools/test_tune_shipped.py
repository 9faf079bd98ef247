"""Tuning all shipped specs: every one gets its turn whatever becomes of the others, and the table tells."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nsa_gen.tuning import Bucket, BucketResult, TuneReport
from nsa_gen.tuning.identity import Device
from nsa_gen.tuning.report import Estimate
from tools.tune_shipped import main


def report(name: str, **changes: Any) -> str:
    ms = {"forward": {"default": 10.0, "tuned": 8.0}, "backward": {"default": 20.0, "tuned": 19.0}}
    result = BucketResult(Bucket(8192), {"window_forward": {"num_warps": 8}}, 1.11, 0.002, {"independent": ms})
    fields = {"results": (result,), "measured": 100, "seconds": 61.0, **changes}
    return json.dumps(TuneReport(name, "sm_90", fields.pop("device", None), {}, **fields).to_json())


def name_of(command: list[str]) -> str:
    return command[command.index("tune") + 1]


def test_each_spec_is_tuned_into_its_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, report(name_of(command)))

    assert main(["--out", str(tmp_path), "--specs", "tiny,mha_16", "--budget", "5m"], run) == 0
    ahead = [each for each in commands if "--dry-run" in each]
    tuned = [each for each in commands if "--dry-run" not in each]
    assert [name_of(each) for each in ahead] == [name_of(each) for each in tuned] == ["tiny", "mha_16"]
    assert commands[0] is ahead[0] and "--out" not in ahead[0], "nothing is tuned before it is compiled"
    assert tuned[0][-2:] == ["--budget", "5m"] and str(tmp_path / "tiny" / "tuned") in tuned[0]
    text = capsys.readouterr().out
    assert "8192 1.110x +- 0.002, ms: inde for 10 -> 8, inde bac 20 -> 19; 1 changed" in text
    assert json.loads((tmp_path / "tiny.json").read_text())["measured"] == 100


def test_a_spec_that_fails_is_a_line_and_the_status_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {
        "tiny": subprocess.CompletedProcess([], 2, ""),
        "mha_16": subprocess.CompletedProcess([], 1, report("mha_16", quarantined={"t8192_b1: x": "wrong: o 2 of 1"})),
        "llama3_8b": subprocess.CompletedProcess([], 0, report("llama3_8b")),
    }
    arguments = ["--out", str(tmp_path), "--specs", ",".join(answers)]
    assert main(arguments, lambda command: answers[name_of(command)]) == 1
    text = capsys.readouterr().out
    assert "tiny         FAILED with exit status 2" in text and "WRONG t8192_b1: x: wrong: o 2 of 1" in text
    assert "llama3_8b      8192 1.110x" in text


def test_an_unknown_spec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--specs", "unheard_of"])


def test_the_report_puts_tuned_beside_default_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = Device("NVIDIA H100 80GB HBM3", 132, "sm_90", driver="580", torch="2.11.0", triton="3.6.0")
    (tmp_path / "tiny.json").write_text(report("tiny", device=device))
    (tmp_path / "mha_16.json").write_text(report("mha_16", device=device, quarantined={"t8192_b1: x": "hung"}))
    assert main(["--out", str(tmp_path), "--report"]) == 0
    found = json.loads((tmp_path / "tuned.json").read_text())
    assert [(row["spec"], row["pass"], row["gain"]) for row in found["rows"]] == [
        ("mha_16", "forward", 1.25),
        ("mha_16", "backward", 1.0526),
        ("tiny", "forward", 1.25),
        ("tiny", "backward", 1.0526),
    ]
    assert found["gpu"]["driver"] == "580" and found["quarantined"] == {"mha_16": {"t8192_b1: x": "hung"}}
    text = (tmp_path / "tuned.md").read_text()
    assert "| tiny | 8192 | 1 | forward | independent | 10 | 8 | 1.25x |" in text and text in capsys.readouterr().out
    assert main(["--out", str(tmp_path), "--report"]) == 0, "its own files are no reports"
    empty = tmp_path / "empty"
    assert main(["--out", str(empty), "--report"]) == 1


def test_a_dry_run_compiles_and_says_how_long_it_would_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        assert "--dry-run" in command and "--resume" not in command
        return subprocess.CompletedProcess(command, 0, report(name_of(command), expected=Estimate(200.0, 16, 90.0)))

    assert main(["--out", str(tmp_path), "--specs", "tiny,mha_16", "--dry-run"], run) == 0
    text = capsys.readouterr().out
    assert "compiling 200 core-seconds, measuring about 90 s" in text and "about 180 s on the GPU" in text


def test_specs_without_the_passes_asked_for_are_left_out(tmp_path: Path) -> None:
    names: list[str] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        names.append(name_of(command))
        assert command[command.index("--batch") + 1] == "1,32"
        return subprocess.CompletedProcess(command, 0, report(names[-1]))

    assert main(["--out", str(tmp_path), "--passes", "decode", "--batch", "1,32"], run) == 0
    assert set(names) == {"llama3_8b", "nsa_64x4", "tiny"}
    assert (tmp_path / "tiny.decode.json").is_file()
