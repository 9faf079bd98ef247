"""tools/gpu/context_parallel.py, in small, on two ranks of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support import GPU, small_spec

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(GPU or not dist.is_gloo_available(), reason="two ranks on the CPU; needs gloo")
def test_it_measures_and_compares_ranks_with_one_process(tmp_path: Path) -> None:
    spec = tmp_path / "small.yaml"
    spec.write_text(small_spec("slc win", scores="mean", count=2, initial=0).resolved_yaml())
    environment = {**os.environ, "TRITON_INTERPRET": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/gpu/context_parallel.py", "--spec", str(spec), "--device", "cpu"]
    command += ["--tokens", "18", "--repeats", "1", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    (row,) = found["rows"]
    assert found["ok"] and found["ranks"] == 2 and row["tokens"] == 18
    assert row["errors"].keys() == {"o", "dq", "dk", "dv", "dgates", "indices"}
    assert row["errors"]["indices"] == 0 < row["errors"]["dk"] < 1e-6
    assert row["speedup"] == pytest.approx(row["seconds"]["alone"] / row["seconds"]["ranks"])
