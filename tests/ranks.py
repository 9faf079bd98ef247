"""Processes that are the ranks of a group, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import PROJECT_ROOT


def run_ranks(world: int, folder: Path, before: list[str], *after: str, timeout: float) -> list[str]:
    """What `world` processes print, each `python *before rank world *after`. All of them have to exit with 0.

    If one fails, the others are killed: they would wait for it.

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
    deadline = time.monotonic() + timeout
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            if any(rank.poll() for rank in ranks):
                break
            time.sleep(0.05)
        codes = [rank.poll() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    told = "\n".join(path.read_text()[-3000:] for path in err)
    assert codes == [0] * world, f"exit codes {codes}, None where a rank still ran after {timeout:g} s or less\n{told}"
    return [path.read_text() for path in out]
