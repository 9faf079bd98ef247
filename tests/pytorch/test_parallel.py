"""The layer in DistributedDataParallel and FSDP2, each of two ranks a process on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed

from tests.ranks import run_ranks
from tests.support import GPU, operator_of

WORKER = Path(__file__).with_name("parallel_worker.py")
WORLD = 2


@pytest.mark.skipif(GPU, reason="two ranks on the CPU; on a GPU they would share it")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_a_step_of_two_ranks_is_the_step_on_both_batches_wrapped_either_way(tmp_path: Path) -> None:
    folder = operator_of("cmp win", phi="weighted").folder
    more = str(tmp_path / "meeting"), str(folder)
    for out in run_ranks(WORLD, tmp_path, [str(WORKER)], *more, timeout=120):
        for kind, found in json.loads(out.strip().splitlines()[-1]).items():
            assert found["error"] < 1e-5 < 1e-2 < found["moved"], kind
            assert found["sharded"] == (found["parameters"] if kind == "fsdp" else 0), kind
