"""What packages hold in memory at their peaks, counted without a GPU by `tools/live_memory.py`."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from nsa_gen.spec import load_spec

TOOL = Path(__file__).resolve().parents[2] / "tools" / "live_memory.py"
LENGTHS = (8192, 32768, 131072)
GIB = 2**30
PEERS = {
    "nsa_64x4": {8192: 1.53, 32768: 6.12, 131072: 24.47},
    "llama3_8b": {8192: 0.79, 32768: 3.17, 131072: 16.91},
    "mha_16": {8192: 0.42, 32768: 2.43},
}
"""GiB of forward and backward on an H100 (2026-11-28), of Scalable-Flash-NSA."""


@functools.cache
def counted(spec: str, *options: str) -> dict[int, dict[str, int]]:
    """Bytes at the peak of each pass, by tokens."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), spec, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return {int(tokens): peaks for tokens, peaks in json.loads(done.stdout).items()}


def counted_plainly(spec: str) -> dict[int, dict[str, int]]:
    """`counted` of a call without options, at every length; once a session."""
    return counted(spec, "--tokens", *map(str, LENGTHS))


@pytest.fixture(params=PEERS)
def peaks(request: pytest.FixtureRequest) -> tuple[str, Mapping[int, Mapping[str, int]]]:
    return request.param, counted_plainly(request.param)


def test_a_peak_is_what_the_passes_return_the_sums_in_float32_and_the_workspace(
    peaks: tuple[str, Mapping[int, Mapping[str, int]]],
) -> None:
    name, found = peaks
    spec = load_spec(name)
    for tokens in LENGTHS:
        q, kv = (tokens * heads * spec.head_dim.qk * 2 for heads in (spec.heads.query, spec.heads.kv))
        workspace = min(max(9 * q, 320 * 2**20), 1920 * 2**20)
        forward = 4 * q + workspace  # o of three branches and their sum, never all with the workspace
        backward = q + (1 + 2) * q + 2 * 2 * kv + workspace  # o; dq and its sum; the sums of dk and dv
        # Besides: of each row lse and delta of three branches, two statistics and gates, of each slot an index and a
        # block, and compressed keys and values with their gradients.
        rows, slots = tokens * spec.heads.query, tokens * spec.heads.kv * spec.selection.count
        small = (8 * 4 + 3 * 2) * rows + 4 * 4 * slots + 2 * (2 + 4) / 2 * kv / 16
        assert found[tokens]["forward"] <= forward + small
        assert found[tokens]["backward"] <= backward + small


def test_peaks_are_below_one_and_a_half_of_the_best_peers_and_below_it_from_32k_tokens_on(
    peaks: tuple[str, Mapping[int, Mapping[str, int]]],
) -> None:
    name, found = peaks
    for tokens, gib in PEERS[name].items():
        assert max(found[tokens].values()) < (1.5 if tokens < 32768 else 1.0) * gib * GIB, tokens


def test_what_a_caller_asks_for_is_what_the_workspace_takes() -> None:
    little, much = (
        counted("llama3_8b", "--tokens", "32768", "--workspace", str(size))[32768] for size in (2**29, 2**30)
    )
    # Chunks are of equal size, and take the same tokens in both passes, though the forward's parts are smaller.
    for name in ("forward", "backward"):
        assert 0.8 * 2**29 < much[name] - little[name] < 1.02 * 2**29


def test_branches_that_are_computed_again_are_not_held() -> None:
    again = counted("nsa_64x4", "--tokens", "8192", "--recompute", "cmp", "slc")[8192]
    plain = counted_plainly("nsa_64x4")[8192]
    q = 8192 * 64 * 128 * 2
    assert again["forward"] <= plain["forward"]
    assert again["backward"] <= plain["backward"] + q // 8
