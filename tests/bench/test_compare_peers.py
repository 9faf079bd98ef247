"""The maintainers' comparison: its report from results that exist."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa_gen.bench.measure import LED_BELOW_MS
from nsa_gen.bench.records import merge, read_results, write_json
from nsa_gen.rendering.identity import MEASUREMENT
from tests.bench.fakes import sample_results
from tools import compare_peers


def test_the_report_of_an_earlier_run_needs_no_gpu(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_json(tmp_path / "first.json", sample_results())
    assert compare_peers.main(["--out", str(tmp_path / "out"), "--from", str(tmp_path / "first.json")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"comparison.json", "comparison.md", "by_length.png", "by_group.png"}
    assert read_results(tmp_path / "out" / "comparison.json") == merge([sample_results()])
    printed, text = capsys.readouterr().out, (tmp_path / "out" / "comparison.md").read_text()
    for shown in (
        "A: 64 query and 4 KV heads (groups of 16), head dim 128, bfloat16",
        "independent inputs; neighbouring queries share 21% at 65,536 of their blocks",
        "Group sizes at 32,768 tokens",
        "Break-even against the best dense",
        "fa4 backward: NotImplementedError: no backward here (A 8,192, A 65,536)",
        "fsa: flash-sparse is not installed: no module fsa (A 8,192, A 65,536)",
        "fla: its output differs from nsa_gen's by 31.0% in norm",
        "fla: another setting",
    ):
        assert shown in text and shown in printed
    assert "| 65,536 | nsa_gen | 38.25 | 114.8 | 153.0 | 1.67x | 1.95x | 1.93x | 2.0% | 1.00 |" in text
    assert "| independent | 8,192 | forward | 2.00 | 500 | 0.50 | 1.00 | 50% |" in text
    assert "| window | 4.00 | 500 | 50% | 8.00 | 500 | 50% |" in text
    assert "| 16 | 64/4 | 8.53x |" in text
    assert "| 16 | 64/4 | nsa_gen | below 2,048 tokens | 4,096 tokens | 3,072 tokens |" in text


def test_the_report_says_how_timed_runs_began(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_json(tmp_path / "earlier.json", sample_results())
    write_json(tmp_path / "later.json", replace(sample_results(), settings={"measurement": MEASUREMENT}))
    idle = "Timed runs begin on an idle GPU"
    led = f"A timed run of less than {LED_BELOW_MS:.0f} ms directly follows an untimed one"
    for names, shown in (
        (["earlier"], (True, False)),
        (["later"], (False, True)),
        (["earlier", "later"], (True, True)),
    ):
        files = [str(tmp_path / f"{name}.json") for name in names]
        assert compare_peers.main(["--out", str(tmp_path / "out"), "--from", *files]) == 0
        text = (tmp_path / "out" / "comparison.md").read_text()
        assert (idle in text, led in text) == shown
        assert ("taken in different ways" in text) == all(shown)


def test_what_is_no_result_is_a_wrong_call(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert compare_peers.main(["--out", str(tmp_path), "--from", str(tmp_path / "x.json")]) == 2
    assert "expected the JSON of a benchmark" in capsys.readouterr().err
    assert compare_peers.main(["--out", str(tmp_path), "--from", str(tmp_path / "none.json")]) == 2


def test_without_a_gpu_it_measures_nothing_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compare_peers.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--only", "A,E"], "'E'"), (["--against", "fa9"], "fa9"), (["--workers", "0"], "workers")]
)
def test_a_wrong_call_ends_with_2_and_names_what_is_wrong(tmp_path, capsys, arguments, named):
    with pytest.raises(SystemExit) as caught:
        compare_peers.main(["--out", str(tmp_path), *arguments])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
