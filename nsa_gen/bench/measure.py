"""Interleaved measurement: every contender in turn, round after round, so that a warm GPU slows all of them alike."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch

from nsa_gen.bench.contenders import Contender, Prepared
from nsa_gen.verification.reference.inputs import Inputs

if TYPE_CHECKING:
    from nsa_gen.spec import Spec
    from nsa_gen.verification.report import Row

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")
"""The passes of a contender: its call, and the gradients of what the call returned."""
Times = dict[str, float]
"""Milliseconds by pass."""

WARM_UP = 2
REPEATS = (3, 20)
"""Fewest and most timed rounds; in between as many as the seconds allow."""
SLOW_SECONDS = 8.0
"""A contender whose forward and backward take longer than this is not asked again: its warm-up is its one sample."""
GRAPH_BELOW_MS = 0.05
"""Passes quicker than this are timed as replays of a CUDA graph: launching them takes as long as running them."""
REPLAYS = 10
"""Replays of a graph in a row, timed as one: a single one is near the resolution of CUDA events."""


@dataclass(frozen=True)
class Timing:
    """One pass of one contender: milliseconds, and memory beside its inputs.

    `low_ms` and `high_ms` are the first and third quartile. `peak_bytes` is the most memory in use during the pass and
    the passes before it, beyond what was in use before the forward: output, saved tensors and gradients are in it.
    `graph` says that a CUDA graph was timed.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    peak_bytes: int
    graph: bool = False


@dataclass(frozen=True)
class Measurement:
    """What became of one contender: a timing a pass, or the first line of the error that it met there instead.

    `refusal` says why it was not tried at all, and is empty where it was.
    """

    contender: str
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    note: str = ""
    refusal: str = ""

    @property
    def problem(self) -> str:
        """Why there is not a timing of every pass; empty if there is."""
        return self.refusal or "; ".join(dict.fromkeys(self.errors.values()))


class DeviceLost(RuntimeError):
    """A contender left the device unusable (an illegal access, say): nothing more can be measured in this process.

    `measurements` are what is known by then, the culprit's errors among them.
    """

    def __init__(self, contender: str, reason: str, measurements: Sequence[Measurement]) -> None:
        super().__init__(f"{contender}: {reason}")
        self.contender, self.measurements = contender, list(measurements)


class Clock:
    """What measuring needs of the current CUDA device: events, and torch's allocator."""

    def mark(self) -> Any:
        """A point in the device's stream of work."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, marks: Sequence[Any]) -> list[float]:
        """The times between successive marks; waits for the last."""
        marks[-1].synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(marks)]

    def allocated_bytes(self) -> int:
        """Memory in use now."""
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Most memory in use since `reset_peak`."""
        return torch.cuda.max_memory_allocated()

    def recover(self) -> None:
        """Wait for the device and free what nobody holds. Raises RuntimeError if the device is lost."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


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

    def milliseconds(self, clock: Clock) -> list[float]:
        """Milliseconds of each pass; the backward is what the two take beyond the forward."""
        marks = [clock.mark()]
        for graph in filter(None, (self.forward, self.both)):
            for _ in range(REPLAYS):
                graph.replay()
            marks.append(clock.mark())
        found = [ms / REPLAYS for ms in clock.milliseconds(marks)]
        return found if self.both is None else [found[0], found[1] - found[0]]


def captured(action: Callable[[], Any]) -> torch.cuda.CUDAGraph:
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


@dataclass
class _Runner:
    """A contender while it is measured; `samples` are milliseconds by pass, `peaks` the most memory in any of them."""

    contender: Contender
    passes: tuple[str, ...]
    refusal: str = ""
    prepared: Prepared | None = None
    graphs: Graphs | None = None
    peaks: dict[str, int] = field(default_factory=dict)
    samples: list[Times] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of the last sample, all passes together."""
        return sum(self.samples[-1].values()) / 1000

    def warm_up(self, spec: Spec, inputs: Inputs, clock: Clock, graph_below_ms: float) -> None:
        """Prepare and run it, and capture its graphs if it is quick; the last run is its first sample."""
        self.prepared = self.contender.prepare(spec, inputs)
        self.notes.append(self.prepared.note)
        for _ in range(WARM_UP):
            self.samples, self.peaks = [], {}
            self.sample(clock)
        if min(self.samples[-1].values()) < graph_below_ms:
            try:
                with self.prepared.within():
                    self.graphs = Graphs.capture(self.prepared, len(self.passes) == 2)
            except Exception as error:
                clock.recover()
                self.notes.append(f"timed without a CUDA graph: {first_line(error)}")
        clock.recover()

    def sample(self, clock: Clock) -> None:
        """One call and, where there are two passes, one backward."""
        assert self.prepared is not None
        if self.graphs is not None:
            found = self.graphs.milliseconds(clock)
        else:
            with self.prepared.within():
                found = self._launched(self.prepared, clock)
        self.samples.append({name: ms / self.prepared.share for name, ms in zip(self.passes, found, strict=True)})

    def _launched(self, prepared: Prepared, clock: Clock) -> list[float]:
        """Milliseconds of each pass. An error of the backward ends the backwards alone."""
        before = clock.allocated_bytes()
        clock.reset_peak()
        marks = [clock.mark()]

        def end(name: str) -> None:
            marks.append(clock.mark())
            self.peaks[name] = max(self.peaks.get(name, 0), clock.peak_bytes() - before)

        first, *second = self.passes
        with torch.set_grad_enabled(bool(second)):
            o = prepared.call()
        end(first)
        if second:
            try:
                torch.autograd.grad(o, prepared.leaves, prepared.do, allow_unused=True)
                end(*second)
            except Exception as error:
                self.errors |= dict.fromkeys(second, first_line(error))
                self.passes = (first,)
                del o
                clock.recover()
        return clock.milliseconds(marks)

    def result(self) -> Measurement:
        """What became of it."""
        timings = {
            name: _timing([sample[name] for sample in self.samples], self.peaks.get(name, 0), self.graphs is not None)
            for name in self.passes
            if self.samples and name not in self.errors and all(name in sample for sample in self.samples)
        }
        notes = "; ".join(filter(None, self.notes))
        return Measurement(self.contender.name, timings, dict(self.errors), notes, self.refusal)


