"""What docs/distributed.md and examples/context_parallel.py show is what happens."""

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
PAGE = ROOT / "docs" / "distributed.md"
needs_gloo = pytest.mark.skipif(GPU or not dist.is_gloo_available(), reason="needs gloo; ranks on the CPU")


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_gloo
def test_the_example_of_the_page_runs_and_prints_what_it_says() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert run("-c", block).strip() == re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)[0]


def test_the_table_of_the_page_is_what_the_script_prints() -> None:
    assert run("tools/predict_ranks.py").strip() in PAGE.read_text()


@needs_gloo
def test_two_ranks_train_the_example_s_model_as_one_does(tmp_path: Path) -> None:
    spec = tmp_path / "small.yaml"  # without a selection, which takes the interpreter long
    spec.write_text(small_spec("cmp win").resolved_yaml())
    losses = {}
    for ranks in (1, 2):
        more = ("--spec", str(spec), "--tokens", "12", "--width", "32", "--layers", "1", "--steps", "2")
        said = run("examples/context_parallel.py", "--ranks", str(ranks), *more)
        losses[ranks] = [float(x) for x in re.fullmatch(rf"{ranks} ranks, losses: (\S+) (\S+)\n", said).groups()]  # type: ignore[union-attr]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1][1] != losses[1][0]
