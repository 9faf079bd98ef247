"""Tune the shipped specs on the GPU at hand, each in a process of its own, and show what was gained.

    python tools/tune_shipped.py --out DIR [--specs a,b] [--shapes 8192,65536] [--effort default] [--budget 8m]
                                 [--passes decode --batch 1,32] [--dry-run] [--gpu h100]
    python tools/tune_shipped.py --out DIR --report

DIR/<spec>/tuned/<gpu>.json is what goes to generated/<spec>/tuned; DIR/<spec>.json is the whole report. While a spec is
measured, the next ones are compiled for `--gpu` on the cores that are left. A spec whose tuning was interrupted goes on
where it was (--resume is always given). --dry-run compiles only, and says how long measuring would take; --report reads
the reports of DIR and writes tuned.json and tuned.md, tuned beside default times. Exit status 0: all is well; 1: a spec
could not be tuned, or a candidate was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from nsa_gen._files import json_text, write_whole  # noqa: E402
from nsa_gen.spec import load_spec, shipped_specs  # noqa: E402

Run = Callable[[list[str]], subprocess.CompletedProcess[str]]
FREE_CORES = 4
"""Cores that compiling ahead leaves to the process that measures."""


def main(arguments: Sequence[str] | None = None, run: Run | None = None) -> int:
    """Tune what the command line asks for; return the exit status."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.report:
        return report(options.out)
    run = run or _run
    if options.dry_run:
        return _rehearse(options, run)
    compiled = {name: threading.Event() for name in options.specs}
    ahead = threading.Thread(target=_compile_ahead, args=(options, run, compiled), daemon=True)
    ahead.start()
    lines, ok = [], True
    for name in options.specs:
        compiled[name].wait()
        print(f"tuning {name}", file=sys.stderr, flush=True)
        command = [*_command(options, name), "--out", str(options.out / name / "tuned"), "--resume"]
        command += ["--budget", options.budget] if options.budget else []
        done = run(command)
        try:
            found = json.loads(done.stdout)
        except ValueError:
            ok = False
            lines.append(f"{name:<12} FAILED with exit status {done.returncode}")
            continue
        (options.out / f"{name}{_suffix(options)}.json").write_text(done.stdout, encoding="utf-8")
        ok &= bool(found["ok"]) and done.returncode == 0
        lines += table(name, found)
        print("\n".join(table(name, found)), file=sys.stderr, flush=True)
    print("\n".join(lines), flush=True)
    return 0 if ok else 1


def _command(options: argparse.Namespace, name: str) -> list[str]:
    command = [sys.executable, "-m", "nsa_gen", "tune", name, "--shapes", options.shapes, "--effort", options.effort]
    command += ["--passes", options.passes] if options.passes else []
    command += ["--batch", options.batch] if options.batch else []
    return [*command, "--json"]


def _suffix(options: argparse.Namespace) -> str:
    return ".decode" if options.passes == "decode" else ""


def _compile_ahead(options: argparse.Namespace, run: Run, compiled: dict[str, threading.Event]) -> None:
    """Stage 0 of each spec in turn: the first with every core, the others while another is measured."""
    cores = os.cpu_count() or 1
    for number, (name, event) in enumerate(compiled.items()):
        jobs = cores if number == 0 else max(1, cores - FREE_CORES)
        run(["nice", "-n", "10", *_command(options, name), "--dry-run", "--gpu", options.gpu, "--jobs", str(jobs)])
        event.set()  # whatever became of it: the tuning compiles what is missing, and says what is wrong


def _rehearse(options: argparse.Namespace, run: Run) -> int:
    """Compile every spec's candidates and print how long tuning would take."""
    ok, total = True, 0.0
    for name in options.specs:
        done = run([*_command(options, name), "--dry-run", "--gpu", options.gpu])
        try:
            expected = json.loads(done.stdout)["expected"]
        except (ValueError, KeyError):
            ok = False
            print(f"{name:<12} FAILED with exit status {done.returncode}", flush=True)
            continue
        total += expected["gpu_seconds"]
        print(
            f"{name:<12} compiling {expected['compile_seconds']:.0f} core-seconds, measuring about "
            f"{expected['gpu_seconds']:.0f} s",
            flush=True,
        )
    print(f"{'all':<12} about {total:.0f} s on the GPU", flush=True)
    return 0 if ok else 1


