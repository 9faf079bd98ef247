"""Call a generated package with schedules other than its defaults; a tuned table may choose any of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nsa_gen.lowering.parts import Kernel
from nsa_gen.lowering.plan import Plan

Values = tuple[tuple[str, str, int], ...]

SMALL_CHUNKS = (7, 33, 200)
"""Chunk sizes in tokens, so small that even a short call has several chunks."""
LAUNCH_OPTIONS = ("num_warps", "num_stages")
"""Options of compilation, which do not exist in the interpreter."""
SPLITS = ("HEAD_SPLITS", "PROGRAMS", "SHARES")
"""Tunables that say how many programs share a sum. Unlike tile sizes, all of their values fit every device."""
LARGEST_TILE = 64
"""Largest tile on the interpreter, which computes whole tiles even if few rows are used."""
FEWEST = 4
"""Fewest variations of a package, so that tile sizes vary even if it has few choices."""


@dataclass(frozen=True)
class Variation:
    """One way to run a package: values of tunables (kernel, name, value) that replace those in force.

    `recompute` are the branches whose forward the backward runs again.
    """

    number: int
    values: Values = ()
    recompute: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """A short name, such as "schedule 3 recompute cmp+win"."""
        again = f" recompute {'+'.join(self.recompute)}" if self.recompute else ""
        return f"schedule {self.number}{again}"

    @property
    def text(self) -> str:
        """Its number and all values, in a line."""
        kernels = [
            f"{kernel} {' '.join(f'{name}={value}' for _, name, value in values)}"
            for kernel, values in itertools.groupby(self.values, lambda each: each[0])
        ]
        return f"{self.label}: {', '.join(kernels) or 'the values in force'}"


def variations(program: Plan, interpreted: bool, gradients: bool) -> tuple[Variation, ...]:
    """A few ways to run a package that together cover every schedule choice and every set of recomputed branches.

    Each value of a choice meets each value of every other choice, and each branch, recomputed and not. Tile sizes and
    splits vary as well; on a GPU, only splits. The tokens of a chunk depend on the call: `with_chunks`.
    """
    choices = [(decision.name, name) for decision in program.decisions for name in decision.choices]
    branches = program.spec.branches if gradients else ()
    bits = 3 if choices and len(branches) > 1 else max(len(choices), len(branches))
    found = []
    for number in range(max(FEWEST, 2**bits)):
        turn = number + number // 2 + number // 4 if bits == 3 else number
        x, y, z = number & 1, number >> 1 & 1, number >> 2 & 1
        values = [(*choice, number >> place & 1) for place, choice in enumerate(choices)]
        # Linear in the number's bits, and none of them alone: every pair of a choice and a branch takes all four
        # values. Number 5 recomputes only the selected branch, block by block, without the window's local blocks.
        again = tuple(branch for branch, one in zip(branches, (x ^ y ^ z, y ^ z, x ^ z), strict=False) if one)
        kernels = [kernel for kernel in program.kernels if kernel.direction != "decode"]
        values += _values(program, kernels, turn, number, interpreted)
        found.append(Variation(number, tuple(values), again))
    return tuple(found)


def with_chunks(program: Plan, variation: Variation, rows: int) -> Variation:
    """The variation for a call with `rows` tokens in all: three chunks, or one, in half of each choice's calls."""
    tokens = -(-rows // 3) if variation.number.bit_count() % 2 else rows
    sizes = [
        (decision.name, tunable.name, max(1, tokens))
        for decision in program.decisions
        for tunable in decision.tunables
        if tunable.name not in decision.choices and decision.passes != ("decode",)
    ]
    # Values of one kernel must stay adjacent.
    values = sorted((*variation.values, *sizes), key=lambda value: value[0])
    return replace(variation, values=tuple(values))


def decode_variation(program: Plan, number: int, interpreted: bool) -> Variation:
    """Tile sizes, splits and launches of decode for a cache's scenario `number`, from the last of each kernel's."""
    kernels = [kernel for kernel in program.kernels if kernel.direction == "decode"]
    values = _values(program, kernels, -1 - number, -1 - number, interpreted)
    decisions = [decision for decision in program.decisions if decision.passes == ("decode",)]
    values += [(each.name, limit.name, limit.values[number % 2 - 1]) for each in decisions for limit in each.tunables]
    return Variation(number, tuple(values))


def most_unlike_the_defaults(program: Plan, found: Sequence[Variation]) -> Variation | None:
    """The variation with the most choices that differ from the interpreter's defaults."""
    defaults = {name: config.mapping() for name, config in program.defaults["interpreter"].items()}
    schedules = {decision.name for decision in program.decisions}

    def unlike(variation: Variation) -> int:
        return sum(value != defaults[name][key] for name, key, value in variation.values if name in schedules)

    return max(found, key=unlike, default=None)


def _values(
    program: Plan, kernels: Sequence[Kernel], turn: int, split_turn: int, interpreted: bool
) -> list[tuple[str, str, int]]:
    found: list[tuple[str, str, int]] = []
    for kernel in kernels:
        turns = tile_sizes(program, kernel) if interpreted else [{}]
        found += [(kernel.name, name, value) for name, value in turns[turn % len(turns)].items()]
        splits = [tunable for tunable in kernel.tunables if tunable.name in SPLITS]
        found += [(kernel.name, each.name, each.values[split_turn % len(each.values)]) for each in splits]
    return found


def tile_sizes(program: Plan, kernel: Kernel) -> list[dict[str, int]]:
    """Tile sizes of a kernel on the interpreter that together cover each legal value up to `LARGEST_TILE`.

    The interpreter's defaults come first.
    """
    from nsa_gen.lowering import space

    default = program.defaults["interpreter"][kernel.name].mapping()
    kept = {name: (value,) for name, value in default.items() if name in (*LAUNCH_OPTIONS, *SPLITS)}
    chosen: list[dict[str, int]] = []
    seen: set[tuple[str, int]] = set()
    for config in space.legal(kernel, program.sizes, kept):
        tiles = {name: value for name, value in config.items() if name not in kept}
        small = all(value <= max(LARGEST_TILE, default[name]) for name, value in tiles.items())
        if small and (not chosen or tiles.items() - seen):
            chosen.append(tiles)
            seen |= tiles.items()
    return chosen


@contextmanager
def varied(module: Any, variation: Variation | None) -> Iterator[None]:
    """Within the block, `module` runs with a variation's values, as far as it has these tunables."""
    configs = getattr(module, "configs", None)
    with ExitStack() as stack:
        if configs is not None and variation is not None:
            known = configs.DEFAULTS["interpreter"]
            for kernel, values in itertools.groupby(variation.values, lambda each: each[0]):
                fitting = {name: value for _, name, value in values if name in known.get(kernel, {})}
                if fitting:
                    stack.enter_context(configs.override(kernel, **fitting))
        yield


@contextmanager
def drawn_schedules(module: Any, device: torch.device, seed: int) -> Iterator[None]:
    """Within the block, schedules and chunk sizes are drawn from a seed. For half of the seeds, they do not change."""
    pick = random.Random(f"schedules {seed}").choice
    configs = getattr(module, "configs", None)
    with ExitStack() as stack:
        for name in getattr(configs, "SCHEDULES", ()) if pick((True, False)) else ():
            choices = {key: SMALL_CHUNKS if key.endswith("_TOKENS") else (0, 1) for key in configs.get(name, device)}
            stack.enter_context(configs.override(name, **{key: pick(values) for key, values in choices.items()}))
        yield
