"""What the measuring process does, on Triton's interpreter: the oracle first, and every candidate by its own tiles."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.machine import GPU

pytestmark = pytest.mark.skipif(GPU, reason="is for machines without a GPU")

from nsa_gen.bench import measure  # noqa: E402
from nsa_gen.rendering import generate  # noqa: E402
from nsa_gen.tuning import Bucket  # noqa: E402
from nsa_gen.tuning import engine as engine_module  # noqa: E402
from nsa_gen.tuning.engine import GpuEngine  # noqa: E402
from nsa_gen.workers import Lost  # noqa: E402
from tests.bench.fakes import FakeClock  # noqa: E402
from tests.gpu.tuner_faults import doctored  # noqa: E402
from tests.support import small_spec  # noqa: E402

SPEC = small_spec("win", gate="none", window=20, dims=(16, 16))
OTHER = {"window_forward": {"QUERY_BLOCK": 16, "KEY_BLOCK": 32, "num_warps": 4, "num_stages": 1}}
BAD = {"window_forward": {"QUERY_BLOCK": 32, "KEY_BLOCK": 32, "num_warps": 4, "num_stages": 1}}
SMALL = Bucket(64)


class TickingClock(FakeClock):
    """A millisecond passes at every look."""

    def mark(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow, and its times are the clock's."""
    monkeypatch.setattr(measure, "WARM_UP", 1)
    monkeypatch.setattr(measure, "REPEATS", (1, 2))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return generate(SPEC, tmp_path / "sound")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks at a length that the interpreter can bear."""
    monkeypatch.setattr(engine_module, "check_tokens", lambda spec: 37)


def engine_of(package: Path, clock: FakeClock | None = None) -> GpuEngine:
    opening = {"package": str(package), "spec": SPEC.resolved_yaml(), "seed": 0}
    return GpuEngine(opening, torch.device("cpu"), clock or TickingClock())


@pytest.fixture
def faulty(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes an engine whose package goes wrong for BAD."""

    def build(fault: str, clock: FakeClock | None = None) -> GpuEngine:
        script = {"fault": fault, "config": BAD["window_forward"], "flag": str(tmp_path / "flag")}
        monkeypatch.setitem(os.environ, "NSA_GEN_FAULT", json.dumps(script))
        return engine_of(doctored(package, tmp_path / fault), clock)

    yield build


def test_candidates_are_held_against_the_oracle_with_gradients(package: Path, short: None) -> None:
    begun: list[int] = []
    engine = engine_of(package)
    assert engine.check([{}, OTHER], begun.append, bucket=vars(SMALL)) == [{}, {}]
    assert begun == [0, 1]
    packed = vars(Bucket(64, 1, True))
    assert engine.check([OTHER], begun.append, bucket=packed) == [{}]


def test_a_wrong_candidate_is_found_wrong_and_the_others_right(faulty: Any, short: None) -> None:
    good, bad = faulty("wrong").check([OTHER, BAD], lambda number: None, bucket=vars(SMALL))
    assert good == {} and bad["error"].startswith("wrong: o ")


def test_a_candidate_is_launched_with_its_own_tiles_and_they_end_with_it(package: Path, short: None) -> None:
    engine = engine_of(package)
    seen: list[tuple[int, int]] = []
    configs = engine._package.configs
    plain = configs.get

    def watched(kernel: str, device: torch.device, bucket: Any = None) -> dict[str, int]:
        config = plain(kernel, device, bucket)
        if kernel == "window_forward":
            seen.append((config["QUERY_BLOCK"], config["KEY_BLOCK"]))
        return config

    configs.get = watched
    answers = engine.race(
        [{}, OTHER], lambda n: None, bucket=vars(SMALL), inputs="correlated", passes=["forward"], seconds=0.01
    )
    turns = [(16, 16)] * 2 + [(16, 32)] * 2  # an untimed run, then a timed one
    assert set(seen) == set(turns) and seen[-4:] == turns, "in turn"
    for answer in answers:
        assert answer["error"] == "" and answer["times"]["forward"]["median"] == 1.0
        assert answer["times"]["forward"]["repeats"] >= 1


def test_a_backward_is_timed_under_the_same_tiles(package: Path) -> None:
    engine = engine_of(package)
    tiles = {"window_backward_dq": {"QUERY_BLOCK": 16, "KEY_BLOCK": 32, "num_warps": 4, "num_stages": 1}}
    (answer,) = engine.race(
        [tiles],
        lambda n: None,
        bucket=vars(SMALL),
        inputs="independent",
        passes=["forward", "backward"],
        seconds=0.01,
    )
    assert set(answer["times"]) == {"forward", "backward"}


