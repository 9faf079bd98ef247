"""Interleaved measurement: contenders take turns, round after round, so a warm GPU slows all of them equally.

A contender's time is that of training, where the host prepares launches while the GPU still works on earlier ones. A
short run therefore directly follows an untimed run of the same passes. Where the host is the slower one, two runs in a
row still take the host's time.
"""

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
"""The passes of a contender: its call, and the gradients of what the call returns."""
Times = dict[str, float]
"""Milliseconds by pass."""

WARM_UP = 2
REPEATS = (3, 20)
"""Minimum and maximum of timed rounds; within these limits, as many as the seconds allow."""
SLOW_SECONDS = 8.0
"""If a contender's forward and backward take longer than this, it is not run again: its warm-up is its one sample."""
LED_BELOW_MS = 50.0
"""If all passes together take less than this, each timed run directly follows an untimed one.

After a wait, the host's time until the first kernels run counts too: up to 0.6 ms of a forward and its backward on an
H200. Of 50 ms this is about 1%, for which longer passes do not run twice.
"""
GRAPH_BELOW_MS = 0.05
"""Faster passes are timed as replays of a CUDA graph, because launching them takes as long as running them."""
REPLAYS = 10
"""Replays of a graph in a row, timed together: one replay is near the resolution of CUDA events."""


