"""Train and evaluate the same small model with every attention, and put the results in a table.

    python examples/study.py --profile gpu --minutes 9 --out build/study    # on a GPU; another call continues
    python examples/study.py --profile cpu --minutes 60 --out build/study   # by the reference, in plain torch

Every run has the same data, seed and number of steps. With --minutes, the first call compiles the operators, times a
few steps of each arm and gives all runs as many steps as fit. --steps sets the number instead. Finished runs are kept,
an interrupted run continues from its checkpoint, and a failed one is tried again. study.json and study.md are written
after every run. A run's folder has its log.jsonl and its evaluation.json, which is written part by part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.quality.arms import PROFILES, Profile
from examples.quality.data import SHORTEST, library
from examples.quality.evaluation import evaluate
from examples.quality.model import Model
from examples.quality.training import Settings, device_here, peak_bytes, read_log, train
from nsa_gen._files import write_whole

TIMED_STEPS = 3


def shortened(profile: Profile, tokens: int) -> Profile:
    """The profile with sequences of `tokens` bytes and as many bytes per step; the evaluation has no longer ones."""
    bytes_a_step = profile.settings["tokens"] * profile.settings["batch"]
    if not 4 * SHORTEST <= tokens <= bytes_a_step or bytes_a_step % tokens:
        wanted = f"a divisor of a step's {bytes_a_step} bytes of at least {4 * SHORTEST}"
        raise ValueError(f"--tokens: expected {wanted}, got {tokens}")
    return replace(
        profile, settings={**profile.settings, "tokens": tokens, "batch": bytes_a_step // tokens}, lengths=()
    )


def run_name(arm: str, seed: int) -> str:
    return f"{arm}.{seed}"


def write_json(path: Path, found: Any) -> None:
    write_whole(path, json.dumps(found, indent=1) + "\n")


def one_run(profile: Profile, arm: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """Train and evaluate one run, and return its row of the study."""
    settings, folder, device = profile.run(arm, seed, steps), out / "runs" / run_name(arm, seed), device_here()
    corpus = library(settings.packages)
    if device.type == "cuda":
        torch.cuda.init()  # before its first use the GPU has no statistics to reset
        torch.cuda.reset_peak_memory_stats(device)
    model = train(settings, folder, corpus, save_every=max(20, steps // 4))
    memory = peak_bytes(device) if device.type == "cuda" else None  # a CPU's peak includes the process's earlier runs
    log = read_log(folder / "log.jsonl")
    speeds = sorted(line["tokens_per_second"] for line in log if line["length"] == settings.tokens)
    found = evaluated(profile, model, settings, profile.rows, folder / "evaluation.json")
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_text_loss": sum(line["text_loss"] for line in log[-20:]) / len(log[-20:]),
        "tokens_per_second": speeds[len(speeds) // 2],
        "train_peak_bytes": memory,
        **found,
    }


def evaluated(profile: Profile, model: Model, settings: Settings, rows: int, path: Path) -> dict[str, Any]:
    """Evaluate a trained model. The result is also written to `path`, part by part."""
    return evaluate(
        model.eval(),
        library(settings.packages),
        settings.tokens,
        device_here(),
        rows=rows,
        lengths=profile.lengths,
        tasks=settings.tasks.split(","),
        progress=lambda found: write_json(path, found),
    )


def short_run(profile: Profile, arm: str, times: int) -> Settings:
    """Settings of a run with `times` steps at each sequence length."""
    settings = profile.run(arm, 0, 1)
    lengths = settings.doublings + 1
    return replace(settings, steps=times * lengths, growth=settings.doublings / lengths)


def seconds_a_step(profile: Profile, arm: str, log: list[dict[str, Any]]) -> float:
    """Mean seconds per step of a whole run, from the fastest step of each length in the log of a short run."""
    run, fastest = profile.run(arm, 0, 1000), dict[int, int]()
    for line in log:
        fastest[line["length"]] = max(line["tokens_per_second"], fastest.get(line["length"], 0))
    counts = Counter(run.length(step) for step in range(run.steps))
    return sum(n / run.steps * run.batch * run.tokens / fastest[length] for length, n in counts.items())


def time_arms(profile: Profile, arms: list[str], out: Path) -> None:
    """Write the seconds per step of each arm, and those of an evaluation, to timing.json."""
    found: dict[str, float] = {}
    for arm in arms:
        folder, settings = out / "timing" / arm, short_run(profile, arm, TIMED_STEPS)
        started = time.perf_counter()
        model = train(settings, folder, library(settings.packages), save_every=settings.steps)
        found[arm] = seconds_a_step(profile, arm, read_log(folder / "log.jsonl"))
        if arm == (profile.base if profile.base in arms else arms[-1]):
            found["start"] = max(0.0, time.perf_counter() - started - settings.steps * found[arm])
            started = time.perf_counter()
            evaluated(profile, model, settings, profile.rows, folder / "evaluation.json")
            found["evaluation"] = time.perf_counter() - started
        print(f"{arm}: {found[arm]:.3f} s a step", flush=True)
    write_json(out / "timing.json", found)


def compile_arm(profile: Profile, arm: str, out: Path) -> None:
    """Run a step at each length and a small evaluation, so that the kernels are in Triton's cache.

    The evaluation has two sequences, not one: Triton compiles separate kernels for arguments that are 1.
    """
    folder, settings = out / "compiled" / arm, short_run(profile, arm, 1)
    model = train(settings, folder, library(settings.packages), save_every=settings.steps)
    evaluated(profile, model, settings, 2, folder / "evaluation.json")


def child(options: argparse.Namespace, phase: str, runs: list[str], number: int = 0) -> subprocess.Popen[bytes]:
    """Start this script in its own process, on one of the GPUs."""
    command = [sys.executable, __file__, "--profile", options.profile, "--out", str(options.out), "--phase", phase]
    command += ["--steps", str(options.steps), "--rows", str(options.rows), "--tokens", str(options.tokens)]
    command += ["--runs", ",".join(runs)]
    environment = dict(os.environ)
    if torch.cuda.device_count() > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % torch.cuda.device_count()]
    return subprocess.Popen(command, env=environment)


def compile_all(options: argparse.Namespace, arms: list[str]) -> None:
    """Compile every arm's kernels, one process per arm, as many at a time as there are cores (at most 16)."""
    waiting, running = list(arms), []
    while waiting or running:
        running = [process for process in running if process.poll() is None]
        if waiting and len(running) < min(16, os.cpu_count() or 1):
            running.append(child(options, "compile", [waiting.pop(0)], len(waiting)))
        else:
            time.sleep(0.2)


