"""Every check that needs a GPU, and a first table of times, in one call.

    python tools/gpu_suite.py --out DIR [--only correctness,examples,...] [--specs a,b] [--budget SECONDS]

Each check is a process of its own: a crash or a hang costs that check alone. DIR receives a JSON file a part and
summary.json, written anew as each check ends, and in DIR/jobs the log and the result so far of each that runs: being
killed loses nothing that was found. The table comes last. Exit status 0: all is well; 1: something failed or was not
run; 2: a wrong call. On a machine without a GPU, `--device cpu --specs tiny --only correctness,examples` runs those
parts under Triton's interpreter; `repeats`, `hygiene`, `far`, `soak`, `pytorch` and `training` run there at tiny sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from nsa_gen.spec import shipped_specs  # noqa: E402
from tools.gpu import plan, report, sanitizer, sizes  # noqa: E402
from tools.gpu.pool import Job, Outcome, run_jobs  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    options = _parse(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    deadline = started + options.budget
    summary = {"machine": report.machine(PROJECT), "seed": options.seed, "budget_seconds": options.budget}
    document = {**summary, "command": " ".join(sys.argv)}
    with tempfile.TemporaryDirectory(prefix="nsa_gen_gpu_suite_") as scratch:
        memory = summary["machine"]["gpu_memory_mib"]
        wanted = plan.Plan(
            specs=options.specs,
            parts=options.only,
            dtypes=options.dtypes,
            lengths=options.lengths,
            device=options.device,
            seed=options.seed,
            root=Path(scratch) / "packages",
            lengths_only=options.lengths_only,
            workers=options.workers,
            examples=options.examples,
            soak_seconds=options.soak_seconds,
            **({} if memory is None else {"gpu_memory_gb": memory / 1000}),
        )
        jobs = {part: wanted.jobs(part) for part in options.only}
        notes = [f"{part}: skipped, {_reason(part)}" for part in options.only if not jobs[part]]
        suite = _Suite(out, document, jobs, started, deadline, options.timeout)
        try:
            for phase in sizes.PHASES:
                suite.run(tuple(part for part in options.only if part in phase), options.workers)
            # Times are taken with the GPU to themselves: what is benchmarked comes after all else, one at a time.
            if "decode" in options.only:
                suite.run_unreported(wanted.compile_for_decode(), options.workers)
                suite.run(("decode",), 1)
            if "bench" in options.only:
                if "correctness" not in options.only:
                    suite.run_unreported(wanted.compile_for_bench(), options.workers)
                suite.run(("bench",), 1)
        except BaseException as error:
            notes.append(f"interrupted: {type(error).__name__}")
            _conclude(suite, summary, notes)
            raise
    ok = _conclude(suite, summary, notes)
    shutil.rmtree(suite.folder, ignore_errors=True)  # all of it is in the JSON files
    return 0 if ok else 1


def _conclude(suite: _Suite, summary: dict[str, Any], notes: Sequence[str]) -> bool:
    """Write the summary and print the table; whether all is well."""
    found = suite.outcomes
    everything = [outcome for outcomes in found.values() for outcome in outcomes]
    interrupted = any(note.startswith("interrupted") for note in notes)
    ok = bool(everything) and all(outcome.ok for outcome in everything) and not interrupted
    lines = report.table(found, notes)
    statuses = {part: {each.name: each.status for each in outcomes} for part, outcomes in found.items()}
    totals = {part: report.totals(found[part]) for part in ("examples", "soak") if part in found}
    seconds = round(time.monotonic() - suite.started, 1)
    write = {**summary, "ok": ok, "seconds": seconds, "totals": totals, "parts": statuses, "notes": list(notes)}
    report.write_json(suite.out / "summary.json", {**write, "table": lines})
    print("\n".join(lines), flush=True)
    return ok


@dataclass
class _Suite:
    """Jobs by part, and what has become of them; the JSON of a part is written anew as each of its jobs ends."""

    out: Path
    document: dict[str, Any]
    jobs: dict[str, list[Job]]
    started: float
    deadline: float
    silence: float
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where jobs write their logs and results."""
        return self.out / "jobs"

    def run(self, parts: Sequence[str], workers: int) -> None:
        """Run the jobs of several parts together."""
        part_of = {job.name: part for part in parts for job in self.jobs[part]}
        for part in parts:
            self.outcomes[part] = []
            self._write(part)

        def ended(outcome: Outcome) -> None:
            part = part_of[outcome.name]
            self.outcomes[part].append(_judged(outcome, self.folder) if part == "sanitizer" else outcome)
            self._write(part)
            self._announce(self.outcomes[part][-1])

        self._run([job for part in parts for job in self.jobs[part]], workers, ended)
        for part in parts:
            order = [job.name for job in self.jobs[part]]
            self.outcomes[part].sort(key=lambda outcome: order.index(outcome.name))
            self._write(part)

    def run_unreported(self, jobs: Sequence[Job], workers: int) -> None:
        """Run jobs that only prepare others, which fail for the same reasons and say so."""
        self._run(jobs, workers, self._announce)

    def _run(self, jobs: Sequence[Job], workers: int, on_outcome: Callable[[Outcome], None]) -> None:
        run_jobs(
            jobs,
            folder=self.folder,
            workers=workers,
            silence=self.silence,
            deadline=self.deadline,
            on_outcome=on_outcome,
        )

    def _write(self, part: str) -> None:
        jobs = report.as_document(self.outcomes[part])
        totals = {"totals": report.totals(self.outcomes[part])} if part in ("examples", "soak") else {}
        report.write_json(self.out / f"{part}.json", {**self.document, **totals, "jobs": jobs})

    def _announce(self, outcome: Outcome) -> None:
        seconds = time.monotonic() - self.started
        with contextlib.suppress(OSError):  # nobody listens any more; the files are what counts
            print(f"{seconds:6.1f} s  {outcome.status:<9} {outcome.name}", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shipped = tuple(shipped_specs())
    listed = "comma-separated; all if left out"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON files")
    parser.add_argument("--only", default="", help=f"parts: {', '.join(sizes.PARTS)} ({listed})")
    parser.add_argument("--specs", default="", help=f"shipped specs ({listed})")
    parser.add_argument("--dtypes", default="", help=f"dtypes of correctness and examples ({listed})")
    parser.add_argument("--lengths", default="", help="sequence lengths of the correctness part")
    parser.add_argument("--lengths-only", action="store_true", help="leave out other kinds of input and packed batches")
    parser.add_argument("--examples", type=int, metavar="N", help="examples in all (2240; 300 on the CPU)")
    parser.add_argument(
        "--soak-seconds", type=float, default=600.0, metavar="S", help="how long random specs are drawn and run (600)"
    )
    parser.add_argument("--budget", type=float, default=1e9, metavar="SECONDS", help="start no job after this long")
    parser.add_argument("--workers", type=int, default=6, help="processes at a time (6)")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds of silence after which a job is killed")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    parts = sizes.PARTS if options.device == "cuda" else sizes.CPU_PARTS
    dtypes = sizes.DTYPES if options.device == "cuda" else sizes.DTYPES[1:]
    options.only = _choice(parser, "--only", options.only, parts)
    options.specs = _choice(parser, "--specs", options.specs, shipped)
    options.dtypes = _choice(parser, "--dtypes", options.dtypes, dtypes)
    try:
        options.lengths = tuple(int(length) for length in options.lengths.split(",") if length) or sizes.LENGTHS
    except ValueError:
        parser.error(f"--lengths: expected numbers and commas, got {options.lengths!r}")
    if min(options.lengths) < 1:
        parser.error(f"--lengths: expected positive numbers, got {min(options.lengths)}")
    if options.examples is not None and options.examples < 1:
        parser.error(f"--examples: expected at least 1, got {options.examples}")
    if options.soak_seconds <= 0:
        parser.error(f"--soak-seconds: expected a positive number, got {options.soak_seconds:g}")
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1, got {options.workers}")
    return options


def _choice(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """What a comma-separated option names, in the order of `known`; all of it where nothing is named."""
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in known:
            parser.error(f"{option}: expected some of {', '.join(known)}, got {name!r}")
    return tuple(name for name in known if not named or name in named)


def _reason(part: str) -> str:
    if part == "sanitizer" and sanitizer.program() is None:
        return "compute-sanitizer is not installed"
    if part == "fla" and plan.missing_for_fla():
        return f"not importable: {plan.missing_for_fla()}"
    return "none of its specs was asked for"


def _judged(outcome: Outcome, folder: Path) -> Outcome:
    log = folder / f"{outcome.name.replace(' ', '_')}.log"
    return sanitizer.judge(outcome, log.read_text(errors="replace") if log.exists() else "")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the jobs' processes are ended too
    sys.exit(main())
