"""Generated operators called by several threads at once."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tests.support import Operator, call_with_gradients, inputs_of, operator_of

THREADS = 4


@functools.cache
def package(window: int) -> Operator:
    return operator_of("cmp slc win", window=window)


def at_once(work: Callable[[int], Any], threads: int = THREADS) -> list[Any]:
    """What `work` returns for each number, from threads that begin together."""
    ready = threading.Barrier(threads)

    def wait_and_work(number: int) -> Any:
        ready.wait()
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(wait_and_work, range(threads)))


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


def test_threads_that_call_one_package_and_another_get_the_bits_of_calls_alone():
    subjects = [
        (package(10 + number % 2), inputs_of(package(10), 9 + number, seed=number)) for number in range(THREADS)
    ]
    found = at_once(lambda number: call_with_gradients(*subjects[number]))
    for subject, results in zip(subjects, found, strict=True):
        assert_same_bits(results, call_with_gradients(*subject))


def test_threads_that_call_a_compiled_operator_get_the_bits_of_calls_alone():
    op = package(10)

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=True)
    def compiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return op.nsa_attention(q, k, v, gates)

    def leaves(number: int) -> list[torch.Tensor]:
        inputs = inputs_of(op, 12 + number, seed=number)
        return [inputs.arguments()[name].clone().requires_grad_() for name in ("q", "k", "v", "gates")]

    def step(function: Callable[..., torch.Tensor], number: int) -> dict[str, torch.Tensor]:
        given = leaves(number)
        o = function(*given)
        gradients = torch.autograd.grad(o.square().sum(), given)
        return {"o": o.detach(), **{f"d{place}": x for place, x in enumerate(gradients)}}

    step(compiled, 0)  # PyTorch cannot trace in one thread while another calls what is compiled
    found = at_once(lambda number: step(compiled, number))
    for number, results in enumerate(found):
        assert_same_bits(results, step(op.nsa_attention, number))


def test_a_bucket_is_looked_up_once_whatever_the_number_of_threads(monkeypatch):
    configs = package(10).configs
    looked_up: list[int] = []
    slow = threading.Event()

    def resolve(*_: Any) -> dict[str, dict[str, int]]:
        looked_up.append(1)
        slow.wait(0.3)
        return {}

    monkeypatch.setattr(configs.TILES, "_resolve", resolve)
    monkeypatch.setattr(configs.TILES, "_tables", {})
    bucket = package(10).configs.lookup.Bucket(512, 1, False)
    tables = at_once(lambda _: configs.table_for(torch.device("cpu"), bucket), threads=8)
    assert len(looked_up) == 1 and all(table is tables[0] for table in tables)