def race(
    contenders: Sequence[Contender],
    spec: Spec,
    inputs: Inputs,
    *,
    passes: Sequence[str] = PASSES,
    seconds: float = 4.0,
    clock: Clock | None = None,
    announce: Callable[[str], None] = lambda name: None,
    graph_below_ms: float = GRAPH_BELOW_MS,
    earlier: Sequence[Sequence[Times | None]] = (),
    hear: Callable[[list[Times | None]], None] = lambda times: None,
) -> list[Measurement]:
    """Time contenders in turn on the same inputs: warm-up of each, then rounds of all.

    There are at most 20 and at least 3 rounds, as many as `seconds` allow. A contender that refuses the shapes is not
    tried; one that raises is left out of the rounds and keeps its error. A backward follows the forward it belongs to,
    as in training; with one of `passes` alone nothing is kept for it.

    Args:
        contenders: what is timed.
        spec, inputs: what they are prepared for.
        passes: the name of the call's pass and, for gradients, that of the backward.
        seconds: time for the rounds.
        clock: the current CUDA device's if None.
        announce: hears each contender's name each time before anything of it runs.
        graph_below_ms: passes quicker than this are timed as replays of a CUDA graph.
        earlier: rounds of the same race that was interrupted, milliseconds by pass a contender, which count.
        hear: hears of each round's times as it ends, in the same form.

    Raises:
        DeviceLost: a contender's error outlived it.
    """
    clock = clock or Clock()
    tokens = inputs.q.shape[1]
    refusals = {each.name: each.missing() or each.refuses(spec, tokens) for each in contenders}
    runners = [_Runner(each, () if refusals[each.name] else tuple(passes), refusals[each.name]) for each in contenders]

    def guarded(runner: _Runner, action: Callable[[], None]) -> None:
        """Do something with a contender; an error takes it out of the race, which goes on unless the device is lost."""
        announce(runner.contender.name)
        try:
            action()
        except Exception as error:
            runner.errors |= dict.fromkeys(runner.passes, first_line(error))
            runner.passes, runner.prepared, runner.graphs, runner.samples = (), None, None, []
        else:
            return
        try:
            clock.recover()
        except RuntimeError as error:
            found = [each.result() for each in runners]
            raise DeviceLost(runner.contender.name, first_line(error), found) from error

    for runner in [runner for runner in runners if runner.passes]:
        guarded(runner, partial(runner.warm_up, spec, inputs, clock, graph_below_ms))
    timed = [runner for runner in runners if runner.passes and runner.seconds <= SLOW_SECONDS]
    for runner in (runner for runner in runners if runner.passes and runner not in timed):
        runner.notes.append("one sample after warm-up: it is slow")
    round_seconds = sum(runner.seconds for runner in timed)
    repeats = min(REPEATS[1], max(REPEATS[0], int(seconds / max(round_seconds, 1e-6))))
    for number, runner in enumerate(runners):
        if runner in timed:
            runner.samples = [dict(ms) for times in earlier if (ms := times[number]) is not None]
    for _ in range(repeats - len(earlier) if timed else 0):
        for runner in [runner for runner in timed if runner.passes]:
            guarded(runner, partial(runner.sample, clock))
        hear([runner.samples[-1] if runner in timed and runner.passes else None for runner in runners])
    return [runner.result() for runner in runners]


def _timing(ms: Sequence[float], peak_bytes: int, graph: bool) -> Timing:
    low, _, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (ms[0],) * 3
    return Timing(statistics.median(ms), low, high, len(ms), peak_bytes, graph)


def first_line(error: BaseException, limit: int = 200) -> str:
    """An error as one line: its type and the first line of what it says."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0]}"[:limit] if said else type(error).__name__


def faults(rows: Iterable[Row]) -> list[str]:
    """What is wrong with an operator, from the rows of its verification; empty if nothing."""
    return [f"{row.quantity} {row.error:.3g} of {row.bound:.3g} {row.problem}".strip() for row in rows if not row.ok]
