"""Contenders in turn: what is timed, in which order, and what becomes of those that fail."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nsa_gen.bench import measure
from nsa_gen.bench.measure import DeviceLost, first_line, race
from tests.bench.fakes import FakeClock, FakeContender
from tests.machine import GPU

SPEC = SimpleNamespace()
INPUTS = SimpleNamespace(q=torch.zeros(1, 64, 1, 1))


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


def test_contenders_take_turns_and_are_announced_each_time(clock):
    said = []
    run(clock, FakeContender("a", clock), FakeContender("b", clock), seconds=0, announce=said.append)
    assert said == ["a", "b"] + ["a", "b"] * 3


def test_memory_is_counted_beside_what_was_in_use_before(clock):
    one = run(clock, FakeContender("a", clock, memory=500))[0]
    assert {name: timing.peak_bytes for name, timing in one.timings.items()} == {"forward": 500, "backward": 500}
    assert one.note == "note of a"


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
