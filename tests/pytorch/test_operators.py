"""Every registered operator keeps PyTorch's rules: schema, fake tensors, autograd, tracing by AOT autograd."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import DEVICE, Operator, call_with_gradients, inputs_of, operator_of

BACKWARD = ("test_schema", "test_faketensor")
EVERY = (*BACKWARD, "test_autograd_registration", "test_aot_dispatch_dynamic")
IN_PLACE = ("cache_extend", "cache_write", "decode")
STEPS = ("compress", "compressed_attention", "select_blocks", "selected_attention", "window_attention", "combine")
WITH_BACKWARD = ("attention", *(step for step in STEPS if step != "select_blocks"))


class Recorder(TorchDispatchMode):
    """Keeps copies of the arguments of the first call of each operator of a package."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == self.namespace and name not in self.calls:
            self.calls[name] = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), args)
        return func(*args, **(kwargs or {}))


def package() -> Operator:
    return operator_of(passes=("forward", "backward", "decode"))


@functools.cache
def recorded() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator of the package, as its public functions call them."""
    op, recorder = package(), Recorder(package().registration.NAMESPACE)
    inputs = inputs_of(op, 10)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.gates)]
    q, k, v, gates = leaves
    with recorder:
        call_with_gradients(op, inputs)
        k_cmp, v_cmp = op.compress(k, v)
        o_cmp, lse_cmp = op.compressed_attention(q, k_cmp, v_cmp, tokens=10)
        indices, counts = op.select_blocks(q.detach(), k_cmp.detach(), lse_cmp)
        o_slc, _ = op.selected_attention(q, k, v, indices, counts)
        o_win, _ = op.window_attention(q, k, v)
        op.combine((o_cmp, o_slc, o_win), gates).sum().backward()
        cache = op.NSACache(1, 16, device=DEVICE)
        for first, end, attend in ((0, 9, op.nsa_prefill), (9, 10, op.nsa_decode)):
            cache.extend(end - first)
            cache.write(k[:, first:end], v[:, first:end])
            attend(q[:, first:end], cache, gates[:, first:end])
    return recorder.calls


def test_no_operator_of_the_package_is_left_out() -> None:
    prefix = package().registration.NAMESPACE + "::"
    names = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    assert set(recorded()) == names
    assert names == {*IN_PLACE, "prefill", "select_blocks", *WITH_BACKWARD, *(f"{x}_backward" for x in WITH_BACKWARD)}


@pytest.mark.parametrize("name", (*WITH_BACKWARD, "select_blocks"))
def test_a_differentiable_operator_passes_every_check_of_opcheck(name: str) -> None:
    op = package()
    declared = getattr(op.ops, name.upper())
    arguments = [
        x.requires_grad_() if isinstance(x, Tensor) and given.rstrip("?") in declared.gradients else x
        for x, given in zip(recorded()[name], declared.inputs, strict=True)
    ]
    found = torch.library.opcheck(op.registration.operator(name), tuple(arguments), test_utils=EVERY)
    assert set(found.values()) == {"SUCCESS"} and len(found) == len(EVERY)


@pytest.mark.parametrize("name", (*IN_PLACE, "prefill", *(f"{name}_backward" for name in WITH_BACKWARD)))
def test_an_operator_without_gradient_declares_what_it_writes_and_returns(name: str) -> None:
    found = torch.library.opcheck(package().registration.operator(name), recorded()[name], test_utils=BACKWARD)
    assert set(found.values()) == {"SUCCESS"} and len(found) == len(BACKWARD)
