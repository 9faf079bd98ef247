"""How an operator becomes one of PyTorch's: schemas, gradients, what is saved, what is refused."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from nsa_gen.runtime.lookup import Bucket
from nsa_gen.runtime.registration import Library, Operator, Output

SCALED = Operator(
    "scaled",
    inputs=("q", "k", "factor?", "cu_seqlens?", "times:int", "recompute:str"),
    returns=(
        Output("o", "B T", saved=True),
        Output("squares", "B T", saved=True, branch="win"),
        Output("count", "", torch.int32),
    ),
    gradients=("q", "factor"),
)
NUMBERS = itertools.count()


class Calls:
    """A library with `scaled`, o = q * factor * times, and what its launches were given."""

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        self.saved: list[torch.Tensor | None] = []
        self.drops, self.freed = False, [False]
        self.library = Library(f"tests_runtime_{next(NUMBERS)}", self.serving)
        self.library.register(SCALED, self.forward, self.fake, self.backward)

    @contextlib.contextmanager
    def serving(self, device: torch.device, bucket: Bucket) -> Iterator[None]:
        self.buckets.append(bucket)
        yield

    def forward(self, q, k, factor, cu_seqlens, times, recompute):
        return q * factor * times, q * q, torch.tensor(q.numel(), dtype=torch.int32)

    def fake(self, q, *_):
        return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty((), dtype=torch.int32)

    def backward(self, given):
        do, q, _, factor, _, times, _, *saved = given
        self.saved = list(saved)
        if self.drops:
            kept = [StorageWeakRef(x.untyped_storage()) for x in saved]
            given.clear()
            self.saved.clear()
            del saved
            self.freed = [each.expired() for each in kept]
        return do * factor * times, do * q * times

    def __call__(self, q: torch.Tensor, factor: torch.Tensor, recompute: str = "") -> torch.Tensor:
        return self.library.call("scaled", q, torch.zeros(1, 700), factor, None, 3, recompute)[0]


@pytest.fixture
def scaled() -> Calls:
    return Calls()


def test_the_schemas_say_what_may_be_none_and_what_is_a_number() -> None:
    assert SCALED.schema == (
        "(Tensor q, Tensor k, Tensor? factor, Tensor? cu_seqlens, SymInt times, str recompute)"
        " -> (Tensor, Tensor, Tensor)"
    )
    assert SCALED.backward_schema == (
        "(Tensor grad_o, Tensor q, Tensor k, Tensor? factor, Tensor? cu_seqlens, SymInt times, str recompute, "
        "Tensor saved_o, Tensor? saved_squares) -> (Tensor, Tensor)"
    )
    assert (SCALED.outputs, SCALED.saved) == (("o", "squares", "count"), ("o", "squares"))
    assert SCALED.recomputed == {"win": ("squares",)}


@pytest.mark.parametrize("by_dispatcher", [False, True])
def test_gradients_are_the_backwards_by_the_dispatcher_and_past_it(scaled: Calls, by_dispatcher: bool) -> None:
    q, factor = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    call = scaled.library.operator("scaled") if by_dispatcher else scaled
    given = (q, torch.zeros(1, 700), factor, None, 3, "") if by_dispatcher else (q, factor)
    o = call(*given)[0] if by_dispatcher else call(*given)
    torch.testing.assert_close(o, 3 * q * factor)
    do = torch.randn(2, 5)
    dq, dfactor = torch.autograd.grad(o, (q, factor), do)
    torch.testing.assert_close((dq, dfactor), (3 * do * factor, 3 * do * q))


def test_what_a_branch_computes_again_is_not_saved(scaled: Calls) -> None:
    q, factor = torch.randn(2, 5, requires_grad=True), torch.ones(2, 5)
    scaled(q, factor).sum().backward()
    assert torch.equal(scaled.saved[1], q * q)
    scaled(q, factor, "cmp win").sum().backward()
    assert scaled.saved[0] is not None and scaled.saved[1] is None


@pytest.mark.parametrize("retained", [False, True])
def test_what_the_backward_drops_is_freed_while_it_runs_unless_the_graph_is_retained(
    scaled: Calls, retained: bool
) -> None:
    scaled.drops = True
    q, factor = torch.randn(2, 5, requires_grad=True), torch.ones(2, 5)
    o = scaled(q, factor)  # saved as well, and held here
    (first,) = torch.autograd.grad(o.sum(), q, retain_graph=retained)
    assert scaled.freed == [False, not retained]
    if retained:
        (second,) = torch.autograd.grad(o.sum(), q)
        assert torch.equal(first, second) and scaled.freed == [False, True]
    with pytest.raises(RuntimeError, match="a second time"):
        o.sum().backward()


def test_a_call_is_served_by_the_bucket_of_its_keys(scaled: Calls) -> None:
    scaled(torch.randn(3, 5), torch.ones(3, 5))
    assert scaled.buckets == [Bucket(1024, 4, packed=False)]


def test_tensors_without_data_reach_the_fake_alone(scaled: Calls) -> None:
    with FakeTensorMode():
        o = scaled(torch.empty(2, 5), torch.empty(2, 5))
    assert o.shape == (2, 5) and scaled.buckets == []


def test_second_derivatives_and_forward_mode_are_refused_with_a_reason(scaled: Calls) -> None:
    q, factor = torch.randn(2, 5, requires_grad=True), torch.ones(2, 5, requires_grad=True)
    (dq,) = torch.autograd.grad(scaled(q, factor).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not offered"):
        dq.sum().backward()
    with pytest.raises(NotImplementedError, match="forward-mode derivatives are not offered"):
        torch.func.jvp(lambda x: scaled(x, factor.detach()), (q.detach(),), (torch.ones(2, 5),))


def test_vmap_and_grad_see_through_an_operator(scaled: Calls) -> None:
    q, factor = torch.randn(2, 5), torch.randn(2, 5)
    found = torch.func.grad(lambda x: scaled(x, factor).sum())(q)
    torch.testing.assert_close(found, 3 * factor)


def test_a_name_is_registered_once_and_a_package_may_come_again(scaled: Calls) -> None:
    with pytest.raises(ImportError, match="registered once"):
        scaled.library.register(SCALED, scaled.forward, scaled.fake)
    first, second = (Library("tests_runtime_again", scaled.serving) for _ in range(2))
    assert (first.namespace, second.namespace) == ("tests_runtime_again", "tests_runtime_again_2")
