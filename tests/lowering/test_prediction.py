"""Predicted times of kernels: near what was measured, and sensible where nothing was."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from nsa_gen.bench.records import KernelRow, kernels_of, read_results
from nsa_gen.lowering import Plan, lower
from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.calibration import FACTORS
from nsa_gen.lowering.prediction import alternatives, calibrate, predict, predict_kernel_seconds
from nsa_gen.spec import load_spec, shipped_specs

MEASURED = Path(__file__).parents[2] / "docs" / "results" / "h100_2026-11-23_one_loop" / "bench.json"
ROWS = read_results(MEASURED).kernels


@functools.cache
def program(name: str) -> Plan:
    return lower(load_spec(name))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.workload}-{row.tokens}-{row.kernel}")
def test_a_prediction_is_within_a_factor_of_two_of_the_measurement(row: KernelRow):
    seconds = predict_kernel_seconds(program(row.workload), row.kernel, row.tokens)
    if seconds is None:
        pytest.skip(f"{row.workload} has no kernel {row.kernel} any more; measure anew, then tools/calibrate.py")
    assert 0.5 < 1000 * seconds / row.ms < 2


def test_most_kernels_that_were_measured_still_exist():
    known = [row for row in ROWS if predict_kernel_seconds(program(row.workload), row.kernel, row.tokens) is not None]
    assert len(known) > 0.6 * len(ROWS)


@pytest.mark.parametrize(("name", "tokens"), [("llama3_8b", 65536), ("nsa_64x4", 65536), ("mha_16", 32768)])
def test_the_kernels_of_a_call_together_are_within_a_third_of_the_measurement(name, tokens):
    rows = [row for row in kernels_of(read_results(MEASURED), load_spec(name)) if row.tokens == tokens]
    found = predict(program(name), tokens=tokens)
    common = [row for row in rows if row.kernel in found]
    assert len(common) >= 8
    ratio = sum(1000 * found[row.kernel].seconds for row in common) / sum(row.ms for row in common)
    assert 3 / 4 < ratio < 4 / 3


@pytest.mark.parametrize("name", shipped_specs())
def test_no_prediction_is_below_the_floor_and_longer_calls_take_longer(name):
    from nsa_gen.lowering import explain

    short, long = (predict(program(name), tokens=tokens) for tokens in (8192, 65536))
    floors = {one.kernel: one.seconds_floor for one in explain(program(name), tokens=65536)}
    assert floors.keys() == long.keys()
    assert {name.partition("_")[0] for name in floors.keys() ^ short.keys()} <= {"decode"}, "one launch or three"
    for kernel, prediction in long.items():
        assert prediction.seconds > floors[kernel]
        assert kernel not in short or prediction.seconds >= short[kernel].seconds
        assert 1 <= prediction.legal <= prediction.candidates
        assert prediction.bound_by in ("matrix units", "L2", "memory")
        assert prediction.calibrated == (kernel in FACTORS)


def test_a_gpu_with_more_bandwidth_is_predicted_to_be_quicker_where_memory_binds():
    h100, h200 = (predict(program("llama3_8b"), tokens=65536, gpu_key=gpu) for gpu in ("h100", "h200"))
    bound = [name for name, one in h100.items() if one.bound_by == "memory"]
    assert bound and all(h200[name].seconds <= h100[name].seconds for name in bound)
    assert h200["merge_outputs"].seconds < h100["merge_outputs"].seconds


def test_the_schedule_that_runs_is_the_one_of_less_modelled_time():
    choices = {one.choice: one for one in alternatives(program("llama3_8b"))}
    forward = choices["KEY_MAJOR_FORWARD"]
    assert "selected_forward_key_major" in forward.chosen and forward.other == ("selected_forward",)
    for name in ("llama3_8b", "nsa_64x4", "mha_16"):
        for one in alternatives(program(name)):
            assert one.chosen_seconds < 1.2 * one.other_seconds


def test_who_does_the_local_blocks_is_a_choice_that_near_a_tie_takes_less_memory():
    for name in ("llama3_8b", "nsa_64x4", "mha_16"):
        one = program(name)
        (choice,) = (each for each in alternatives(one) if each.choice == "LOCAL_IN_WINDOW")
        assert choice.value == 0 and choice.chosen == choice.other and "window_forward" in choice.chosen
        assert 0.85 * choice.chosen_seconds < choice.other_seconds < choice.chosen_seconds


def test_local_blocks_that_the_window_does_are_no_work_of_the_selected_branch():
    one = program("llama3_8b")
    spec, kernel = one.spec, one.kernel("selected_forward_key_major")
    sizes = {**one.sizes, s.B: 1, s.T: 4096}
    flops = [kernel.useful_flops.subs({**sizes, s.LOCAL_IN_WINDOW: local}) for local in (0, 1)]
    assert flops[1] / flops[0] == pytest.approx(1 - spec.selection.local / spec.selection.count)


def test_calibrating_finds_the_middle_of_the_measured_ratios():
    one = program("llama3_8b")
    base = {tokens: predict_kernel_seconds(one, "merge_dq", tokens, factors={}) for tokens in (8192, 65536)}
    rows = [(one, "merge_dq", 8192, 2 * base[8192]), (one, "merge_dq", 65536, 8 * base[65536]), (one, "gone", 1, 1.0)]
    factors = calibrate(rows)
    assert factors == {"merge_dq": pytest.approx(4, rel=0.02)}


def test_an_unknown_gpu_is_named():
    with pytest.raises(ValueError, match="h1000"):
        predict(program("tiny"), tokens=1024, gpu_key="h1000")
