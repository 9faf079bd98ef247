"""`nsa-gen tune` as a user calls it, with a fake GPU where one is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsa_gen.cli import tune as command
from tests.machine import GPU
from tests.tuning.fakes import SPEC, FakeCompiler, fake_tools
from tests.tuning.test_search import other_tile

GOOD = other_tile("window_forward")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(folder))
    monkeypatch.setenv("COLUMNS", "200")
    return folder


@pytest.fixture
def spec_file(tmp_path: Path) -> str:
    path = tmp_path / "under_test.yaml"
    path.write_text(SPEC)
    return str(path)


@pytest.fixture
def fake_gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the command a GPU that does what a script says."""

    def use(script: dict[str, Any]) -> None:
        monkeypatch.setattr(command, "_tools", lambda: fake_tools(cache, script))
        monkeypatch.setattr(command, "_require_gpu", lambda: None)

    return use


def test_it_shows_the_gain_the_winner_and_where_everything_is(call, fake_gpu, spec_file: str, cache: Path) -> None:
    fake_gpu({"times": {"forward": {GOOD: 2.0}}})
    answer = call("tune", spec_file, "--shapes", "8192", "--effort", "quick")
    assert answer.returncode == 0, answer.stderr
    assert "8192 tokens: 1.071 +- 0.00" in answer.stdout and "1.25x" in answer.stdout
    assert "window_forward" in answer.stdout and "saved in" in answer.stdout and ".journal.jsonl" in answer.stdout
    assert "compiled" in answer.stderr and "final: best so far 1.07x" in answer.stderr


def test_json_has_all_of_it(call, fake_gpu, spec_file: str) -> None:
    fake_gpu({"times": {"forward": {GOOD: 2.0}}})
    document = json.loads(call("tune", spec_file, "--shapes", "8192,500", "--effort", "quick", "--json").stdout)
    assert document["ok"] and [each["bucket"]["tokens"] for each in document["results"]] == [8192, 512]
    assert Path(document["results"][0]["saved"]).is_file() and Path(document["journal"]).is_file()
    assert document["gpu"]["name"] == "NVIDIA H100 80GB HBM3" and document["measured"] > 50


def test_a_wrong_candidate_is_reported_loudly_and_the_answer_is_no(call, fake_gpu, spec_file: str) -> None:
    fake_gpu({"times": {"forward": {GOOD: 9.0}}, "faults": {GOOD: "wrong"}})
    answer = call("tune", spec_file, "--shapes", "8192", "--effort", "quick")
    assert answer.returncode == 1
    assert "WRONG RESULTS" in answer.stdout and "dq 3 of 1" in answer.stdout and "dq 3 of 1" in answer.stderr
    assert "saved in" in answer.stdout, "the rest is intact"


def test_candidates_that_fail_are_listed_with_their_reasons(call, fake_gpu, spec_file: str) -> None:
    fake_gpu({"faults": {GOOD: "oom", other_tile("combine_forward"): "crash"}})
    answer = call("tune", spec_file, "--shapes", "8192", "--effort", "quick")
    assert answer.returncode == 0
    assert "2 candidates failed and were left out" in answer.stdout
    assert "CUDA out of memory" in answer.stdout and "exited with 11" in answer.stdout


def test_it_writes_into_a_package_and_goes_on_from_its_journal(call, fake_gpu, spec_file: str, tmp_path: Path) -> None:
    fake_gpu({"times": {"forward": {GOOD: 2.0}}})
    out = tmp_path / "package" / "tuned"
    arguments = ("tune", spec_file, "--effort", "quick", "--out", str(out))
    assert call(*arguments, "--shapes", "8192").returncode == 0
    answer = call(*arguments, "--shapes", "8192,65536", "--resume")
    assert "resumed:" in answer.stderr and "answers taken from the journal" in answer.stdout
    document = json.loads((out / "nvidia_h100_80gb_hbm3.json").read_text())
    assert [each["identity"]["bucket"]["tokens"] for each in document["entries"]] == [8192, 65536]


def test_a_dry_run_shows_what_would_be_tried(
    call, monkeypatch: pytest.MonkeyPatch, spec_file: str, cache: Path
) -> None:
    from nsa_gen.tuning import Tools

    monkeypatch.setattr(command, "_tools", lambda: Tools(compiler=FakeCompiler))
    answer = call("tune", spec_file, "--dry-run", "--gpu", "h100", "--shapes", "8192")
    assert answer.returncode == 0, answer.stderr
    assert "selected_forward_key_major" in answer.stdout and "nothing was timed" in answer.stdout
    assert call("tune", spec_file, "--dry-run", "--gpu", "h9000").returncode == 2


def test_without_a_gpu_it_says_what_can_be_done(call, cache: Path) -> None:
    if GPU:
        pytest.skip("there is a GPU")
    answer = call("tune", "tiny")
    assert answer.returncode == 2 and "--dry-run --gpu h100" in answer.stderr and answer.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "soon"], "expected a duration such as 90s, 5m or 1h, got 'soon'"),
        (["--budget", "0s"], "got '0s'"),
        (["--effort", "hard"], "hard"),
        (["--shapes", "8k"], "expected a number of at least 1"),
        (["--passes", "backward"], "passes: expected forward, or forward and backward"),
        (["--passes", "decode"], "the spec has no decode pass"),
        (["--passes", "sideways"], "expected some of forward, backward, decode"),
        (["--packed", "--batch", "4"], "batch: expected 1 for packed"),
        (["--batch", "0"], "--batch"),
    ],
)
def test_a_wrong_call_is_refused(call, fake_gpu, spec_file: str, arguments: list[str], said: str) -> None:
    fake_gpu({})
    answer = call("tune", spec_file, *arguments)
    assert answer.returncode == 2 and said in " ".join(answer.stderr.split())


def test_a_pass_that_the_spec_has_not_is_refused(call, fake_gpu, tmp_path: Path) -> None:
    path = tmp_path / "forward.yaml"
    path.write_text(SPEC.replace("[forward, backward]", "[forward]"))
    fake_gpu({})
    answer = call("tune", str(path), "--passes", "forward,backward")
    assert answer.returncode == 2 and "the spec has no backward pass" in " ".join(answer.stderr.split())
