"""`nsa-gen explain`."""

from __future__ import annotations

import json

import pytest


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