@dataclass(frozen=True)
class Timing:
    """One pass of one contender: milliseconds, and memory in addition to its inputs.

    `low_ms` and `high_ms` are the first and third quartile. `peak_bytes` is the peak of memory in use during this pass
    and the passes before it, minus what was in use before the forward. It includes output, saved tensors and gradients.
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
    """The result of one contender: a timing per pass, or the first line of the error instead.

    `refusal` says why it was not tried at all. It is empty if it was tried.
    """

    contender: str
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    note: str = ""
    refusal: str = ""

    @property
    def problem(self) -> str:
        """Why a pass has no timing; empty if all passes have one."""
        return self.refusal or "; ".join(dict.fromkeys(self.errors.values()))


class DeviceLost(RuntimeError):
    """A contender left the device unusable, for example by an illegal access. This process can measure no more.

    `measurements` are the results so far, including the culprit's errors.
    """

    def __init__(self, contender: str, reason: str, measurements: Sequence[Measurement]) -> None:
        super().__init__(f"{contender}: {reason}")
        self.contender, self.measurements = contender, list(measurements)


class Clock:
    """What measuring needs from the current CUDA device: events, and torch's allocator."""

    def mark(self) -> Any:
        """A point in the device's stream of work."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, marks: Sequence[Any]) -> list[float]:
        """The times between successive marks. Waits for the last one."""
        marks[-1].synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(marks)]

    def allocated_bytes(self) -> int:
        """Memory in use now."""
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Peak of memory in use since `reset_peak`."""
        return torch.cuda.max_memory_allocated()

    def recover(self) -> None:
        """Wait for the device and free unused memory. Raises RuntimeError if the device is lost."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Graphs:
    """CUDA graphs of the forward and, if there is a backward, of forward and backward together."""

    forward: torch.cuda.CUDAGraph
    both: torch.cuda.CUDAGraph | None

    @classmethod
    def capture(cls, prepared: Prepared, backward: bool) -> Graphs:
        """Capture a contender's passes.

        Raises:
            RuntimeError: the contender does something that cannot be captured, such as waiting for the GPU.
        """

        def forward() -> None:
            with torch.set_grad_enabled(backward):
                prepared.call()

        def both() -> None:
            torch.autograd.grad(prepared.call(), prepared.leaves, prepared.do, allow_unused=True)

        return cls(captured(forward), captured(both) if backward else None)

    def milliseconds(self, clock: Clock) -> list[float]:
        """Milliseconds of each pass. The backward's are those of both passes minus the forward's."""
        marks = [clock.mark()]
        for graph in filter(None, (self.forward, self.both)):
            for _ in range(REPLAYS):
                graph.replay()
            marks.append(clock.mark())
        found = [ms / REPLAYS for ms in clock.milliseconds(marks)]
        return found if self.both is None else [found[0], found[1] - found[0]]


def captured(action: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of an action, which is first run once."""
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
    """A contender during measurement; `samples` are milliseconds by pass, `peaks` the peak memory of each pass.

    `led` says that each timed run directly follows an untimed one.
    """

    contender: Contender
    passes: tuple[str, ...]
    refusal: str = ""
    prepared: Prepared | None = None
    graphs: Graphs | None = None
    led: bool = False
    peaks: dict[str, int] = field(default_factory=dict)
    samples: list[Times] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of the last timed run, all passes together."""
        assert self.prepared is not None
        return sum(self.samples[-1].values()) * self.prepared.share / 1000

    @property
    def turn_seconds(self) -> float:
        """Seconds of a turn: of the timed run, and of the untimed one before it if there is one."""
        return self.seconds * (2 if self.led else 1)

    def warm_up(self, spec: Spec, inputs: Inputs, clock: Clock, graph_below_ms: float) -> None:
        """Prepare and run the contender; the last run is its first sample. It decides how the contender is timed."""
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
        self.led = self.graphs is None and self.seconds < LED_BELOW_MS / 1000
        clock.recover()

    def sample(self, clock: Clock) -> None:
        """Time one call and, if there are two passes, one backward."""
        assert self.prepared is not None
        if self.graphs is not None:
            found = self.graphs.milliseconds(clock)
        else:
            with self.prepared.within():
                found = self._launched(self.prepared, clock)
        self.samples.append({name: ms / self.prepared.share for name, ms in zip(self.passes, found, strict=True)})

    def _launched(self, prepared: Prepared, clock: Clock) -> list[float]:
        """Milliseconds of each pass."""
        if self.led:
            self._run(prepared, clock)
        # Nothing waits from here to the first pass, and nothing of the untimed run is alive.
        before = clock.allocated_bytes()
        clock.reset_peak()
        marks = [clock.mark()]

        def end(name: str) -> None:
            marks.append(clock.mark())
            self.peaks[name] = max(self.peaks.get(name, 0), clock.peak_bytes() - before)

        self._run(prepared, clock, end)
        return clock.milliseconds(marks)

    def _run(self, prepared: Prepared, clock: Clock, end: Callable[[str], None] = lambda name: None) -> None:
        """Run the passes and call `end` after each. An error in the backward disables only the backward."""
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

    def result(self) -> Measurement:
        """The result so far."""
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
    """Time contenders in turn on the same inputs: first a warm-up of each, then rounds of all.

    There are at least 3 and at most 20 rounds, as many as `seconds` allow. A contender that refuses the shapes is not
    tried. One that raises is left out of further rounds and keeps its error. Each backward follows its own forward, as
    in training. If `passes` has only one pass, nothing is kept for a backward. Untimed runs before timed ones count
    towards `seconds`.

    Args:
        contenders: what is timed.
        spec, inputs: what the contenders are prepared for.
        passes: the name of the call's pass and, to time gradients, that of the backward.
        seconds: time for the rounds.
        clock: a clock; if None, that of the current CUDA device.
        announce: called with a contender's name each time before anything of it runs.
        graph_below_ms: passes faster than this are timed as replays of a CUDA graph.
        earlier: rounds of the same race before an interruption, milliseconds by pass per contender; they count.
        hear: called with each round's times when it ends, in the same form.

    Raises:
        DeviceLost: the device is unusable after a contender's error.
    """
    clock = clock or Clock()
    tokens = inputs.q.shape[1]
    refusals = {each.name: each.missing() or each.refuses(spec, tokens) for each in contenders}
    runners = [_Runner(each, () if refusals[each.name] else tuple(passes), refusals[each.name]) for each in contenders]

    def guarded(runner: _Runner, action: Callable[[], None]) -> None:
        """Run an action of a contender. An error ends its race; the others go on unless the device is lost."""
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
    round_seconds = sum(runner.turn_seconds for runner in timed)
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
    """An error as one line: its type and the first line of its message."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0]}"[:limit] if said else type(error).__name__


def faults(rows: Iterable[Row]) -> list[str]:
    """What is wrong with an operator, from the rows of its verification; empty if nothing is."""
    return [f"{row.quantity} {row.error:.3g} of {row.bound:.3g} {row.problem}".strip() for row in rows if not row.ok]
