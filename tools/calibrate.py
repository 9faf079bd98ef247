"""The factors that bring the cost model's times to the clock, from the kernels that benchmarks have profiled.

    python tools/calibrate.py RESULTS.json... [--write]

RESULTS are what `nsa-gen bench SPEC --output` or tools/compare_peers.py wrote, of one GPU; workloads are taken for the
shipped specs of their name, and others are passed over. Prints a row a kernel, and with --write replaces
nsa_gen/lowering/calibration.py and docs/predictions.md. Exit status 0: every prediction is within a factor of two of
its measurement; 1: not; 2: a wrong call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from nsa_gen._files import write_whole  # noqa: E402
from nsa_gen.bench.records import KernelRow, merge, read_results  # noqa: E402
from nsa_gen.cli.blocks import (  # noqa: E402
    Table,
    Text,
    show,
    to_markdown,
)
from nsa_gen.hardware import gpu_for_device  # noqa: E402
from nsa_gen.lowering import lower  # noqa: E402
from nsa_gen.lowering.prediction import calibrate, predict_kernel_seconds  # noqa: E402
from nsa_gen.spec import load_spec, shipped_specs  # noqa: E402

TARGET = PROJECT / "nsa_gen" / "lowering" / "calibration.py"
PAGE = PROJECT / "docs" / "predictions.md"
HEAD = '''"""Measured over modelled time of each kernel, on {gpu}.

Written by `{command}`.
"""

FACTORS: dict[str, float] = {{
{lines}}}
'''
PAGE_HEAD = """# Predictions beside measurements

<!-- Written by `{command}`; do not edit. -->

The table compares what `nsa-gen explain` predicts with what torch's profiler measured on one {gpu} (torch {torch},
triton {triton}, commit {commit}). A time is the GPU time of all launches of a kernel in one forward or backward,
for one sequence of independent inputs. The predictions are the cost model's times, scaled by one factor per kernel that
these same measurements determined (`nsa_gen/lowering/calibration.py`). The table therefore shows how well one factor
fits all shapes and lengths, not how well unseen kernels are predicted. The largest error is {worst:.2f}x.

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, and write if asked to, the factors of the results that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument("--write", action="store_true", help=f"replace {TARGET.relative_to(PROJECT)}")
    options = parser.parse_args(arguments)
    try:
        found = merge([read_results(path) for path in options.results])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    device = gpu_for_device(str(found.machine.get("gpu")))
    if device is None:
        parser.error(f"the results are of {found.machine.get('gpu')}, which the hardware table does not have")
    programs = {name: lower(load_spec(name)) for name in shipped_specs()}
    rows = [row for row in found.kernels if row.workload in programs and row.inputs == "independent"]
    measured = [(programs[row.workload], row.kernel, row.tokens, row.ms / 1000) for row in rows]
    factors = calibrate(measured, device.key)
    if not factors:
        parser.error("the results have no profiled kernels of a shipped spec")
    predicted = {
        row: 1000 * seconds
        for row, (plan, *call, _) in zip(rows, measured, strict=True)
        if (seconds := predict_kernel_seconds(plan, *call, device.key, factors)) is not None
    }
    worst = max(max(ms / row.ms, row.ms / ms) for row, ms in predicted.items())
    table = _table(predicted)
    show(table, Text(f"The worst is {worst:.2f}x off."))
    if options.write:
        lines = "".join(f'    "{name}": {factor},\n' for name, factor in factors.items())
        sources = " ".join(path.as_posix() for path in options.results)
        said = {"gpu": found.machine["gpu"], "command": f"python tools/calibrate.py {sources} --write"}
        write_whole(TARGET, HEAD.format(**said, lines=lines))
        versions = {name: found.machine.get(name) or "unknown" for name in ("torch", "triton", "commit")}
        versions["commit"] = versions["commit"][:12]
        write_whole(PAGE, PAGE_HEAD.format(**said, **versions, worst=worst) + to_markdown([table]))
    return 0 if worst <= 2 else 1


def _table(predicted: Mapping[KernelRow, float]) -> Table:
    """A row a kernel whose time in milliseconds is predicted."""
    ordered = sorted(predicted, key=lambda row: (row.workload, row.tokens, row.direction, -row.ms))
    cells = []
    for row in ordered:
        times = (f"{row.ms:.3f}", f"{predicted[row]:.3f}", f"{predicted[row] / row.ms:.2f}x")
        cells.append((row.workload, f"{row.tokens:,}", row.direction, row.kernel, *times))
    return Table(("spec", ">tokens", "pass", "kernel", ">measured ms", ">predicted ms", ">ratio"), cells)


if __name__ == "__main__":
    sys.exit(main())