def table(name: str, report: dict[str, Any]) -> list[str]:
    """A spec's report in a line a bucket, and one for what went wrong."""
    lines = []
    for result in report["results"]:
        bucket = result["bucket"]["tokens"]
        batch = f" x{result['bucket']['batch']}" if result["bucket"]["batch"] > 1 else ""
        cells = [
            f"{kind[:4]} {passed[:3]} {ms['default']:.3g} -> {ms['tuned']:.3g}"
            for kind, passes in result["times"].items()
            for passed, ms in passes.items()
        ]
        gain = f"{result['gain']:.3f}x +- {result['noise']:.3f}"
        end = result["problem"] or ("cut short" if result["cut_short"] else f"{len(result['configs'])} changed")
        lines.append(f"{name:<12} {bucket:>6}{batch} {gain}, ms: {', '.join(cells)}; {end}")
    failed = report["quarantined"]
    wrong = [f"{candidate}: {reason}" for candidate, reason in failed.items() if reason.startswith("wrong")]
    lines.append(f"{'':<12} {report['measured']} times, {len(failed)} left out, {report['seconds']:.0f} s")
    return lines + [f"{'':<12} WRONG {each}"[:200] for each in wrong[:5]]


def report(folder: Path) -> int:
    """Write tuned.json and tuned.md from the reports in a folder: a row a spec, bucket, kind of input and pass."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = [each for each in reports if "results" in each and each.get("gpu")]
    if not found:
        print(f"{folder}: expected the reports of a tuning, <spec>.json, found none", file=sys.stderr)
        return 1
    rows = [row for each in found for row in rows_of(each)]
    document = {
        "gpu": found[0]["gpu"],
        "specs": {each["name"]: {"seconds": each["seconds"], "measured": each["measured"]} for each in found},
        "quarantined": {each["name"]: each["quarantined"] for each in found if each["quarantined"]},
        "rows": rows,
    }
    write_whole(folder / "tuned.json", json_text(document) + "\n")
    text = "\n".join(markdown(document["gpu"], rows))
    write_whole(folder / "tuned.md", text + "\n")
    print(text)
    return 0


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Times of a report, default beside tuned, in milliseconds."""
    return [
        {
            "spec": report["name"],
            **result["bucket"],
            "inputs": kind,
            "pass": passed,
            "default_ms": ms["default"],
            "tuned_ms": ms["tuned"],
            "gain": round(ms["default"] / ms["tuned"], 4),
            "changed": sorted(result["configs"]),
        }
        for result in report["results"]
        for kind, passes in result["times"].items()
        for passed, ms in passes.items()
    ]


def markdown(gpu: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as a table; the geometric mean over kinds of input would hide which of them gains."""
    versions = f"driver {gpu['driver']}, torch {gpu['torch']}, triton {gpu['triton']}"
    lines = [
        f"{gpu['name']}, {versions}. Medians in ms, the default and the tuned tables in turn in one process.",
        "",
        "| spec | tokens | batch | pass | inputs | default | tuned | gain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (row["spec"], row["tokens"], row["batch"], row["pass"], row["inputs"])
        times = f"{row['default_ms']:.4g} | {row['tuned_ms']:.4g} | {row['gain']:.2f}x"
        lines.append(f"| {' | '.join(map(str, cells))} | {times} |")
    return lines


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=PROJECT)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = tuple(shipped_specs())
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--specs", default="", help="shipped specs, comma-separated; all that have the passes if left out"
    )
    parser.add_argument("--shapes", default="8192,65536", help="key tokens of the buckets (8192,65536)")
    parser.add_argument("--batch", default="", help="sequences of a call, comma-separated (1)")
    parser.add_argument("--passes", default="", help="passes, comma-separated (forward and backward)")
    parser.add_argument("--effort", default="default", choices=("quick", "default", "thorough"))
    parser.add_argument("--budget", default="", metavar="TIME", help="of each spec, such as 8m; no limit if left out")
    parser.add_argument("--gpu", default="h100", help="what is compiled ahead for (h100)")
    parser.add_argument("--dry-run", action="store_true", help="compile, and say how long measuring would take")
    parser.add_argument("--report", action="store_true", help="write tuned.json and tuned.md from the reports of DIR")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    named = [name.strip() for name in options.specs.split(",") if name.strip()]
    for name in named:
        if name not in known:
            parser.error(f"--specs: expected some of {', '.join(known)}, got {name!r}")
    passes = {name.strip() for name in options.passes.split(",") if name.strip()}
    options.specs = named or [name for name in known if passes <= set(load_spec(name).passes)]
    return options


if __name__ == "__main__":
    sys.exit(main())
