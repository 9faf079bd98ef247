"""`nsa-gen compile`."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_a_spec_compiles_for_an_nvidia_and_an_amd_gpu(nsa_gen, small):
    answer = nsa_gen("compile", small, "--target", "sm_90,gfx942", "--json", timeout=600)
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    (report,) = result["specs"]
    assert result["ok"] is report["ok"] is True
    assert {row["target"] for row in report["rows"]} == {"sm_90", "gfx942"}
    for row in report["rows"]:
        assert row["resources"]["registers"] > 0
        assert row["resources"]["shared_memory"] <= row["shared_memory_limit"]
    assert "compiling small" in answer.stderr


def test_the_matrix_shows_the_worst_variant_and_why_something_fails():
    from nsa_gen.cli.tables import compile_matrix, failures

    def row(target, registers, shared, reason="", spills=False):
        resources = {"registers": registers, "shared_memory": shared}
        return {
            "kernel": "window_forward",
            "target": target,
            "ok": not reason,
            "reason": reason,
            "spills_heavily": spills,
            "resources": resources,
        }

    rows = [
        row("sm_90", 168, 65536),
        row("sm_90", 200, 32768, spills=True),
        row("gfx942", 128, 98304, reason="shared memory: 98,304 bytes a block"),
    ]
    matrix = compile_matrix({"rows": rows})
    assert matrix.columns == ("kernel", ">sm_90", ">gfx942")
    assert matrix.rows == [("window_forward", "200 / 64 KiB spills", "fails")]
    assert matrix.footer == ("fits", "2 of 2", "0 of 1")
    assert failures({"rows": rows}) == ["window_forward on gfx942: shared memory: 98,304 bytes a block"]


def test_a_folder_without_a_triton_is_refused(call, tmp_path):
    answer = call("compile", "tiny", "--triton", str(tmp_path))
    assert answer.returncode == 2 and "triton package" in answer.stderr


def test_an_unknown_call_is_refused_with_those_there_are(call):
    answer = call("compile", "tiny", "--calls", "batched,ragged")
    assert answer.returncode == 2 and "batched, packed" in answer.stderr and "ragged" in answer.stderr
