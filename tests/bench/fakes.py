"""Contenders and a clock that need no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from nsa_gen.bench.contenders import Prepared
from nsa_gen.bench.records import CheckRow, KernelRow, OverlapRow, Results, Row


class FakeClock:
    """A clock that only contenders move, and an allocator that holds what it is told.

    `log` has what happened in turn: marks, waits and passes.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.in_use = 1000
        self.peak = 0
        self.lost = False
        self.recoveries = 0
        self.log: list[str] = []

    def mark(self) -> float:
        self.log.append("mark")
        return self.now

    def milliseconds(self, marks: Sequence[float]) -> list[float]:
        self.log.append("wait")
        return [end - start for start, end in pairwise(marks)]

    def allocated_bytes(self) -> int:
        return self.in_use

    def reset_peak(self) -> None:
        self.peak = self.in_use

    def peak_bytes(self) -> int:
        return self.peak

    def recover(self) -> None:
        self.recoveries += 1
        self.log.append("wait")
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    def spend(self, ms: float, memory: int = 0) -> None:
        self.now += ms
        self.peak = max(self.peak, self.in_use + memory)


class _Timed(torch.autograd.Function):
    """The identity, whose backward does something."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, action: Callable[[], None]) -> torch.Tensor:
        ctx.action = action
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.action()
        return gradients[0], None


class FakeContender:
    """Takes the times given one after the other, the last for ever; an exception in their place is raised."""

    def __init__(
        self,
        name: str,
        clock: FakeClock,
        forward: Sequence[float | Exception] = (1.0,),
        backward: Sequence[float | Exception] = (2.0,),
        *,
        dense: bool = False,
        missing: str = "",
        refusal: str = "",
        memory: int = 10,
    ) -> None:
        self.name, self.dense = name, dense
        self.log: list[str] = []
        self._clock, self._forward, self._backward = clock, list(forward), list(backward)
        self._missing, self._refusal, self._memory = missing, refusal, memory

    def missing(self) -> str:
        return self._missing

    def refuses(self, spec: Any, tokens: int) -> str:
        return self._refusal

    def prepare(self, spec: Any, inputs: Any) -> Prepared:
        leaf = torch.ones(2, requires_grad=True)

        def call() -> torch.Tensor:
            self._spend(self._forward, "forward")
            return _Timed.apply(leaf, lambda: self._spend(self._backward, "backward"))

        return Prepared(call, (leaf,), torch.ones(2), note=f"note of {self.name}" if self._memory > 10 else "")

    def _spend(self, times: list[float | Exception], what: str) -> None:
        self.log.append(what)
        self._clock.log.append(what)
        next_one = times.pop(0) if len(times) > 1 else times[0]
        if isinstance(next_one, Exception):
            raise next_one
        self._clock.spend(next_one, self._memory)


def row(contender: str, direction: str, ms: float | None, **changes: Any) -> Row:
    """A row of workload A at 8192 tokens, unless changed."""
    fields: dict[str, Any] = {
        "workload": "A",
        "part": "A",
        "inputs": "independent",
        "tokens": 8192,
        "heads": (64, 4),
        "head_dim": (128, 128),
        "dtype": "bfloat16",
        "dense": contender in ("cudnn", "fa2", "fa4"),
    }
    timed = {} if ms is None else {"low_ms": 0.99 * ms, "high_ms": 1.01 * ms, "repeats": 5, "peak_bytes": 2**30}
    return Row(**{**fields, "contender": contender, "direction": direction, "median_ms": ms, **timed, **changes})


def pair(contender: str, forward: float | None, backward: float | None, **changes: Any) -> list[Row]:
    """A row a pass."""
    return [row(contender, "forward", forward, **changes), row(contender, "backward", backward, **changes)]


def sample_results() -> Results:
    """A benchmark with every part in it: two lengths, a group sweep, a break-even search, failures."""
    rows = []
    for tokens, scale in ((8192, 1.0), (65536, 40.0)):
        rows += pair("nsa_gen", 2 * scale**0.8, 6 * scale**0.8, tokens=tokens, flops=1e12, bytes=1e9, floor_ms=1.0)
        rows += pair("cudnn", 1.8 * scale, 5.6 * scale, tokens=tokens)
        rows += pair("fa4", 1.6 * scale, None, tokens=tokens, error="NotImplementedError: no backward here")
        rows += pair("fla", 4.6 * scale, 21 * scale, tokens=tokens, note="another setting")
        refusal = "flash-sparse is not installed: no module fsa"
        rows += pair("fsa", None, None, tokens=tokens, refusal=refusal)
    for group in (1, 4, 16):
        place = {"workload": f"G{group}", "part": "groups", "tokens": 32768, "heads": (4 * group, 4)}
        rows += pair("nsa_gen", 10.0, 20.0, **place) + pair("cudnn", 4.0 * group, 12.0 * group, **place)
    for tokens, dense in ((2048, 0.5), (4096, 2.0), (8192, 8.0)):
        place = {"workload": "even16", "part": "breakeven", "tokens": tokens}
        rows += pair("nsa_gen", tokens / 4096, 2 * tokens / 4096, **place) + pair("cudnn", dense, dense, **place)
    kernels = (
        KernelRow(
            "A", "independent", 65536, "window_forward", "win", "forward", 4.0, 1, 2e12, 1e9, 2.0, "matrix units"
        ),
        KernelRow("A", "independent", 65536, "memset", "other", "forward", 0.1, 3, 0.0, 0.0, None, ""),
        KernelRow("A", "independent", 65536, "window_dq", "win", "backward", 8.0, 1, 4e12, 1e9, 4.0, "matrix units"),
    )
    return Results(
        {"gpu": "NVIDIA H100", "driver": "580", "torch": "2.11.0", "triton": "3.6.0", "commit": "a" * 40},
        {"seed": 3},
        tuple(rows),
        kernels,
        (OverlapRow("A", "independent", 65536, 0.21),),
        (CheckRow("A", 2048, "nsa_gen"), CheckRow("A", 2048, "fla", difference=0.31)),
    )
