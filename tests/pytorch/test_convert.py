"""examples/convert.py, in small, on two ranks of the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support import GPU, small_spec

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(GPU or not dist.is_gloo_available(), reason="two ranks on the CPU; needs gloo")
def test_a_dense_model_is_converted_close_to_what_it_was_and_trained_on_behind_an_interruption(tmp_path: Path) -> None:
    spec = tmp_path / "small.yaml"
    spec.write_text(small_spec("cmp slc win", phi="weighted", count=2, initial=0, window=16).resolved_yaml())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)

    def run(steps: int) -> str:
        command = [sys.executable, "examples/convert.py", "--spec", str(spec), "--out", str(tmp_path / "out")]
        command += ["--tokens", "36", "--ranks", "2", "--distill", "1", "--steps", str(steps)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    first = run(1)
    fitted, half = map(float, re.findall(r"layer 0: attention ([\d.]+)% off, ([\d.]+)% with gates", first)[0])
    assert fitted < 25 < half  # the branches see all keys but a few
    before, after, off = map(
        float, re.findall(r"loss ([\d.]+) dense, ([\d.]+) converted; logits ([\d.]+)% off", first)[0]
    )
    assert abs(after - before) < 0.02 * before and off < 10
    (loss,) = re.findall(r"losses: ([\d.]+)\n", first)
    then = run(2)
    assert "goes on behind step 1\n" in then and "first step" not in then
    assert re.findall(r"losses: ([\d.]+) ([\d.]+)\n", then)[0][0] == loss
    assert (tmp_path / "out" / "checkpoint.pt").is_file()
