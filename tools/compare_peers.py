"""Compare the operator with dense attention and the public packages of native sparse attention, on one GPU.

    python tools/compare_peers.py --out DIR [--budget SECONDS] [--only A,B,C,D,groups,breakeven] [--against NAMES]
    python tools/compare_peers.py --out DIR --from FILE [FILE ...]

The first form measures. The second makes tables and plots from comparison.json or records.jsonl of earlier calls, and
needs no GPU. DIR receives records.jsonl (each number as soon as it is known), comparison.json, comparison.md,
by_length.png and by_group.png. Packages that cannot be imported are listed as missing; docs/bench.md says how to
provide them. Exit status 0: our operator has a time for everything; 1: it does not; 2: wrong arguments, or no GPU.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from nsa_gen._files import write_whole  # noqa: E402
from nsa_gen.bench.drawing import MatplotlibMissing  # noqa: E402
from nsa_gen.bench.figures import plot_by_group, plot_by_length  # noqa: E402
from nsa_gen.bench.peers import DEFAULT_NAMES, choose  # noqa: E402
from nsa_gen.bench.records import Results, merge, read_results, write_json  # noqa: E402
from nsa_gen.bench.session import Session, run_session  # noqa: E402
from nsa_gen.bench.workloads import comparison_tasks, parts  # noqa: E402
from nsa_gen.cli.bench_report import report_blocks  # noqa: E402
from nsa_gen.cli.blocks import show, to_markdown  # noqa: E402
from nsa_gen.cli.common import note  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or read, then write and print the report; return the exit status."""
    options = _parse(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.source:
        try:
            results = merge([read_results(path) for path in options.source])
        except (OSError, ValueError) as error:
            note(f"compare_peers: {error}")
            return 2
    else:
        import torch

        if not torch.cuda.is_available():
            note("compare_peers: torch sees no GPU; --from FILE draws the report of an earlier run")
            return 2
        results = _measure(options)
    write_json(out / "comparison.json", results)
    blocks = report_blocks(results)
    write_whole(out / "comparison.md", to_markdown(blocks))
    show(*blocks)
    for name, draw in (("by_length.png", plot_by_length), ("by_group.png", plot_by_group)):
        try:
            draw(results, out / name)
        except (MatplotlibMissing, ValueError) as error:
            note(f"no {name}: {error}")
    return 0 if results.ours_is_timed else 1


def _measure(options: argparse.Namespace) -> Results:
    chosen = [part for name, part in parts().items() if name in options.only]
    names = [each.name for each in choose(options.against)]
    tasks = comparison_tasks(chosen, names, seconds=options.seconds)
    with tempfile.TemporaryDirectory(prefix="nsa_gen_compare_") as folder:
        journal, workers = options.out / "records.jsonl", options.workers
        session = Session(Path(folder), options.budget, options.seed, journal, workers, progress=note)
        return run_session(session, tasks, {"parts": list(options.only), "contenders": names})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = tuple(parts())
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--only", default="", help=f"parts, comma-separated: {', '.join(known)} (all)")
    parser.add_argument("--against", default=",".join(DEFAULT_NAMES), help="contenders, comma-separated (%(default)s)")
    parser.add_argument("--budget", type=float, default=1e9, metavar="SECONDS", help="start nothing new after so long")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long a sequence is timed (4)")
    parser.add_argument("--workers", type=int, default=6, help="processes that check and compile side by side (6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="source", type=Path, nargs="+", metavar="FILE", help="draw from results instead")
    options = parser.parse_args(arguments)
    named = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := [name for name in named if name not in known]:
        parser.error(f"--only: expected some of {', '.join(known)}, got {unknown[0]!r}")
    options.only = tuple(name for name in known if not named or name in named)
    options.against = [name.strip() for name in options.against.split(",") if name.strip()]
    try:
        choose(options.against)
    except ValueError as error:
        parser.error(f"--against: {error}")
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1, got {options.workers}")
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the workers too
    sys.exit(main())
