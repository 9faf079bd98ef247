"""Pretrain a small llama-like model on bytes, with dense attention or with the operator of a spec.

    torchrun --nproc-per-node 8 examples/pretrain.py --attention my.yaml --tokens 8192 --width 512 --layers 8 --batch 64
    python examples/pretrain.py --attention reference:tiny --steps 300     # on a CPU: the same formulas in plain torch

The data are Python's own sources and five tasks (examples/quality/data.py). They and their order do not depend on the
attention. An interrupted run continues from the checkpoint in --out, with the same losses as without the interruption.
log.jsonl and loss.png are in the same folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.quality.data import SHORTEST, TASKS, library
from examples.quality.figures import plot_losses
from examples.quality.model import Choice
from examples.quality.training import Settings, device_here, read_log, train
from nsa_gen.spec import SpecError


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that the command line asks for. Raises SpecError, or ValueError naming the option."""
    for name in ("tokens", "batch", "steps", "width", "layers"):
        least = 4 * SHORTEST if name == "tokens" else 1
        if getattr(options, name) < least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(options, name)}")
    if not 0 <= options.task_share <= 1:
        raise ValueError(f"task_share: expected a share from 0 to 1, got {options.task_share}")
    if not 0 <= options.growth <= 1:
        raise ValueError(f"growth: expected a share from 0 to 1, got {options.growth}")
    for task in options.tasks.split(","):
        if task not in TASKS:
            raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {task}")
    choice = Choice.parse(options.attention)
    names = set(Settings.__dataclass_fields__) - {"mode", "spec"}
    return Settings(choice.mode, choice.spec.resolved_yaml(), **{name: getattr(options, name) for name in names})


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train, as a process of torchrun or alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    help_ = "dense, a spec's name or file, or reference:SPEC; dense:SPEC is dense attention with the heads of a spec"
    parser.add_argument("--attention", default="reference:tiny", help=f"{help_} (reference:tiny)")
    parser.add_argument("--out", type=Path, default=Path("build/pretrain"), help="folder of checkpoint, log and plot")
    parser.add_argument("--tokens", type=int, default=256, help="bytes per sequence (256)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step, over all processes (8)")
    parser.add_argument("--width", type=int, default=64, help="of the residual stream (64)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="all steps, with those before an interruption (100)")
    parser.add_argument("--stop-after", type=int, help="stop after this step, to continue later")
    parser.add_argument("--lr", type=float, default=3e-3, help="the highest learning rate (0.003)")
    parser.add_argument("--warmup", type=int, default=20, help="steps in which it rises (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data (0)")
    parser.add_argument("--task-share", type=float, default=0.5, help="share of sequences that are tasks (0.5)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names separated by commas (all five)")
    parser.add_argument("--answer-weight", type=float, default=1.0, help="weight of the loss on answers (1)")
    parser.add_argument("--growth", type=float, default=0.0, help="share of the steps in which sequences grow (0)")
    parser.add_argument("--packages", default="", help="installed packages whose sources are text too: torch,numpy")
    parser.add_argument("--recompute", action="store_true", help="save memory: the backward runs each block again")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (100)")
    options = parser.parse_args(arguments)
    try:
        settings = settings_of(options)
        corpus = library(settings.packages)
    except (SpecError, ValueError) as error:
        parser.error(str(error))
    torchrun = "RANK" in os.environ
    if torchrun:
        if torch.cuda.is_available():
            torch.cuda.set_device(device_here())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    started = time.monotonic()

    def show(line: dict[str, Any]) -> None:
        if line["step"] % 10 == 0 or line["step"] + 1 == settings.steps:
            print(
                f"step {line['step']:5}  text {line['text_loss']:.3f}  answers {line['answer_loss']:.3f} "
                f"({100 * line['answer_accuracy']:.0f}% right)  {line['tokens_per_second']:,} tokens/s  "
                f"{line['peak_bytes'] / 2**20:,.0f} MiB  {time.monotonic() - started:.0f} s",
                flush=True,
            )

    try:
        train(
            settings, options.out, corpus, stop_after=options.stop_after, save_every=options.save_every, progress=show
        )
    except ValueError as error:
        parser.error(str(error))
    if not torchrun or dist.get_rank() == 0:
        plot_losses(read_log(options.out / "log.jsonl"), options.out / "loss.png")
    if torchrun:
        dist.destroy_process_group()
        # DDP keeps gloo's threads, which may abort the process while the interpreter shuts down, so exit before that.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
