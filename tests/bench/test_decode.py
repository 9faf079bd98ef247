"""Steps of decode as they are measured: which caches, which share of a replay, and what has no time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_gen.bench import decode
from nsa_gen.bench.decode import (
    DecodeInputs,
    cache_bytes,
    decode_faults,
    decode_inputs,
    graph_microseconds,
    measure_decode,
    step_bytes,
)
from nsa_gen.spec import load_spec
from tests.support import DEVICE, operator_of_spec, small_spec

SPEC = load_spec("nsa_64x4")
GIB = 2**30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 100 GiB on which every replay takes 20 us; `asked` are the caches that are made."""
    found = SimpleNamespace(asked=[], broken=0)

    def inputs(spec: Any, package: Any, tokens: int, batch: int, **given: Any) -> DecodeInputs:
        found.asked.append((tokens, batch, given["page_size"], given["room"]))
        if tokens == found.broken:
            raise ValueError("capacity: expected at most 8 tokens")
        return DecodeInputs(package, None, torch.empty(0), {}, torch.empty(0), layers=4)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(decode, "captured", lambda action: action)
    monkeypatch.setattr(decode, "graph_microseconds", lambda graph: 20.0)
    monkeypatch.setattr(decode, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(decode, "_dense_microseconds", lambda spec, inputs, tokens: 60.0)
    monkeypatch.setattr(decode, "decode_inputs", inputs)
    return found


def test_a_row_has_the_times_of_one_layer_on_both_kinds_of_cache(gpu: SimpleNamespace) -> None:
    (row,) = measure_decode(SPEC, None, [(65536, 1)])
    assert (row.us, row.paged_us, row.dense_us, row.problem) == (5.0, 5.0, 60.0, "")
    assert gpu.asked == [(65536, 1, None, 64), (65536, 1, 64, 64)]
    # 4095 compressed blocks, 16 selected ones of 64 tokens, a window of 512; 4 heads of 256 numbers of 2 bytes.
    assert row.bytes == step_bytes(SPEC, 65536, 1) == (4095 + 1024 + 512) * 4 * 256 * 2
    assert row.floor_us == pytest.approx(row.bytes / 1e6)
    (alone,) = measure_decode(SPEC, None, [(65536, 1)], dense=False)
    assert alone.dense_us is None


def test_what_does_not_fit_or_fails_has_a_reason_and_the_rest_its_times(gpu: SimpleNamespace) -> None:
    gpu.broken = 4096
    large, failed, right = measure_decode(SPEC, None, [(1048576, 64), (4096, 1), (16384, 1)])
    assert cache_bytes(SPEC, 1048576, 64) > 100 * GIB and "GiB" in large.problem and large.us is None
    assert failed.problem == "ValueError: capacity: expected at most 8 tokens" and right.us == 5.0
    assert [asked[0] for asked in gpu.asked] == [4096, 16384, 16384]


def test_a_short_sequence_is_read_once_by_each_branch() -> None:
    assert step_bytes(SPEC, 100, 2) == 2 * (5 + 100 + 100) * 4 * 256 * 2


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_full_cache_takes_a_step(page_size: int | None) -> None:
    spec = small_spec(passes=("forward", "decode"))
    inputs = decode_inputs(spec, operator_of_spec(spec).module, 50, 2, device=DEVICE, room=6, page_size=page_size)
    assert inputs.cache.tokens == (50, 50) and inputs.cache.layout.capacity == 56
    inputs.out.fill_(float("nan"))
    inputs.step()
    assert torch.isfinite(inputs.out).all()


def test_a_wrong_decode_is_found_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec("win", passes=("forward", "decode"))
    module = operator_of_spec(spec).module
    assert decode_faults(spec, module, DEVICE.type) == []
    monkeypatch.setattr(
        module, "nsa_decode", lambda *given, right=module.nsa_decode, **named: wrong(right(*given, **named))
    )
    assert any(fault.startswith("o ") for fault in decode_faults(spec, module, DEVICE.type))


def wrong(found: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    return found[0] * 1.01, found[1]


def test_timed_replays_follow_an_untimed_one_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("mark")

        def elapsed_time(self, end: Event) -> float:
            return 0.006

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    graph: Any = SimpleNamespace(replay=lambda: log.append("replay"))
    assert graph_microseconds(graph, repeats=2, inner=3) == pytest.approx(2.0)
    assert log == ["replay", "mark", *["replay"] * 3, "mark", "wait"] * 2


def test_dense_attention_goes_through_all_layers_as_the_step_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention

    op, read = operator_of_spec(small_spec(passes=("forward", "decode"))), []
    inputs = decode_inputs(op.spec, op, 40, 1, device=DEVICE, room=8)
    layers = [*inputs.cache.layers] * 3
    inputs = replace(inputs, cache=SimpleNamespace(layers=layers), layers=3)
    attend = torch.nn.functional.scaled_dot_product_attention

    def reading(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> torch.Tensor:
        read.append((k.data_ptr(), tuple(k.shape)))
        return attend(q, k, v, **given)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", reading)
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda kernel: nullcontext())
    monkeypatch.setattr(decode, "captured", lambda action: action())
    monkeypatch.setattr(decode, "graph_microseconds", lambda graph, repeats, inner: 60.0)
    assert decode._dense_microseconds(op.spec, inputs, 40) == 20.0
    assert read == [(layer.k.data_ptr(), (1, 1, 40, 16)) for layer in layers]
