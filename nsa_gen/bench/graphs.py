"""Passes so quick that launching them takes as long as running them, captured and replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nsa_gen.bench.contenders import Prepared

REPLAYS = 10
"""Replays in a row, timed as one: a single one is near the resolution of CUDA events."""


@dataclass(frozen=True)
class Graphs:
    """CUDA graphs of the forward, and of the forward and backward together where there is a backward."""

    forward: torch.cuda.CUDAGraph
    both: torch.cuda.CUDAGraph | None

    @classmethod
    def capture(cls, prepared: Prepared, backward: bool) -> Graphs:
        """Capture a contender's passes.

        Raises:
            RuntimeError: it does something that cannot be captured, such as waiting for the GPU.
        """

        def forward() -> None:
            with torch.set_grad_enabled(backward):
                prepared.call()

        def both() -> None:
            torch.autograd.grad(prepared.call(), prepared.leaves, prepared.do, allow_unused=True)

        return cls(captured(forward), captured(both) if backward else None)

    def milliseconds(self, clock: Any) -> dict[str, float]:
        """Milliseconds of each pass; the backward is what the two take beyond the forward."""
        marks = [clock.mark()]
        for graph in filter(None, (self.forward, self.both)):
            for _ in range(REPLAYS):
                graph.replay()
            marks.append(clock.mark())
        found = [ms / REPLAYS for ms in clock.milliseconds(marks)]
        return {"forward": found[0]} if self.both is None else {"forward": found[0], "backward": found[1] - found[0]}


def captured(action: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of an action, which is run once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph
