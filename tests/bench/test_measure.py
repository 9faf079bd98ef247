"""Contenders in turn: what is timed, in which order, and what becomes of those that fail."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nsa_gen.bench import measure
from nsa_gen.bench.measure import DeviceLost, first_line, race
from tests.bench.fakes import FakeClock, FakeContender
from tests.machine import GPU

SPEC = SimpleNamespace()
INPUTS = SimpleNamespace(q=torch.zeros(1, 64, 1, 1))


class AheadClock(FakeClock):
    """A host that takes 0.1 ms for each of three launches of a pass, and a device that is done later."""

    def __init__(self) -> None:
        super().__init__()
        self.host = 0.0

    def mark(self) -> float:
        return max(self.host, self.now)

    def milliseconds(self, marks):
        self.host = self.mark()
        return super().milliseconds(marks)

    def spend(self, ms, memory=0):
        for _ in range(3):
            self.host += 0.1
            self.now = self.mark() + ms / 3


@pytest.fixture
def clock():
    return FakeClock()


def run(clock, *contenders, **options):
    found = race(contenders, SPEC, INPUTS, clock=clock, **options)
    assert [one.contender for one in found] == [each.name for each in contenders]
    return found


def test_the_median_and_the_quartiles_are_of_the_rounds_without_the_warm_up(clock):
    times = [50.0, 40.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    slow_rounds = FakeContender("slow", clock, forward=times, backward=[10.0])
    (one,) = run(clock, slow_rounds, seconds=0.25)  # 40 + 10 ms a round by the last warm-up: five of them
    timing = one.timings["forward"]
    assert (timing.repeats, timing.median_ms) == (5, 3.0)
    assert (timing.low_ms, timing.high_ms) == (2.0, 4.0)
    assert one.timings["backward"].median_ms == 10.0


def test_the_seconds_bound_the_rounds_from_above_and_there_are_never_fewer_than_three(clock):
    hurried = run(clock, FakeContender("a", clock, [900.0], [900.0]), seconds=0.1)[0]
    assert hurried.timings["forward"].repeats == 3
    easy = run(clock, FakeContender("a", clock), seconds=1000)[0]
    assert easy.timings["forward"].repeats == 20


def medians(one):
    return {name: pytest.approx(timing.median_ms) for name, timing in one.timings.items()}


def test_a_timed_run_directly_follows_an_untimed_one(clock):
    run(clock, FakeContender("a", clock), seconds=0)
    timed = ["mark", "forward", "mark", "backward", "mark", "wait"]
    assert clock.log == [*timed, *timed, "wait", *(["forward", "backward", *timed] * 3)]


def test_a_slow_run_follows_no_untimed_one(clock):
    slow = FakeContender("a", clock, [measure.LED_BELOW_MS - 2.0])
    run(clock, slow, seconds=0)
    assert slow.log == ["forward", "backward"] * (measure.WARM_UP + 3)
    assert clock.log.count("wait") == measure.WARM_UP + 1 + 3


def test_the_launches_of_a_short_run_are_hidden_behind_the_run_before_it():
    one = run(clock := AheadClock(), FakeContender("a", clock, [3.0], [6.0]))[0]
    assert medians(one) == {"forward": 3.0, "backward": 6.0}
    alone = run(clock := AheadClock(), FakeContender("a", clock, [3.0]), passes=("forward",))[0]
    assert medians(alone) == {"forward": 3.0}
    slow = run(clock := AheadClock(), FakeContender("a", clock, [30.0], [60.0]))[0]
    assert medians(slow) == {"forward": 30.1, "backward": 60.0}


def test_the_time_of_a_host_that_is_slower_than_the_device_counts():
    one = run(clock := AheadClock(), FakeContender("a", clock, [0.15], [0.15]), graph_below_ms=0)[0]
    assert medians(one) == {"forward": 0.3, "backward": 0.3}


def test_the_seconds_are_for_the_untimed_runs_too(clock):
    short = run(clock, FakeContender("a", clock, [8.0], [12.0]), seconds=0.2)[0]
    assert short.timings["forward"].repeats == 5
    slow = run(clock, FakeContender("a", clock, [20.0], [30.0]), seconds=0.2)[0]
    assert slow.timings["forward"].repeats == 4


def test_the_seconds_are_for_whole_calls_whose_time_is_shared(clock):
    class Layers(FakeContender):
        def prepare(self, spec, inputs):
            return replace(super().prepare(spec, inputs), share=4)

    one = run(clock, Layers("a", clock, [8.0], [12.0]), seconds=0.2)[0]
    assert one.timings["forward"].repeats == 5 and one.timings["forward"].median_ms == 2.0


def test_an_untimed_run_that_cannot_go_back_leaves_the_forward(clock):
    half = FakeContender("half", clock, backward=[2.0, 2.0, NotImplementedError("no more")])
    one = run(clock, half)[0]
    assert set(one.timings) == {"forward"} and one.timings["forward"].median_ms == 1.0
    assert one.errors == {"backward": "NotImplementedError: no more"}
    assert half.log.count("backward") == 3


def test_contenders_take_turns_and_are_announced_each_time(clock):
    said = []
    run(clock, FakeContender("a", clock), FakeContender("b", clock), seconds=0, announce=said.append)
    assert said == ["a", "b"] + ["a", "b"] * 3


def test_memory_is_counted_beside_what_was_in_use_before(clock):
    one = run(clock, FakeContender("a", clock, memory=500))[0]
    assert {name: timing.peak_bytes for name, timing in one.timings.items()} == {"forward": 500, "backward": 500}
    assert one.note == "note of a"


def test_memory_is_that_of_the_timed_run_alone(clock):
    class Keeping(FakeContender):
        """Its output takes memory for as long as it is alive, most in the untimed runs."""

        def prepare(self, spec, inputs):
            prepared, calls = super().prepare(spec, inputs), []

            def call():
                calls.append(len(calls))
                size = 900 if len(calls) > measure.WARM_UP and len(calls) % 2 else 500
                clock.in_use += size
                o = prepared.call()
                weakref.finalize(o, free, size)
                return o

            return replace(prepared, call=call)

    def free(size):
        clock.in_use -= size

    for passes in (measure.PASSES, measure.PASSES[:1]):
        one = run(clock, Keeping("a", clock), passes=passes)[0]
        assert {name: timing.peak_bytes for name, timing in one.timings.items()} == dict.fromkeys(passes, 510)
    assert clock.in_use == 1000


def test_one_that_raises_keeps_the_first_line_of_its_error_and_the_others_their_times(clock):
    broken = FakeContender("broken", clock, forward=[torch.OutOfMemoryError("out of memory\nTried to allocate")])
    bad, good = run(clock, broken, FakeContender("good", clock))
    assert bad.timings == {}
    assert bad.errors == {
        "forward": "OutOfMemoryError: out of memory",
        "backward": "OutOfMemoryError: out of memory",
    }
    assert bad.problem == "OutOfMemoryError: out of memory"
    assert set(good.timings) == {"forward", "backward"} and good.problem == ""


def test_one_that_raises_in_the_rounds_has_no_times_of_the_rounds_before(clock):
    flaky = FakeContender("flaky", clock, forward=[1.0, 1.0, 1.0, ValueError("now and then")])
    one = run(clock, flaky)[0]
    assert one.timings == {} and one.problem == "ValueError: now and then"


def test_one_whose_backward_raises_keeps_its_forward(clock):
    half = FakeContender("half", clock, backward=[NotImplementedError("no backward")])
    one = run(clock, half)[0]
    assert set(one.timings) == {"forward"} and one.timings["forward"].median_ms == 1.0
    assert one.errors == {"backward": "NotImplementedError: no backward"}
    assert half.log.count("backward") == 1


def test_a_slow_one_is_asked_no_more_than_twice_and_holds_nobody_up(clock):
    slow = FakeContender("slow", clock, forward=[measure.SLOW_SECONDS * 1000 + 1])
    late, quick = run(clock, slow, FakeContender("quick", clock))
    assert late.timings["forward"].repeats == 1 and "slow" in late.note
    assert slow.log.count("forward") == measure.WARM_UP
    assert quick.timings["forward"].repeats == 20


def test_one_that_is_missing_or_refuses_is_not_prepared(clock):
    class Unpreparable(FakeContender):
        def prepare(self, spec, inputs):
            raise AssertionError("prepared all the same")

    absent, unfit = run(
        clock, Unpreparable("absent", clock, missing="not installed"), Unpreparable("unfit", clock, refusal="groups")
    )
    assert (absent.problem, unfit.problem) == ("not installed", "groups")
    assert absent.timings == unfit.timings == {}


def test_with_the_forward_alone_no_graph_is_kept_for_a_backward(clock):
    kept = []

    class Watching(FakeContender):
        def prepare(self, spec, inputs):
            prepared = super().prepare(spec, inputs)

            def call():
                o = prepared.call()
                kept.append(o.requires_grad)
                return o

            return measure.Prepared(call, prepared.leaves, prepared.do)

    one = run(clock, Watching("a", clock), passes=("forward",))[0]
    assert set(one.timings) == {"forward"} and not any(kept)


def test_a_device_that_an_error_made_unusable_ends_the_race_and_names_the_culprit(clock):
    class Fatal(FakeContender):
        def prepare(self, spec, inputs):
            clock.lost = True
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(DeviceLost, match="fatal: RuntimeError: CUDA error") as caught:
        run(clock, FakeContender("good", clock), Fatal("fatal", clock))
    assert caught.value.contender == "fatal"
    (found,) = [one for one in caught.value.measurements if one.contender == "fatal"]
    assert found.problem == "RuntimeError: an illegal memory access was encountered"


def test_a_pass_below_fifty_microseconds_is_timed_eagerly_where_it_cannot_be_captured(clock):
    if GPU:
        pytest.skip("a GPU captures it")
    one = run(clock, FakeContender("tiny", clock, forward=[0.01]))[0]
    assert "without a CUDA graph" in one.note and not one.timings["forward"].graph


@pytest.mark.gpu
def test_a_pass_below_fifty_microseconds_is_timed_as_a_graph():
    class Tiny:
        name, dense = "tiny", False

        def missing(self):
            return ""

        def refuses(self, spec, tokens):
            return ""

        def prepare(self, spec, inputs):
            x = torch.ones(64, device="cuda", requires_grad=True)
            return measure.Prepared(lambda: x * 2, (x,), torch.ones(64, device="cuda"))

    one = race([Tiny()], SPEC, INPUTS)[0]
    assert one.problem == "" and one.timings["forward"].graph
    assert 0 < one.timings["forward"].median_ms < 0.05


def test_an_error_without_words_is_its_type():
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("\n  first \n second")) == "ValueError: first"
    assert len(first_line(ValueError("x" * 1000))) == 200
