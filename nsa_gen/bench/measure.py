"""Interleaved measurement: every contender in turn, round after round, so that a warm GPU slows all of them alike."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from nsa_gen.bench.contenders import Contender, Prepared
from nsa_gen.bench.graphs import Graphs
from nsa_gen.verification.inputs import Inputs

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")

WARM_UP = 2
REPEATS = (3, 20)
"""Fewest and most timed rounds; in between as many as the seconds allow."""
SLOW_SECONDS = 8.0
"""A contender whose forward and backward take longer than this is not asked again: its warm-up is its one sample."""
GRAPH_BELOW_MS = 0.05
"""Passes quicker than this are timed as replays of a CUDA graph: launching them takes as long as running them."""


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
    least_ms: float
    most_ms: float
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


class Clock(Protocol):
    """What measuring needs of a device. `CudaClock` is the real one."""

    def mark(self) -> Any:
        """A point in the device's stream of work."""
        ...

    def milliseconds(self, marks: Sequence[Any]) -> list[float]:
        """The times between successive marks; waits for the last."""
        ...

    def allocated_bytes(self) -> int:
        """Memory in use now."""
        ...

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        ...

    def peak_bytes(self) -> int:
        """Most memory in use since `reset_peak`."""
        ...

    def recover(self) -> None:
        """Wait for the device and free what nobody holds. Raises RuntimeError if the device is lost."""
        ...


