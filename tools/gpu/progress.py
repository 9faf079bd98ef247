"""What a job tells while it runs: signs of life, its result so far, and how much time it has left."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nsa_gen._files import write_whole
from tools.gpu.pool import DEADLINE_VARIABLE, RESULT_VARIABLE


def say(line: str) -> None:
    """Print a line at once: it is the job's sign of life."""
    print(line, flush=True)


def save(result: Mapping[str, Any]) -> None:
    """Write what the job has found so far, whole or not at all, so that being killed loses nothing."""
    path = os.environ.get(RESULT_VARIABLE)
    if path is None:
        return
    write_whole(Path(path), json.dumps(finite(result)))


def seconds_left() -> float:
    """Seconds until the suite's budget is spent; infinite where nobody set one."""
    deadline = os.environ.get(DEADLINE_VARIABLE)
    return math.inf if deadline is None else float(deadline) - time.time()


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def release(device: str) -> None:
    """Give cached memory back to the GPU, which other processes share."""
    if device == "cuda":
        torch.cuda.empty_cache()
