"""Tensors that are not what they seem: lazily negated, without memory, nested, sparse, spread over devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.operator.test_arguments import GIVEN, WHOLE, arguments_of
from tests.support import DEVICE, operator_of

negated: Callable[[Tensor], Tensor] = torch._neg_view  # pyright: ignore[reportAttributeAccessIssue]


def without_memory(x: Tensor) -> Tensor:
    return torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=torch.strided)


@pytest.mark.parametrize("name", ["q", "k", "v", "gates"])
def test_a_view_with_another_sign_is_read_with_its_sign(name: str) -> None:
    op = operator_of(count=2)
    arguments = arguments_of(op)
    plain = {**arguments, name: -arguments[name]}
    leaves = {n: x.clone().requires_grad_() for n, x in plain.items()}
    o = op.nsa_attention(**leaves)
    expected = torch.autograd.grad(o.sum(), list(leaves.values()))
    for _ in range(2):  # before and after a call of this signature was accepted
        view = negated(arguments[name])
        assert view.is_neg()
        assert torch.equal(op.nsa_attention(**{**arguments, name: view}), o)
        again = {**{n: x.detach().clone().requires_grad_() for n, x in plain.items()}, name: view.requires_grad_()}
        found = op.nsa_attention(**again)
        assert torch.equal(found, o)
        gradients = torch.autograd.grad(found.sum(), list(again.values()))
        assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))


def test_a_gradient_with_another_sign_is_read_with_its_sign_and_one_without_memory_is_zero() -> None:
    op = operator_of("win", gate="none")
    arguments = {name: x.requires_grad_() for name, x in arguments_of(op).items()}
    o = op.nsa_attention(**arguments)
    do = torch.randn_like(o)
    leaves = list(arguments.values())
    expected, found, nothing = (
        torch.autograd.grad(o, leaves, x, retain_graph=True) for x in (-do, negated(do), without_memory(do))
    )
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert not any(x.any() for x in nothing)


def test_the_steps_and_the_cache_read_views_with_their_sign() -> None:
    op = operator_of(count=2, passes=("forward", "decode"))
    a = arguments_of(op)
    q, k, v, gates = a["q"], a["k"], a["v"], a["gates"]
    for given, plain in zip(op.compress(negated(k), v), op.compress(-k, v), strict=True):
        assert torch.equal(given, plain)
    k_cmp, v_cmp = op.compress(k, v)
    indices = torch.zeros(1, 5, 1, 2, dtype=torch.int32, device=DEVICE)
    counts = torch.ones(1, 5, 1, dtype=torch.int32, device=DEVICE)
    calls: list[Callable[[Tensor], Any]] = [
        lambda x: op.compressed_attention(x, k_cmp, v_cmp, tokens=20)[0],
        lambda x: op.selected_attention(x, k, v, indices, counts)[0],
        lambda x: op.window_attention(x, k, v)[0],
        lambda x: op.selected_attention(q, k, v, indices, negated(-counts))[0] * x,
        lambda x: op.combine([x, x, x], gates),
        lambda x: cached(op, x, k, v, gates, negated if x.is_neg() else torch.neg),
    ]
    for call in calls:
        assert torch.equal(call(negated(q)), call(-q))


def cached(op: Any, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    cache = op.NSACache(1, 64, max_new_tokens=5, device=DEVICE)
    cache.extend(20)
    cache.write(change(k), change(v))
    with pytest.raises(ValueError, match=r"^out: expected a tensor to be written to, got a view that changes the sign"):
        op.nsa_decode(q, cache, gates, out=negated(torch.zeros(1, 5, 2, 16, device=DEVICE)))
    o = op.nsa_decode(q, cache, change(gates))
    cache.truncate(change(torch.tensor([-9], dtype=torch.int32, device=DEVICE)))
    assert cache.lengths.tolist() == [9]
    return o


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "without memory": (without_memory, "a tensor with memory"),
    "nested": (nested, "a dense tensor, got a nested one"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "a dense tensor, got a nested one"),
    "sparse": (Tensor.to_sparse, r"a dense tensor, got layout torch\.sparse_coo"),
    "compressed rows": (lambda x: x.flatten(1).to_sparse_csr(), r"a dense tensor, got layout torch\.sparse_csr"),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:.*Sparse.*:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["q", "k", "v_win", "k_cmp", "gates", "indices"])
def test_tensors_that_no_kernel_can_read_are_named_before_and_after_right_calls(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = operator_of(**GIVEN)
    monkeypatch.setattr(op.module.operator, "call", lambda name, q, *_: (q,))
    monkeypatch.setattr(op.module.arguments.CHECKS, "_accepted", set())
    arguments = arguments_of(op)
    change, shown = KINDS[kind]
    for _ in range(2):
        with pytest.raises(TypeError, match=rf"^{name}: expected {shown}"):
            op.nsa_attention(**{**arguments, name: change(arguments[name])})
        op.nsa_attention(**arguments)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_parameters_counts_and_bounds_that_no_kernel_can_read_are_named() -> None:
    op = operator_of(**WHOLE)
    arguments = arguments_of(op)
    wrong = arguments["compression"]._replace(key_weight=arguments["compression"].key_weight.to_sparse())
    with pytest.raises(TypeError, match=r"^compression\.key_weight: expected a dense tensor"):
        op.nsa_attention(**{**arguments, "compression": wrong})
    window = operator_of("win", gate="none")
    packed = arguments_of(window, (4,), None)
    for change, shown in (KINDS[kind] for kind in ("without memory", "sparse")):
        with pytest.raises(TypeError, match=rf"^cu_seqlens: expected {shown}"):
            window.nsa_attention(**{**packed, "cu_seqlens": change(packed["cu_seqlens"])})


class Named(Tensor):
    """A subclass that changes nothing."""


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the bounds are not read by the host")
@pytest.mark.parametrize("bounds", [(1, 4), (0, 5), (0, 3, 2)], ids=str)
@pytest.mark.parametrize(
    "kind",
    [lambda x: torch.nn.Parameter(x, requires_grad=False), lambda x: x.as_subclass(Named)],
    ids=["parameter", "subclass"],
)
def test_wrong_bounds_are_refused_whatever_class_they_are_of(
    kind: Callable[[Tensor], Tensor], bounds: tuple[int, ...]
) -> None:
    op = operator_of("win", gate="none")
    arguments = arguments_of(op, (4,), None)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected bounds rising from 0 to at most T_total=4, got \["):
        op.nsa_attention(**arguments | {"cu_seqlens": kind(torch.tensor(bounds, dtype=torch.int32))})


def test_a_tensor_of_an_ended_transformation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    op = operator_of("win", gate="none")
    monkeypatch.setattr(op.module.arguments.CHECKS, "_accepted", set())
    arguments = arguments_of(op)
    kept: list[Tensor] = []
    torch.func.vmap(lambda x: kept.append(x) or x)(arguments["k"][None])
    with pytest.raises(TypeError, match=r"^k: expected a torch.Tensor, got one of a transformation of torch.func"):
        op.nsa_attention(**arguments | {"k": kept[0]})


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch import distributed
    from torch.distributed.tensor import init_device_mesh

    if distributed.is_initialized():
        pytest.skip("a process group of another test's is in force")
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package")
def test_a_distributed_tensor_is_named_with_what_to_call(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard

    def spread(x: Tensor) -> Tensor:
        return DTensor.from_local(x.cpu(), mesh, [Shard(0)])

    op = operator_of(**WHOLE)
    arguments = arguments_of(op)
    for name in ("q", "k", "v", "gates"):
        with pytest.raises(
            TypeError, match=rf"^{name}: expected a tensor of one device, got a DTensor .*{name}\.to_local"
        ):
            op.nsa_attention(**arguments | {name: spread(arguments[name])})
    learned = arguments["compression"]
    with pytest.raises(TypeError, match=r"^compression\.key_weight: expected a tensor of one device, got a DTensor"):
        op.nsa_attention(**arguments | {"compression": learned._replace(key_weight=spread(learned.key_weight))})
    with pytest.raises(TypeError, match=r"^k: expected a tensor of one device"):
        op.compress(spread(arguments["k"]), arguments["v"], learned)