def choose_steps(options: argparse.Namespace, runs: list[str], started: float) -> int:
    """The number of steps, the same for all runs, that fits into the minutes left."""
    arms = list(dict.fromkeys(run.rpartition(".")[0] for run in runs))
    if torch.cuda.is_available():
        compile_all(options, arms)
    if child(options, "time", arms).wait() != 0:
        raise SystemExit("study: an arm cannot be timed; see the error above, or leave it out with --arms")
    timing = json.loads((options.out / "timing.json").read_text())
    left = 60 * options.minutes - (time.monotonic() - started)
    # Jobs that share a GPU or a core do not run faster in parallel.
    crowd = max(1.0, options.jobs / (torch.cuda.device_count() or os.cpu_count() or 1))
    fitting = []
    for share in shares_of(options, runs):
        around = crowd * len(share) * (timing.get("evaluation", 0.0) + timing.get("start", 0.0))
        fitting.append((left - around) / (crowd * sum(timing[run.rpartition(".")[0]] for run in share)))
    steps = int(0.9 * min(fitting))
    if steps < 1:
        raise SystemExit(f"--minutes: expected more than {options.minutes}, which are spent before the first step")
    return steps


def shares_of(options: argparse.Namespace, runs: list[str]) -> list[list[str]]:
    """The runs of each job, without empty jobs."""
    return [runs[i :: options.jobs] for i in range(min(options.jobs, len(runs)))]


def train_all(options: argparse.Namespace, runs: list[str], started: float) -> None:
    """Run everything that has no result yet, in `jobs` processes. If a process dies, only its current run is lost."""
    shares = shares_of(options, [run for run in runs if not _result(options.out, run).exists()])
    running = {i: child(options, "train", share, i) for i, share in enumerate(shares)}
    reported = 0
    while running:
        time.sleep(0.2)
        if (results := sum(_result(options.out, run).exists() for run in runs)) > reported:
            reported = results
            report(options, runs, started)
        for i, process in list(running.items()):
            if process.poll() is None:
                continue
            shares[i] = [run for run in shares[i] if not _result(options.out, run).exists()]
            if shares[i]:
                arm, _, seed = shares[i].pop(0).rpartition(".")
                row = {"arm": arm, "seed": int(seed), "problem": f"the process ended with code {process.returncode}"}
                write_json(_result(options.out, run_name(arm, int(seed))), row)
            del running[i]
            if shares[i]:
                running[i] = child(options, "train", shares[i], i)
            report(options, runs, started)


def _result(out: Path, run: str) -> Path:
    return out / "runs" / f"{run}.json"


def profile_of(options: argparse.Namespace) -> Profile:
    """The profile that the command line asks for. Raises ValueError naming the option."""
    profile = PROFILES[options.profile]
    profile = replace(profile, rows=options.rows or profile.rows)
    return shortened(profile, options.tokens) if options.tokens else profile


def report(options: argparse.Namespace, runs: list[str], started: float) -> list[dict[str, Any]]:
    """Write study.json and study.md for the runs that have a result, and return their rows."""
    rows = [json.loads(_result(options.out, run).read_text()) for run in runs if _result(options.out, run).exists()]
    device = device_here()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    profile = profile_of(options)
    about = {
        "profile": options.profile,
        "settings": profile.settings,
        "steps": options.steps,
        "gpu": gpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus": library(profile.settings.get("packages", "")).digest,
        "seconds": round(time.monotonic() - started),
    }
    write_json(options.out / "study.json", {**about, "rows": rows})
    write_whole(options.out / "study.md", table(rows, profile))
    return rows


