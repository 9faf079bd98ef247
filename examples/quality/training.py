"""Training runs that resume exactly, on one or several GPUs or on a CPU."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from examples.convert import save
from examples.quality.data import ANSWER, SHORTEST, TASKS, TEXT, Corpus, training_batch
from examples.quality.model import Choice, Mode, Model, autocast
from nsa_gen.spec import parse_spec

KINDS = (TEXT, *(ANSWER + number for number in range(len(TASKS))))
"""The kinds of bytes that count: text, and the answers of each task."""
DOUBLINGS = 5
"""How often the length of growing sequences doubles, if they are long enough."""


@dataclass(frozen=True)
class Settings:
    """Everything that a run's numbers depend on. `spec` is a spec's text, `batch` counts sequences of all processes.

    `growth` is the share of the steps in which sequences grow to `tokens` bytes. While they are shorter, a step has
    proportionally more of them. `packages` names packages whose sources are text too.
    """

    mode: Mode
    spec: str
    width: int = 64
    layers: int = 2
    tokens: int = 256
    batch: int = 8
    steps: int = 100
    lr: float = 3e-3
    warmup: int = 20
    seed: int = 0
    task_share: float = 0.5
    tasks: str = ",".join(TASKS)
    answer_weight: float = 1.0
    recompute: bool = False
    growth: float = 0.0
    packages: str = ""

    @property
    def choice(self) -> Choice:
        return Choice(self.mode, parse_spec(self.spec))

    def model(self, device: torch.device) -> Model:
        return Model(self.choice, self.width, self.layers, self.seed, self.recompute).to(device)

    @property
    def doublings(self) -> int:
        """How often sequences double, so that a quarter of the shortest ones still holds a task."""
        return min(DOUBLINGS, max(1, self.tokens // (4 * SHORTEST)).bit_length() - 1) if self.growth else 0

    def length(self, step: int) -> int:
        """Bytes of a step's sequences. Each of the shorter lengths has the same number of steps."""
        grown = self.growth * self.steps
        return self.tokens if step >= grown else self.tokens >> (self.doublings - int(step * self.doublings / grown))

    def rate(self, step: int) -> float:
        """The learning rate: a linear warm-up, then half a cosine down to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def device_here() -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def loss_sums(logits: Tensor, tokens: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (KINDS,) of the loss in nats and of the right bytes, over text and over each task's answers.

    logits (B, T, 256), tokens (B, T) int64, kinds (B, T) uint8. Each token is predicted from those before it.
    """
    wanted, kind = tokens[:, 1:].flatten(), kinds[:, 1:].flatten()
    flat = logits[:, :-1].flatten(0, 1).float()
    loss = functional.cross_entropy(flat, wanted, reduction="none")
    right = (flat.detach().argmax(-1) == wanted).float()
    masks = [(kind == each).float() for each in KINDS]
    return torch.stack([(loss * m).sum() for m in masks]), torch.stack([(right * m).sum() for m in masks])


def counted(kinds: Tensor) -> Tensor:
    """The number (KINDS,) of predicted bytes of text and of each task's answers."""
    return torch.stack([(kinds[:, 1:] == each).sum() for each in KINDS]).double()


