"""Evaluate a trained model: losses, tasks, needles, memory and the speed of generation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from examples.generate import generate
from examples.quality.data import HELD_OUT_SHARES, SHORTEST, TASKS, TRAINED_SHARES, Corpus, held_out_batch
from examples.quality.model import Model, autocast
from examples.quality.training import counted, loss_sums, peak_bytes

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
BINS = 16
"""The number of bins of positions in a sequence."""


@torch.no_grad()
def logits_of(model: Model, tokens: Tensor) -> Tensor:
    """Logits (B, T, 256) in the precision that the model was trained in."""
    with autocast(model.choice, tokens.device):
        return model(tokens)


def _batches(
    corpus: Corpus, what: str, length: int, rows: int, device: torch.device, **more: float
) -> Sequence[tuple[Tensor, Tensor]]:
    """Held-out rows, in batches of a few tens of thousands of bytes."""
    at_once = max(1, min(rows, 32768 // length))
    starts = range(0, rows, at_once)
    drawn = [held_out_batch(corpus, what, length, range(i, min(i + at_once, rows)), **more) for i in starts]
    return [(tokens.to(device), kinds.to(device)) for tokens, kinds in drawn]


def text_loss(model: Model, corpus: Corpus, length: int, rows: int, device: torch.device) -> Tensor:
    """The loss on held-out text by position, (length - 1,) in nats, as a mean over rows."""
    total = torch.zeros(length - 1, dtype=torch.float64, device=device)
    for tokens, _ in _batches(corpus, "text", length, rows, device):
        logits = logits_of(model, tokens)[:, :-1].flatten(0, 1).float()
        loss = functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        total += loss.view(len(tokens), -1).double().sum(0)
    return (total / rows).cpu()


def by_position(loss: Tensor) -> list[dict[str, float]]:
    """Means of a loss by position (T - 1,) over bins of equal length. A bin predicts the bytes from start to stop."""
    bins = min(BINS, len(loss))
    edges = [1 + len(loss) * i // bins for i in range(bins + 1)]
    return [{"start": a, "stop": b, "loss": loss[a - 1 : b - 1].mean().item()} for a, b in pairwise(edges)]


def answers(
    model: Model, corpus: Corpus, task: str, length: int, rows: int, device: torch.device, **more: float
) -> dict[str, float]:
    """The loss on a task's answers in nats, the share of answer bytes that are right, and their number."""
    found = torch.zeros(3, dtype=torch.float64, device=device)
    for tokens, kinds in _batches(corpus, task, length, rows, device, **more):
        sums, right = loss_sums(logits_of(model, tokens), tokens, kinds)
        found += torch.stack([each[1:].sum().double() for each in (sums, right, counted(kinds))])
    loss, right, count = found.tolist()
    return {"loss": loss / count, "accuracy": right / count, "answers": round(count)}


def _lengths(shares: Sequence[float], tokens: int) -> list[int]:
    return [round(share * tokens) for share in shares if round(share * tokens) >= SHORTEST]


def evaluate(
    model: Model,
    corpus: Corpus,
    tokens: int,
    device: torch.device,
    *,
    rows: int = 32,
    lengths: Sequence[int] = (),
    tasks: Sequence[str] = tuple(TASKS),
    progress: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Evaluate everything but generation, for a model that was trained on sequences of `tokens` bytes.

    Uses `rows` sequences of each of `tasks` and four times as many of text. The result has `held_out_loss` at the
    trained length, `positions` (the same loss in bins), `perplexity` per byte at the trained length and at `lengths`,
    `needles` by depth and length (including `lengths`), `tasks` at trained and held-out lengths, and `peak_bytes`.
    `progress` is called with the result so far after text, needles and tasks.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    loss = text_loss(model, corpus, tokens, 4 * rows, device)
    perplexity = {tokens: math.exp(loss.mean().item())}
    for length in lengths:
        if length != tokens:
            perplexity[length] = math.exp(text_loss(model, corpus, length, 4 * rows, device).mean().item())
    found = {
        "held_out_loss": loss.mean().item(),
        "positions": by_position(loss),
        "perplexity": [{"tokens": length, "perplexity": value} for length, value in sorted(perplexity.items())],
    }
    progress(found)
    found["needles"] = [
        {
            "depth": depth,
            "tokens": length,
            "accuracy": answers(model, corpus, "needle", length, rows, device, depth=depth)["accuracy"],
        }
        for length in sorted({*_lengths((*TRAINED_SHARES, *HELD_OUT_SHARES), tokens), *_lengths(lengths, 1)})
        for depth in DEPTHS
    ]
    progress(found)
    trained = [(length, True) for length in _lengths(TRAINED_SHARES, tokens)]
    held_out = [(length, False) for length in _lengths(HELD_OUT_SHARES, tokens)]
    found["tasks"] = [
        {"task": task, "tokens": length, "trained": known, **answers(model, corpus, task, length, rows, device)}
        for task in tasks
        for length, known in trained + held_out
    ]
    found["peak_bytes"] = peak_bytes(device)
    progress(found)
    return found


class _Cached:
    """Adapts a model to the interface that `examples.generate` calls."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, tokens: Tensor, cache: Any, prompt: bool = False) -> Tensor:
        with autocast(self.model.choice, tokens.device, cached=False):  # a graph has to round the weights itself
            return self.model(tokens, cache)[:, -1]


@torch.no_grad()
def generation(model: Model, prompt: Tensor, new: int, chunk: int = 8192) -> dict[str, Any]:
    """Generate greedily after prompts (B, T); returns tokens per second, the method and the first sequence's tokens.

    An operator with a decode pass uses a cache. Everything else runs the whole sequence for every token.
    """
    op = next((operator.op for operator in model.operators()), None)
    if model.choice.mode == "operator" and hasattr(op, "NSACache"):
        total = prompt.shape[1] + new
        cache = op.NSACache(len(prompt), total, layers=len(model.blocks), device=prompt.device)
        found, _, seconds = generate(_Cached(model), cache, prompt, new, chunk)
        return {"by": "cache", "tokens_per_second": len(prompt) * (new - 1) / seconds, "first": found[0].tolist()}
    tokens = prompt
    started = time.perf_counter()
    for _ in range(new):
        tokens = torch.cat((tokens, logits_of(model, tokens)[:, -1:].argmax(-1)), 1)
    found = tokens[:, prompt.shape[1] :].tolist()
    return {
        "by": "forward",
        "tokens_per_second": len(prompt) * new / (time.perf_counter() - started),
        "first": found[0],
    }