def table(rows: list[dict[str, Any]], profile: Profile) -> str:
    """The results in Markdown: accuracies are those of the trained lengths, in percent."""
    tasks = profile.run(profile.base, 0, 1).tasks.split(",")
    head = ["attention", "seed", "held-out loss", *tasks, "one needle at all depths", "tokens/s", "MiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        if "problem" in row:
            lines.append(f"| {row['arm']} | {row['seed']} | {row['problem']} |" + " |" * (len(head) - 3))
            continue
        right = {
            task: [each["accuracy"] for each in row["tasks"] if each["task"] == task and each["trained"]]
            for task in tasks
        }
        trained = {each["tokens"] for each in row["tasks"] if each["trained"]}
        needles = [each["accuracy"] for each in row["needles"] if each["tokens"] in trained]
        cells = [row["arm"], str(row["seed"]), f"{row['held_out_loss']:.4f}"]
        cells += [f"{100 * sum(found) / len(found):.1f}" for found in (*right.values(), needles)]
        memory = row["train_peak_bytes"]
        cells += [f"{row['tokens_per_second']:,}", "-" if memory is None else f"{memory / 2**20:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def work(options: argparse.Namespace, profile: Profile) -> None:
    """Do the work of a child process."""
    runs = options.runs.split(",")
    if options.phase == "compile":
        compile_arm(profile, runs[0], options.out)
    elif options.phase == "time":
        time_arms(profile, runs, options.out)
    else:
        for run in runs:
            arm, _, seed = run.rpartition(".")
            try:
                row = one_run(profile, arm, int(seed), options.steps, options.out)
            except Exception as error:
                traceback.print_exc()
                problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                row = {"arm": arm, "seed": int(seed), "problem": problem}
            write_json(_result(options.out, run), row)
            print(table([row], profile).splitlines()[-1], flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and run what is left to do. The exit code is 1 if a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", choices=sorted(PROFILES), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("build/study"))
    parser.add_argument("--arms", default="", help="names separated by commas (all)")
    parser.add_argument("--seeds", default="0", help="whole numbers separated by commas (0)")
    parser.add_argument("--steps", type=int, default=0, help="steps of every run (as many as fit into --minutes)")
    parser.add_argument("--minutes", type=float, default=9.0, help="minutes of the whole study, without --steps (9)")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time (as many as there are GPUs, or one)")
    parser.add_argument("--tokens", type=int, default=0, help="bytes per sequence, instead of the profile's")
    parser.add_argument("--rows", type=int, default=0, help="sequences of each task in an evaluation")
    parser.add_argument("--phase", choices=("compile", "time", "train"), help=argparse.SUPPRESS)
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    options, started = parser.parse_args(arguments), time.monotonic()
    try:
        profile = profile_of(options)
    except ValueError as error:
        parser.error(str(error))
    if options.phase is not None:
        work(options, profile)
        return
    known = list(profile.arms())
    arms = options.arms.split(",") if options.arms else known
    for arm in arms:
        if arm not in known:
            parser.error(f"--arms: expected some of {', '.join(known)}, got {arm}")
    if not all(seed.isdigit() for seed in options.seeds.split(",")):
        parser.error(f"--seeds: expected whole numbers with commas between, got {options.seeds}")
    options.jobs = options.jobs or max(1, torch.cuda.device_count())
    runs = [run_name(arm, int(seed)) for seed in options.seeds.split(",") for arm in arms]
    plan = options.out / "plan.json"
    kept = json.loads(plan.read_text()) if plan.exists() else None
    if kept is not None and kept["profile"] != options.profile:
        parser.error(f"--out: {options.out} holds a study of profile {kept['profile']}, got {options.profile}")
    tokens = profile.settings["tokens"]
    before = tokens if kept is None else kept.get("tokens", PROFILES[options.profile].settings["tokens"])
    if before != tokens:
        parser.error(f"--tokens: the study in {options.out} has sequences of {before} bytes, got {tokens}")
    if kept is not None and options.steps not in (0, kept["steps"]):
        parser.error(f"--steps: the study in {options.out} has {kept['steps']} steps, got {options.steps}")
    options.steps = options.steps or (kept["steps"] if kept else choose_steps(options, runs, started))
    write_json(plan, {"profile": options.profile, "tokens": tokens, "steps": options.steps})
    for result in (_result(options.out, run) for run in runs):
        if result.exists() and "problem" in json.loads(result.read_text()):
            result.unlink()
    print(f"{len(runs)} runs of {options.steps} steps", flush=True)
    train_all(options, runs, started)
    rows = report(options, runs, started)
    print((options.out / "study.md").read_text(), end="")
    if any("problem" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