def optimiser_of(model: nn.Module, lr: float, fused: bool) -> torch.optim.AdamW:
    """AdamW, with weight decay only for matrices."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without one that an interruption cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def train(
    settings: Settings,
    out: Path,
    corpus: Corpus,
    *,
    stop_after: int | None = None,
    save_every: int = 100,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Model:
    """Train, from `out`/checkpoint.pt if it exists, up to the last step or `stop_after`. Returns the model.

    `out`/log.jsonl gets one line per step: step, text_loss and answer_loss in nats, answer_accuracy, loss and accuracy
    of each of the step's tasks, lr, length of the sequences, tokens_per_second and peak_bytes. Losses are means over
    all processes, and depend on their number only by rounding. Raises ValueError if the checkpoint has other settings
    or another text.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if settings.batch % ranks:
        raise ValueError(f"batch: expected a multiple of {ranks} processes, got {settings.batch}")
    device = device_here()
    model = settings.model(device)
    optimiser = optimiser_of(model, settings.lr, fused=device.type == "cuda")
    written = {**asdict(settings), "corpus": corpus.digest}
    checkpoint, log, first = out / "checkpoint.pt", out / "log.jsonl", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        for name, value in written.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"{name}: the checkpoint in {out} was made with {state['settings'].get(name)!r}, got {value!r}"
                )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    last = settings.steps if stop_after is None else min(settings.steps, stop_after)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(log) if line["step"] < first]
        log.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    wrapped = DistributedDataParallel(model) if ranks > 1 else model

    def batch(step: int) -> tuple[Tensor, Tensor]:
        tasks, length = settings.tasks.split(","), settings.length(step)
        share = settings.batch // ranks * (settings.tokens // length)
        rows = range(rank * share, (rank + 1) * share)
        return training_batch(corpus, settings.seed, step, rows, length, settings.task_share, tasks)

    model.train()
    with (
        ThreadPoolExecutor(1) as ahead,
        log.open("a", encoding="utf-8") if rank == 0 else open(os.devnull, "w") as lines,
    ):
        waiting = ahead.submit(batch, first)
        for step in range(first, last):
            started = time.perf_counter()
            tokens, kinds = (x.to(device, non_blocking=True) for x in waiting.result())
            waiting = ahead.submit(batch, step + 1)
            line = _step(wrapped, optimiser, settings, step, (tokens, kinds))
            line["length"] = tokens.shape[1]
            line["tokens_per_second"] = round(ranks * tokens.numel() / (time.perf_counter() - started))
            line["peak_bytes"] = peak_bytes(device)
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            if progress is not None and rank == 0:
                progress(line)
            if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == last):
                state = {"settings": written, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
                save(checkpoint, {**state, "step": step + 1})
    return model


def _step(
    model: nn.Module, optimiser: torch.optim.Optimizer, settings: Settings, step: int, batch: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Train one step on this process's rows of a batch. Returns the line of the log, without times."""
    tokens, kinds = batch
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rate = settings.rate(step)
    for group in optimiser.param_groups:
        group["lr"] = rate
    with autocast(settings.choice, tokens.device):
        logits = model(tokens)
    sums, right = loss_sums(logits, tokens, kinds)
    counts = counted(kinds)
    if ranks > 1:
        dist.all_reduce(counts)
    scale, present = counts.clamp(min=1).to(sums), (counts[1:] > 0).to(sums)
    # Each of a step's tasks has the same weight: copying has hundreds of times as many answers as a needle.
    share = present / present.sum().clamp(min=1)
    # DDP averages the processes' gradients, so multiply by `ranks` to get the whole batch's sum.
    ((sums / scale) @ torch.cat((sums.new_ones(1), settings.answer_weight * share)) * ranks).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    found = torch.stack([sums.detach() / scale, right / scale])
    if ranks > 1:
        dist.all_reduce(found)
    loss, accuracy = torch.cat((found, found[:, 1:] @ share[:, None]), 1).tolist()
    tasks = {
        task: {"loss": loss[1 + number], "accuracy": accuracy[1 + number]}
        for number, (task, there) in enumerate(zip(TASKS, present.tolist(), strict=True))
        if there
    }
    means = {"text_loss": loss[0], "answer_loss": loss[-1], "answer_accuracy": accuracy[-1]}
    return {"step": step, **means, "tasks": tasks, "lr": rate}


def load_model(folder: Path, device: torch.device, mode: Mode | None = None) -> tuple[Model, Settings]:
    """The model of a checkpoint, in evaluation mode. `mode` replaces an operator by its reference, or the reverse."""
    state = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
    known = {name: value for name, value in state["settings"].items() if name != "corpus"}
    if mode is not None:
        if "dense" in (mode, known["mode"]) and mode != known["mode"]:
            raise ValueError(f"mode: the checkpoint in {folder} is of attention {known['mode']}, got {mode}")
        known["mode"] = mode
    settings = Settings(**known)
    model = settings.model(device)
    model.load_state_dict(state["model"])
    return model.eval(), settings
