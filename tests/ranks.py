"""Processes that are the ranks of a group, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import PROJECT_ROOT


def run_ranks(world: int, folder: Path, before: list[str], *after: str, timeout: float) -> list[str]:
    """What `world` processes print, each `python *before rank world *after`; all of them have to end well.

    Args:
        world: how many.
        folder: where their output is kept.
        before, after: arguments before the rank, such as ["-m", "module"], and behind the number of ranks.
        timeout: seconds after which they are killed.
    """
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    out, err = ([folder / f"{rank}.{kind}" for rank in range(world)] for kind in ("out", "err"))
    ranks = [
        subprocess.Popen(
            [sys.executable, *before, str(rank), str(world), *after],
            stdout=out[rank].open("w"),
            stderr=err[rank].open("w"),
            cwd=PROJECT_ROOT,
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        codes = [rank.wait(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, "\n".join(path.read_text()[-3000:] for path in err)
    return [path.read_text() for path in out]