def test_an_error_costs_its_candidate_and_a_lost_device_the_process(faulty: Any) -> None:
    request = {"bucket": vars(SMALL), "inputs": "independent", "passes": ["forward"], "seconds": 0.01}
    answers = faulty("out of memory").race([OTHER, BAD], lambda n: None, **request)
    assert answers[0]["error"] == "" and "memory" in answers[1]["error"].lower() and answers[1]["times"] == {}

    clock = TickingClock()
    begun: list[int] = []
    engine = faulty("out of memory", clock)
    clock.lost = True
    clock.recover = lambda: clock.__class__.recover(clock) if begun and begun[-1] == 1 else None
    with pytest.raises(Lost, match="illegal memory access"):
        engine.race([OTHER, BAD], begun.append, **request)
    assert begun[-1] == 1, "the culprit is named last"


def test_a_kernel_alone_is_the_call_that_launches_it_and_nothing_else(package: Path) -> None:
    engine = engine_of(package)
    launched: list[str] = []
    configs = engine._package.configs
    plain = configs.get

    def watched(kernel: str, device: torch.device, bucket: Any = None) -> dict[str, int]:
        launched.append(f"{kernel} {plain(kernel, device, bucket)['KEY_BLOCK']}" if "window" in kernel else kernel)
        return plain(kernel, device, bucket)

    configs.get = watched
    tiles = {"window_backward_dkdv": {"QUERY_BLOCK": 16, "KEY_BLOCK": 32, "num_warps": 4, "num_stages": 1}}
    request = {"bucket": vars(SMALL), "inputs": "independent", "seconds": 0.01, "kernel": "window_backward_dkdv"}
    rounds: list[Any] = []
    answers = engine.race([{}, tiles], lambda n: None, passes=["backward"], hear=rounds.append, **request)
    assert [each["times"].keys() for each in answers] == [{"backward"}] * 2
    assert rounds and all(set(times) == {"backward"} for times in rounds[0])
    whole = launched.index("window_backward_dkdv 16") + 1
    assert "window_forward 16" in launched[:whole], "one whole pass first"
    assert set(launched[whole:]) == {"window_backward_dq 16", "window_backward_dkdv 16", "window_backward_dkdv 32"}, (
        "their launches share a function"
    )
    earlier = [*rounds] * 2
    again = engine.race([{}, tiles], lambda n: None, passes=["backward"], earlier=earlier, **request)
    assert [each["times"]["backward"]["repeats"] for each in again] == [2 * len(rounds)] * 2, "nothing is left to do"


def test_a_race_without_its_base_says_so_and_blames_nobody_else(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(package)
    request = {"bucket": vars(SMALL), "inputs": "independent", "seconds": 0.01, "passes": ["forward"]}
    never = engine.race([{}, OTHER], lambda n: None, kernel="window_backward_dq", **request)
    assert never == [{"times": {}, "error": ""}] * 2
    monkeypatch.setattr(engine_module, "bucket_inputs", lambda *_, **__: (_ for _ in ()).throw(MemoryError("full")))
    engine._drawn.clear()
    answers = engine.race([{}, OTHER], lambda n: None, **request)
    assert [each["error"] for each in answers] == ["MemoryError: full", ""]


def test_decode_is_checked_by_a_cache_and_timed_a_layer(tmp_path: Path, short: None) -> None:
    of = small_spec(gate="sigmoid", window=20, passes=("forward", "decode"))
    package = generate(of, tmp_path)
    opening = {"package": str(package), "spec": of.resolved_yaml(), "seed": 0}
    engine = GpuEngine(opening, torch.device("cpu"), TickingClock())
    bucket = Bucket(64, 2, decode=True)
    tiles = {"decode_attend": {"KEY_BLOCK": 16, "PROGRAMS": 2, "num_warps": 4, "num_stages": 1}}
    assert engine.check([{}, tiles], lambda n: None, bucket=vars(bucket)) == [{}, {}]
    request = {"bucket": vars(bucket), "inputs": "independent", "passes": ["decode"], "seconds": 0.01}
    answers = engine.race([{}, tiles], lambda n: None, **request)
    assert [each["times"]["decode"]["median"] for each in answers] == [1.0, 1.0]
    assert engine._cache is not None and engine._cache.cache.tokens == (64, 64)
    inference = engine._package.inference_ops.INFERENCE
    spoilt = inference.launches.decode
    inference.launches = inference.launches._replace(decode=lambda *a: (spoilt(*a), a[4].mul_(1.5)))
    (answer,) = engine.check([tiles], lambda n: None, bucket=vars(bucket))
    assert answer["error"].startswith("wrong: ")


def test_it_needs_a_gpu_unless_told_otherwise(package: Path) -> None:
    with pytest.raises(RuntimeError, match="torch sees no GPU"):
        GpuEngine({"package": str(package), "spec": SPEC.resolved_yaml()})
    with pytest.raises(RuntimeError, match="kernels are interpreted here"):
        engine_of(package).device()
