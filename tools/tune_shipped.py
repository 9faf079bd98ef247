"""Tune the shipped specs on the GPU at hand, each in a process of its own, and show what was gained.

    python tools/tune_shipped.py --out DIR [--specs a,b] [--shapes 8192,65536] [--effort default] [--budget 8m]

DIR/<spec>/tuned/<gpu>.json is what goes to generated/<spec>/tuned; DIR/<spec>.json is the whole report. A spec whose
tuning was interrupted goes on where it was (--resume is always given). Exit status 0: all is well; 1: a spec could not
be tuned, or a candidate was wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from nsa_gen.spec import shipped_specs  # noqa: E402

Run = Callable[[list[str]], subprocess.CompletedProcess[str]]


def main(arguments: Sequence[str] | None = None, run: Run | None = None) -> int:
    """Tune what the command line asks for; return the exit status."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    lines, ok = [], True
    for name in options.specs:
        print(f"tuning {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "nsa_gen", "tune", name, "--shapes", options.shapes]
        command += ["--effort", options.effort, "--out", str(options.out / name / "tuned"), "--resume", "--json"]
        command += ["--budget", options.budget] if options.budget else []
        done = (run or _run)(command)
        try:
            report = json.loads(done.stdout)
        except ValueError:
            ok = False
            lines.append(f"{name:<12} FAILED with exit status {done.returncode}")
            continue
        (options.out / f"{name}.json").write_text(done.stdout, encoding="utf-8")
        ok &= bool(report["ok"]) and done.returncode == 0
        lines += table(name, report)
    print("\n".join(lines), flush=True)
    return 0 if ok else 1


def table(name: str, report: dict[str, Any]) -> list[str]:
    """A spec's report in a line a bucket, and one for what went wrong."""
    lines = []
    for result in report["results"]:
        bucket = result["bucket"]["tokens"]
        cells = [
            f"{kind[:4]} {passed[:3]} {ms['default']:.2f} -> {ms['tuned']:.2f}"
            for kind, passes in result["times"].items()
            for passed, ms in passes.items()
        ]
        gain = f"{result['gain']:.3f}x +- {result['noise']:.3f}"
        end = result["problem"] or ("cut short" if result["cut_short"] else f"{len(result['configs'])} changed")
        lines.append(f"{name:<12} {bucket:>6} {gain}, ms: {', '.join(cells)}; {end}")
    failed = report["quarantined"]
    wrong = [f"{candidate}: {reason}" for candidate, reason in failed.items() if reason.startswith("wrong")]
    lines.append(f"{'':<12} {report['measured']} times, {len(failed)} left out, {report['seconds']:.0f} s")
    return lines + [f"{'':<12} WRONG {each}"[:200] for each in wrong[:5]]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=PROJECT)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = tuple(shipped_specs())
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--specs", default="", help="shipped specs, comma-separated; all if left out")
    parser.add_argument("--shapes", default="8192,65536", help="key tokens of the buckets (8192,65536)")
    parser.add_argument("--effort", default="default", choices=("quick", "default", "thorough"))
    parser.add_argument("--budget", default="", metavar="TIME", help="of each spec, such as 8m; no limit if left out")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    options.specs = [name.strip() for name in options.specs.split(",") if name.strip()] or list(known)
    for name in options.specs:
        if name not in known:
            parser.error(f"--specs: expected some of {', '.join(known)}, got {name!r}")
    return options


if __name__ == "__main__":
    sys.exit(main())
