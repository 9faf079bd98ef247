"""`nsa-gen bench`: what it asks for, what it prints, and that it does not pretend without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from nsa_gen.bench import decode as decode_module
from nsa_gen.bench import session as session_module
from nsa_gen.bench.recorded import LAGS, Selection
from nsa_gen.bench.records import DecodeRow, Results, TaskRow, read_results
from tests.bench.fakes import pair, sample_results


@pytest.fixture
def asked(monkeypatch):
    """The tasks that a session is asked for; the answer is in `asked.results`. A GPU is pretended."""

    class Asked:
        tasks = ()
        budget = None
        results = sample_results()

    found = Asked()

    def run_session(session, tasks, settings):
        found.tasks, found.budget = tuple(tasks), session.budget
        return found.results

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(session_module, "run_session", run_session)
    return found


def test_without_a_gpu_it_says_so_offers_explain_and_ends_with_2(call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = call("bench", "tiny")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "torch sees none" in answer.stderr and "nsa-gen explain tiny" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--against", "dense,nonsense"], "nonsense"),
        (["--tokens", "8k"], "'8k'"),
        (["--passes", "forward,sideways"], "'sideways'"),
        (["--passes", "backward"], "needs its forward"),
        (["--inputs", "zeros"], "'zeros'"),
        (["--inputs", "correlated,missing.json"], "missing.json"),
        (["--budget", "0"], "budget"),
        (["--passes", "forward,decode"], "decode is timed alone"),
        (["--passes", "decode", "--plot", "x.png"], "--plot"),
        (["--batch", "4"], "--batch"),
    ],
)
def test_a_wrong_call_ends_with_2_and_names_what_is_wrong(call, arguments, named):
    answer = call("bench", "tiny", *arguments)
    assert answer.returncode == 2 and named in answer.stderr


def test_a_pass_that_the_spec_does_not_have_is_a_wrong_call(call, tmp_path):
    spec = tmp_path / "forward.yaml"
    spec.write_text(
        "version: 1\nname: forward\ndtype: float32\nheads: {query: 2, kv: 1}\nhead_dim: 16\nwindow: {size: 16}\n"
        "passes: [forward]\n"
    )
    answer = call("bench", str(spec), "--passes", "forward,backward")
    assert answer.returncode == 2 and "no backward pass" in answer.stderr


def test_an_invalid_spec_ends_with_1_and_its_problems(call, invalid_spec):
    answer = call("bench", str(invalid_spec))
    assert answer.returncode == 1 and f"{invalid_spec}:4:" in answer.stderr


def test_the_help_has_an_example_and_says_what_may_be_asked(call):
    text = call("bench", "--help").stdout
    assert "nsa-gen bench llama3_8b" in text and "--json" in text and "fla" in text


def test_it_measures_what_the_options_say(call, asked):
    answer = call(
        "bench", "tiny", "--against", "fla,cudnn", "--tokens", "100,300", "--inputs", "correlated,independent",
        "--passes", "forward", "--budget", "60",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    check, *timed = asked.tasks
    assert check.check and asked.budget == 60
    assert [(task.inputs, task.tokens) for task in timed] == [
        (kind, tokens) for kind in ("correlated", "independent") for tokens in (100, 300)
    ]
    assert {task.contenders for task in asked.tasks} == {("cudnn", "fla")}
    assert {task.passes for task in asked.tasks} == {("forward",)}


def test_inputs_may_be_a_file_of_statistics_for_a_spec_and_lengths_with_a_choice(call, asked, tmp_path):
    file = tmp_path / "model.json"
    shares = dict.fromkeys(LAGS, 0.5)
    Selection(2048, 16, 4, 1, 1, shares, shares, 0.5, 0.3).write(file)
    assert call("bench", "tiny", "--against", "none", "--tokens", "300", "--inputs", str(file)).returncode == 0
    assert [task.inputs for task in asked.tasks if not task.check] == [str(file)]
    answer = call("bench", "tiny", "--against", "none", "--tokens", "100", "--inputs", str(file))
    assert answer.returncode == 2 and "more than 128 tokens, got 100" in answer.stderr
    answer = call("bench", "gptoss_window", "--against", "none", "--inputs", str(file))
    assert answer.returncode == 2 and "selects blocks itself, got gptoss_window" in answer.stderr
    file.write_text("{}")
    answer = call("bench", "tiny", "--inputs", str(file))
    assert answer.returncode == 2 and "format" in answer.stderr


def test_left_to_itself_it_takes_the_contenders_that_are_installed(call, asked):
    assert call("bench", "llama3_8b").returncode == 0
    assert set(asked.tasks[0].contenders) >= {"cudnn", "fa2"}
    assert "fsa" not in asked.tasks[0].contenders
    assert {task.tokens for task in asked.tasks if not task.check} == {8192, 32768, 65536}


def test_against_none_times_the_operator_alone(call, asked):
    assert call("bench", "tiny", "--against", "none").returncode == 0
    assert {task.contenders for task in asked.tasks} == {()}


def test_the_report_is_a_table_and_the_json_the_whole(call, asked):
    text = call("bench", "tiny").stdout
    assert "neighbouring queries share" in text and "of the floor" in text
    assert json.loads(call("bench", "tiny", "--json").stdout) == json.loads(json.dumps(asked.results.to_document()))


def test_a_plot_is_written_where_it_is_asked_for(call, asked, tmp_path):
    pytest.importorskip("matplotlib")
    answer = call("bench", "tiny", "--plot", "speed.png")
    assert answer.returncode == 0 and "wrote speed.png" in answer.stderr
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_an_operator_without_a_time_ends_with_1(call, asked):
    asked.results = Results(rows=tuple(pair("nsa_gen", None, None, error="wrong, so not timed: o 3 of 1")))
    answer = call("bench", "tiny", "--plot", "speed.png")
    assert answer.returncode == 1
    assert "wrong, so not timed" in answer.stdout and "no plot" in answer.stderr


def test_a_task_that_was_not_run_ends_with_1(call, asked):
    asked.results = Results(
        rows=tuple(pair("nsa_gen", 1.0, 2.0)),
        tasks=(TaskRow("A", "independent", 9, "not run", "the budget was spent"),),
    )
    answer = call("bench", "tiny")
    assert answer.returncode == 1 and "not run: the budget was spent" in answer.stdout


def test_results_are_kept_where_it_is_asked_for_and_explain_reads_them(call, asked, tmp_path):
    answer = call("bench", "tiny", "--output", "out/results.json")
    assert answer.returncode == 0 and "nsa-gen report out/results.json" in answer.stderr
    assert read_results(tmp_path / "out" / "results.json").rows == asked.results.rows
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


@pytest.fixture
def decoded(monkeypatch):
    """What steps of decode are asked for, without a GPU; `faults` are found before."""

    class Decoded:
        shapes = ()
        dense = None
        faults: tuple[str, ...] = ()

    found = Decoded()

    def measure_decode(spec, package, shapes, *, dense, seed):
        found.shapes, found.dense = tuple(shapes), dense
        for tokens, batch in shapes:
            times = (4.0, 5.0, 8.0) if tokens * batch < 10**6 else ()
            yield DecodeRow(spec.name, tokens, batch, 1e6, 1.0, *times, problem="" if times else "too large")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(decode_module, "measure_decode", measure_decode)
    monkeypatch.setattr(decode_module, "decode_faults", lambda spec, package: list(found.faults))
    return found


def test_decode_is_a_table_over_contexts_and_batches(call, decoded, tmp_path):
    shapes = ("--tokens", "4096,65536", "--batch", "1,4")
    answer = call("bench", "tiny", "--passes", "decode", *shapes, "--output", "decode.json")
    assert answer.returncode == 0 and decoded.dense is True
    assert decoded.shapes == ((4096, 1), (4096, 4), (65536, 1), (65536, 4))
    (line,) = (line for line in answer.stdout.splitlines() if "65,536" in line and " 4 " in line)
    assert line.split() == ["65,536", "4", "4.0", "5.0", "1.0", "25%", "8.0", "2.00x"]
    kept = read_results(tmp_path / "decode.json")
    assert [(row.tokens, row.batch) for row in kept.decodes] == list(decoded.shapes) and kept.ours_is_timed
    assert call("report", "decode.json", "--output", "decode.html").returncode == 0
    assert "65,536" in (tmp_path / "decode.html").read_text()
    assert not (tmp_path / "decode.jsonl").exists()


def test_times_of_decode_are_kept_as_they_are_taken(call, decoded, monkeypatch, tmp_path):
    measured = decode_module.measure_decode

    def interrupted(spec, package, shapes, **given):
        rows = measured(spec, package, shapes, **given)
        yield next(rows)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(decode_module, "measure_decode", interrupted)
    shapes = ("--tokens", "4096,65536", "--batch", "1,4")
    assert call("bench", "tiny", "--passes", "decode", *shapes, "--output", "decode.json").returncode != 0
    kept = read_results(tmp_path / "decode.jsonl")
    assert [(row.tokens, row.batch) for row in kept.decodes] == [(4096, 1), (4096, 4)] and kept.settings["spec"]
    assert not (tmp_path / "decode.json").exists()


def test_decode_without_dense_and_by_default_takes_every_context(call, decoded):
    answer = call("bench", "tiny", "--passes", "decode", "--against", "none", "--json")
    assert answer.returncode == 1, "some shapes have no time"
    assert decoded.dense is False and (1048576, 64) in decoded.shapes and (4096, 1) in decoded.shapes
    rows = json.loads(answer.stdout)["decodes"]
    assert len(rows) == len(decoded.shapes) and rows[-1]["problem"] == "too large"


def test_wrong_decode_is_not_timed(call, decoded):
    decoded.faults = ("o_slc 3 of 1",)
    answer = call("bench", "tiny", "--passes", "decode")
    assert answer.returncode == 1 and decoded.shapes == () and "o_slc 3 of 1" in answer.stdout
