"""Which configurations of a kernel are worth compiling: legal ones, the cost model's favourites among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from nsa_gen.hardware import Gpu
from nsa_gen.lowering import Program, space
from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.program import Kernel
from nsa_gen.rendering.legality import check_of
from nsa_gen.tuning.shapes import Bucket


@dataclass(frozen=True)
class KernelSpace:
    """A kernel with its candidates for a bucket, the default first, then by rising modelled time.

    `total` counts all combinations of tunables, `legal` those that keep the constraints and are expected to fit.
    """

    kernel: Kernel
    candidates: tuple[dict[str, int], ...]
    seconds: tuple[float, ...]
    total: int
    legal: int


def kernel_space(program: Program, kernel: Kernel, gpu: Gpu, bucket: Bucket, most: int) -> KernelSpace:
    """At most `most` candidates of a kernel, the cost model's default among them; nothing illegal is ever in it.

    Half of them are the best by the model. The others are the best with some value that none of these has, such as
    eight warps or a lower tile, so that a mistake of the model about one tunable can be found out.
    """
    sizes: dict[sympy.Symbol, int] = {**program.sizes_on(gpu.target), s.T: bucket.tokens, s.B: bucket.batch}
    default = program.defaults[gpu.target][kernel.name].mapping()
    test = space.fits(kernel, sizes, gpu)
    every = list(space.candidates(kernel))
    legal = [config for config in every if test(config)]
    seconds = space.modelled_seconds(kernel, sizes, gpu)
    ranked = sorted((config for config in legal if config != default), key=lambda each: (seconds(each), _order(each)))
    # The default is always tried, even where nothing is expected to fit and it is the least of evils.
    chosen = [default, *_varied(ranked, most - 1)]
    return KernelSpace(kernel, tuple(chosen), tuple(seconds(each) for each in chosen), len(every), len(legal))


def _varied(ranked: list[dict[str, int]], most: int) -> list[dict[str, int]]:
    """The best half by rank, then the best with a value that none has yet, then by rank again; in order of rank."""
    chosen = list(range(min(len(ranked), (most + 1) // 2)))
    seen = {item for index in chosen for item in ranked[index].items()}
    for index in range(len(chosen), len(ranked)):
        new = ranked[index].items() - seen
        if len(chosen) < most and new:
            chosen.append(index)
            seen |= new
    rest = (index for index in range(len(ranked)) if index not in chosen)
    chosen += [index for index, _ in zip(rest, range(most - len(chosen)), strict=False)]
    return [ranked[index] for index in sorted(chosen)]


def _order(config: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(config.values())


def is_legal(program: Program, kernel: str, config: Mapping[str, int], gpu: Gpu) -> bool:
    """Whether a package accepts a configuration of a kernel or a schedule, and it is expected to fit a device.

    The cost model's default counts as legal everywhere.
    """
    if check_of(program)(kernel, config):
        return False
    found = next((each for each in program.kernels if each.name == kernel), None)
    if found is None or dict(config) == program.defaults[gpu.target][kernel].mapping():
        return True
    return space.fits(found, program.sizes_on(gpu.target), gpu)(dict(config))
