"""Calling a generated package by schedules other than its defaults, which any tuned table may choose."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

#: Sizes of chunks, in tokens, of which even a short call has several.
SMALL_CHUNKS = (7, 33, 200)


@contextmanager
def other_schedules(module: Any, device: torch.device) -> Iterator[None]:
    """Within the block, every choice of schedule that a package has is the other one, and chunks are small."""
    with ExitStack() as stack:
        for name, values in _schedules(module, device).items():
            changed = {choice: 1 - value for choice, value in values.items() if _is_choice(choice)}
            changed |= {size: SMALL_CHUNKS[1] for size in values if not _is_choice(size)}
            stack.enter_context(module.configs.override(name, **changed))
        yield


@contextmanager
def drawn_schedules(module: Any, device: torch.device, seed: int) -> Iterator[None]:
    """Within the block, schedules and sizes of chunks are drawn from a seed, or for half the seeds left alone."""
    pick = random.Random(f"schedules {seed}").choice
    with ExitStack() as stack:
        if pick((True, False)):
            for name, values in _schedules(module, device).items():
                changed = {key: pick((0, 1)) if _is_choice(key) else pick(SMALL_CHUNKS) for key in values}
                stack.enter_context(module.configs.override(name, **changed))
        yield


def _schedules(module: Any, device: torch.device) -> dict[str, dict[str, int]]:
    """The schedules in force by name; none for a package, or something like one, that has no choice."""
    configs = getattr(module, "configs", None)
    return {name: configs.get(name, device) for name in getattr(configs, "SCHEDULES", ())}


def _is_choice(key: str) -> bool:
    return not key.endswith("_TOKENS")
