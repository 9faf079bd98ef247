"""`nsa-gen explain`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa_gen.bench.records import KernelRow, Results, write_json

MEASURED = Path(__file__).parents[2] / "docs" / "results" / "h100_2026-11-23_one_loop" / "bench.json"


def explained(call, *arguments):
    answer = call("explain", *arguments, "--json")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def test_every_branch_has_kernels_with_costs_and_a_reason_for_the_floor(call):
    result = explained(call, "llama3_8b")
    assert (result["tokens"], result["gpu"]) == (65536, "h100")
    assert {"cmp", "slc", "win"} <= {kernel["branch"] for kernel in result["kernels"]}
    for kernel in result["kernels"]:
        assert kernel["flops"] >= 0
        assert kernel["bytes"] > 0
        assert kernel["seconds_floor"] > 0
        assert kernel["limited_by"]


def test_window_attention_costs_what_its_definition_says(call):
    """4 FLOPs a query head, visible key and head dim (two products), each query seeing min(t + 1, w) keys."""
    tokens, heads, dim, window = 65536, 32, 128, 512
    keys = window * (window + 1) // 2 + (tokens - window) * window
    kernels = explained(call, "llama3_8b", "--tokens", str(tokens))["kernels"]
    forward = next(kernel for kernel in kernels if kernel["branch"] == "win")
    assert forward["flops"] == pytest.approx(4 * heads * dim * keys, rel=0.02)


def test_a_device_with_more_bandwidth_lowers_the_floor_of_what_memory_limits(call):
    h100, h200 = (explained(call, "llama3_8b", "--gpu", gpu)["kernels"] for gpu in ("h100", "h200"))
    pairs = [(slow, quick) for slow, quick in zip(h100, h200, strict=True) if slow["limited_by"] == "memory"]
    assert pairs
    for slow, quick in pairs:
        assert quick["seconds_floor"] < slow["seconds_floor"]


def test_the_table_names_every_kernel_and_sums_up(call):
    kernels = [kernel["kernel"] for kernel in explained(call, "tiny")["kernels"]]
    table = call("explain", "tiny").stdout
    for kernel in kernels:
        assert kernel in table
    assert "\n  sum" in table


def test_formulas_name_the_sizes_they_depend_on(call):
    answer = call("explain", "tiny", "--formulas")
    assert answer.returncode == 0
    assert "FLOPs = " in answer.stdout
    assert "bytes = " in answer.stdout


def test_every_kernel_has_a_prediction_above_its_floor_and_a_reason(call):
    for kernel in explained(call, "llama3_8b", "--tokens", "8192")["kernels"]:
        assert kernel["seconds_predicted"] > kernel["seconds_floor"]
        assert kernel["bound_by"] in ("matrix units", "L2", "memory")
        assert kernel["legal_configs"] <= kernel["configs"]


def test_the_schedules_not_taken_are_named_with_their_times(call):
    text = call("explain", "llama3_8b").stdout
    assert "KEY_MAJOR_FORWARD: selected_forward_key_major" in text and "rather than selected_forward (" in text


def test_measured_times_stand_beside_the_predictions_with_the_error_of_each(call):
    result = explained(call, "llama3_8b", "--measured", str(MEASURED))
    assert result["tokens"] == 65536  # the longest that was profiled
    timed = [kernel for kernel in result["kernels"] if "measured_seconds" in kernel]
    assert len(timed) > 10
    for kernel in timed:
        assert kernel["error"] == pytest.approx(kernel["seconds_predicted"] / kernel["measured_seconds"])
    text = call("explain", "llama3_8b", "--measured", str(MEASURED)).stdout
    assert "measured" in text and "the prediction furthest off: " in text


def test_what_was_measured_beside_the_operator_s_kernels_is_named_apart(call, tmp_path):
    name = "void at::native::copy<8>(int)"
    row = KernelRow("tiny", "independent", 512, name, "other", "forward", 0.5, 1, 0, 0, None, "")
    mine = KernelRow("tiny", "independent", 512, "window_forward", "win", "forward", 0.1, 1, 1, 1, None, "")
    write_json(tmp_path / "found.json", Results(kernels=(mine, row)))
    text = call("explain", "tiny", "--measured", "found.json").stdout
    assert "measured beside these: void at::native::copy, 500 µs together" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["tiny"], "no kernels of this spec"), (["llama3_8b", "--tokens", "4096"], "profiled are 65536 tokens")],
)
def test_results_without_the_kernels_asked_for_end_with_1(call, arguments, said):
    answer = call("explain", *arguments, "--measured", str(MEASURED))
    assert answer.returncode == 1 and said in answer.stderr


def test_a_file_of_no_results_is_named(call, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    answer = call("explain", "tiny", "--measured", "other.json")
    assert answer.returncode == 1 and "other.json: expected the JSON of a benchmark" in answer.stderr


def test_a_picture_has_time_and_bytes_by_step_and_the_roofline(call, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "explain.svg"
    answer = call("explain", "llama3_8b", "--tokens", "8192", "--plot", str(path), "--json")
    assert answer.returncode == 0, answer.stderr
    assert str(path) in answer.stderr
    assert path.read_text().startswith("<?xml")
    from nsa_gen import load_spec, lower
    from nsa_gen.bench.explained import by_step

    rows = [row for row in json.loads(answer.stdout)["kernels"] if row["direction"] != "decode"]
    steps = by_step(lower(load_spec("llama3_8b")), rows)
    assert list(steps) == ["compress", "compressed", "importance", "select blocks", "window", "selected", "combine"]
    counted = [row["kernel"] for step in steps.values() for each in step.values() for row in each]
    assert sorted(counted) == sorted(row["kernel"] for row in rows)
    assert {row["kernel"] for row in steps["window"]["backward"]} == {"window_backward_dq", "window_backward_dkdv"}


def test_a_picture_of_an_unknown_kind_or_without_matplotlib_is_refused(call, tmp_path, monkeypatch):
    answer = call("explain", "tiny", "--plot", str(tmp_path / "explain.bmp"))
    assert answer.returncode == 1 and ".png, .svg, .pdf" in answer.stderr
    import sys

    from nsa_gen.bench import drawing

    drawing.pyplot.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = call("explain", "tiny", "--plot", str(tmp_path / "explain.svg"))
    drawing.pyplot.cache_clear()
    assert answer.returncode == 1 and "nsa-gen[bench]" in answer.stderr
    assert list(tmp_path.glob("explain*")) == []


def test_a_batch_is_predicted_and_not_set_beside_measurements_of_one_sequence(call, tmp_path):
    one, many = (
        {kernel["kernel"]: kernel for kernel in explained(call, "tiny", "--batch", batch)["kernels"]}
        for batch in ("1", "32")
    )
    assert many["decode_compressed"]["bytes"] == 32 * one["decode_compressed"]["bytes"]
    assert many["decode_compressed"]["seconds_predicted"] > one["decode_compressed"]["seconds_predicted"]
    assert "32 sequences of 65,536 tokens" in call("explain", "tiny", "--batch", "32").stdout
    (tmp_path / "results.json").write_text("{}")
    answer = call("explain", "tiny", "--measured", "results.json", "--batch", "4")
    assert answer.returncode == 2 and "--batch" in answer.stderr
