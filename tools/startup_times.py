"""Time the commands that people wait for at every change of a spec, and compare with budgets.

    python tools/startup_times.py

Run it on an idle machine. Prints the best of five runs of each. Tests check what keeps the commands fast (which modules
are imported), not the time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
RUNS = 5
GENERATE = "import sys; from nsa_gen import generate; generate(sys.argv[1], sys.argv[2])"
BUDGETS: dict[str, tuple[tuple[str, ...], float]] = {
    "nsa-gen --help": (("-m", "nsa_gen", "--help"), 0.3),
    "nsa-gen check tiny": (("-m", "nsa_gen", "check", "tiny"), 0.7),
    "generate llama3_8b": (("-c", GENERATE, "llama3_8b"), 2.0),
    "generate nsa_paper": (("-c", GENERATE, "nsa_paper"), 2.0),
}
"""What runs, and the wall-clock seconds it may take, including the start of Python."""


def best_of(arguments: tuple[str, ...]) -> float:
    """Seconds of the fastest of `RUNS` runs. Runs that generate write to a fresh folder."""
    times = []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *arguments, *([folder] if "-c" in arguments else [])]
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=PROJECT)
            times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Print one line for each command."""
    for name, (arguments, budget) in BUDGETS.items():
        print(f"{name:<24} {best_of(arguments):6.2f} s   budget {budget:.1f} s", flush=True)


if __name__ == "__main__":
    main()