class CudaClock:
    """CUDA events and torch's allocator, on the current device."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        marks[-1].synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(marks)]

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def recover(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@dataclass
class _Sample:
    """Milliseconds and peak memory of a forward and a backward; None for a pass that was not run."""

    ms: dict[str, float]
    peaks: dict[str, int]

    @property
    def seconds(self) -> float:
        return sum(self.ms.values()) / 1000


@dataclass
class _Runner:
    """A contender while it is measured."""

    contender: Contender
    passes: tuple[str, ...]
    refusal: str = ""
    prepared: Prepared | None = None
    graphs: Graphs | None = None
    peaks: dict[str, int] = field(default_factory=dict)
    samples: list[_Sample] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def latest(self) -> dict[str, float] | None:
        """Milliseconds of its last sample; None once it is out."""
        return self.samples[-1].ms if self.passes and self.samples else None

    def sample(self, clock: Clock) -> _Sample:
        """One forward and one backward. An error of the backward ends the backwards alone."""
        assert self.prepared is not None
        if self.graphs is not None:
            return _Sample(self.graphs.milliseconds(clock), self.peaks)
        with self.prepared.within():
            return self._launched(self.prepared, clock)

    def _launched(self, prepared: Prepared, clock: Clock) -> _Sample:
        before = clock.allocated_bytes()
        clock.reset_peak()
        marks = [clock.mark()]
        with torch.set_grad_enabled("backward" in self.passes):
            o = prepared.call()
        marks.append(clock.mark())
        peaks = {"forward": clock.peak_bytes() - before}
        if "backward" in self.passes:
            try:
                torch.autograd.grad(o, prepared.leaves, prepared.do, allow_unused=True)
                marks.append(clock.mark())
                peaks["backward"] = clock.peak_bytes() - before
            except Exception as error:
                self.errors["backward"] = first_line(error)
                self.passes = ("forward",)
                del o
                clock.recover()
        return _Sample(dict(zip(PASSES, clock.milliseconds(marks), strict=False)), peaks)

    def result(self) -> Measurement:
        timings = {
            name: _timing(
                [s.ms[name] for s in self.samples], max(s.peaks.get(name, 0) for s in self.samples), self.graphs
            )
            for name in self.passes
            if self.samples and name not in self.errors and all(name in s.ms for s in self.samples)
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
    earlier: Sequence[Sequence[dict[str, float] | None]] = (),
    hear: Callable[[list[dict[str, float] | None]], None] = lambda times: None,
) -> list[Measurement]:
    """Time contenders in turn on the same inputs: warm-up of each, then rounds of all.

    There are at most 20 and at least 3 rounds, as many as `seconds` allow. A contender that refuses the shapes is not
    tried; one that raises is left out of the rounds and keeps its error. `announce` is called with a contender's name
    each time before anything of it runs. A backward follows the forward it belongs to, as in training; with `passes`
    of "forward" alone nothing is kept for it.

    Args:
        contenders: what is timed.
        spec, inputs: what they are prepared for.
        passes: names of PASSES.
        seconds: time for the rounds.
        clock: the device's; a `CudaClock` if None.
        announce: hears of each contender before it runs.
        graph_below_ms: passes quicker than this are timed as replays of a CUDA graph.
        earlier: rounds of the same race that was interrupted, milliseconds by pass a contender, which count.
        hear: hears of each round's times as it ends, in the same form.

    Raises:
        DeviceLost: a contender's error outlived it.
    """
    clock = CudaClock() if clock is None else clock
    tokens = inputs.q.shape[1]
    refusals = {each.name: each.missing() or each.refuses(spec, tokens) for each in contenders}
    timed_passes = tuple(name for name in passes if name in PASSES)
    runners = [_Runner(each, () if refusals[each.name] else timed_passes, refusals[each.name]) for each in contenders]
    for runner in (runner for runner in runners if runner.passes):
        announce(runner.contender.name)
        _guarded(runner, runners, clock, partial(_warm_up, runner, spec, inputs, clock, graph_below_ms))
    timed = [runner for runner in runners if runner.passes and runner.samples[-1].seconds <= SLOW_SECONDS]
    for runner in (runner for runner in runners if runner.passes and runner not in timed):
        runner.notes.append("one sample after warm-up: it is slow")
    round_seconds = sum(runner.samples[-1].seconds for runner in timed)
    repeats = min(REPEATS[1], max(REPEATS[0], int(seconds / max(round_seconds, 1e-6))))
    for number, runner in enumerate(runners):
        if runner in timed:
            runner.samples = [_Sample(dict(ms), {}) for times in earlier if (ms := times[number]) is not None]
    for _ in range(repeats - len(earlier) if timed else 0):
        for runner in [runner for runner in timed if runner.passes]:
            announce(runner.contender.name)
            _guarded(runner, runners, clock, partial(_add_sample, runner, clock))
        hear([runner.latest if runner in timed else None for runner in runners])
    return [runner.result() for runner in runners]


def _add_sample(runner: _Runner, clock: Clock) -> None:
    runner.samples.append(runner.sample(clock))


def _warm_up(runner: _Runner, spec: Spec, inputs: Inputs, clock: Clock, graph_below_ms: float) -> None:
    runner.prepared = runner.contender.prepare(spec, inputs)
    runner.notes.append(runner.prepared.note)
    for _ in range(WARM_UP):
        runner.samples = [runner.sample(clock)]
    runner.peaks = runner.samples[-1].peaks
    if min(runner.samples[-1].ms.values()) < graph_below_ms:
        try:
            with runner.prepared.within():
                runner.graphs = Graphs.capture(runner.prepared, "backward" in runner.passes)
        except Exception as error:
            clock.recover()
            runner.notes.append(f"timed without a CUDA graph: {first_line(error)}")
    clock.recover()


def _guarded(runner: _Runner, runners: Sequence[_Runner], clock: Clock, action: Callable[[], None]) -> None:
    """Do something with a contender; an error takes it out of the race, and the race on unless the device is lost."""
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
        raise DeviceLost(runner.contender.name, first_line(error), [each.result() for each in runners]) from error


def _timing(ms: Sequence[float], peak_bytes: int, graphs: Graphs | None) -> Timing:
    low, _, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (ms[0],) * 3
    return Timing(statistics.median(ms), low, high, min(ms), max(ms), len(ms), peak_bytes, graphs is not None)


def first_line(error: BaseException, limit: int = 200) -> str:
    """An error as one line: its type and the first line of what it says."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0]}"[:limit] if said else type(error).__name__
