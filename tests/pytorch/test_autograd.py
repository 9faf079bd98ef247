"""nsa_attention under autocast, checkpointing and torch.func, and without gradients; what it keeps for the backward."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.support import DEVICE, Operator, call, inputs_of, operator_of

TOKENS = 10


def drawn(op: Operator, *, grad: bool = False) -> list[Tensor]:
    inputs = inputs_of(op, TOKENS)
    return [x.detach().clone().requires_grad_(grad) for x in (inputs.q, inputs.k, inputs.v, inputs.gates)]


def gradients(op: Operator, attend: Callable[..., Tensor]) -> list[Tensor]:
    arguments = drawn(op, grad=True)
    attend(*arguments).square().sum().backward()
    return [x.grad for x in arguments]


def same(found: object, expected: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_inputs_of_another_dtype_are_refused_unless_autocast_has_the_spec_s() -> None:
    op = operator_of(dtype="float16")
    arguments = [x.float().requires_grad_() for x in drawn(op)]
    with pytest.raises(TypeError, match=r"^q: expected dtype torch.float16, .*got torch.float32"):
        op.nsa_attention(*arguments)
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        o = op.nsa_attention(*arguments)
        steps = [op.window_attention(*arguments[:3])[0], *op.compress(*arguments[1:3])]
    assert torch.equal(o, op.nsa_attention(*(x.half() for x in arguments)))
    assert {o.dtype, *(x.dtype for x in steps)} == {torch.float16}
    o.sum().backward()
    assert {x.grad.dtype for x in arguments} == {torch.float32}
    with (
        torch.autocast(DEVICE.type, dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"^q: expected dtype torch.float16, .*got torch.float32"),
    ):
        op.nsa_attention(*arguments)


def test_autocast_leaves_inputs_of_the_spec_s_dtype_alone_and_casts_parameters_of_phi() -> None:
    op = operator_of(dtype="float16", phi="weighted")
    q, k, v, gates = (x.float() for x in drawn(op))
    weights = op.CompressionParameters(*(torch.randn(1, 8, device=DEVICE) for _ in range(2)))
    halves = op.CompressionParameters(*(x.half() for x in weights))
    expected = op.nsa_attention(q.half(), k.half(), v.half(), gates.half(), compression=halves)
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        assert torch.equal(op.nsa_attention(q, k.half(), v, gates, compression=weights), expected)
        with torch.autocast(DEVICE.type, enabled=False), pytest.raises(TypeError, match=r"^q: expected dtype"):
            op.nsa_attention(q, k, v, gates, compression=weights)
    single = operator_of()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert single.nsa_attention(*drawn(single)).dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    op = operator_of("cmp win")
    recomputed = gradients(op, lambda *x: checkpoint(op.nsa_attention, *x, use_reentrant=reentrant))
    assert same(recomputed, gradients(op, op.nsa_attention))


def test_func_grad_vjp_and_vmap_of_grad_give_what_backward_gives() -> None:
    op = operator_of("cmp win")  # selection takes the interpreter longest
    expected, arguments = gradients(op, op.nsa_attention), drawn(op)
    every = (0, 1, 2, 3)

    def loss(*tensors: Tensor) -> Tensor:
        return op.nsa_attention(*tensors).square().sum()

    assert same(torch.func.grad(loss, argnums=every)(*arguments), expected)
    o, pull = torch.func.vjp(op.nsa_attention, *arguments)
    assert same(pull(2 * o), expected)
    stacked = torch.func.vmap(torch.func.grad(loss, argnums=every))(*(torch.stack([x, x]) for x in arguments))
    assert same((x[1] for x in stacked), expected)


def test_forward_mode_and_second_derivatives_are_refused_and_never_silently_zero() -> None:
    op = operator_of("cmp win")
    arguments = drawn(op)
    with pytest.raises(NotImplementedError, match="forward-mode derivatives are not offered"):
        torch.func.jvp(op.nsa_attention, tuple(arguments), tuple(arguments))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode derivatives are not offered"):
        op.nsa_attention(forward_ad.make_dual(arguments[0], arguments[0]), *arguments[1:])
    leaves = drawn(op, grad=True)
    (first,) = torch.autograd.grad(op.nsa_attention(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not offered"):
        first.sum().backward()


def kept(
    op: Operator, context: contextlib.AbstractContextManager, *, grad: bool = True, **more: tuple[str, ...]
) -> list[Tensor]:
    tensors: list[Tensor] = []
    arguments = drawn(op, grad=grad)

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        op.nsa_attention(*arguments, **more)
    return tensors


def test_the_backward_keeps_the_inputs_and_the_outputs_that_the_docstring_names_and_nothing_else() -> None:
    op = operator_of()
    _, aux = op.nsa_attention(*drawn(op), return_aux=True)
    named = " ".join(op.nsa_attention.__doc__.split()).split("Saved for the backward: the inputs, ")[1]
    names = named.split(". ")[0].split(", ")
    tensors = kept(op, contextlib.nullcontext())
    assert same(tensors[:4], drawn(op)) and len(tensors) == 4 + len(names)
    by_name = dict(zip(names, tensors[4:], strict=True))
    assert set(aux._fields) | {"sorted_keys", "sorted_slots"} == set(names)
    assert all(torch.equal(by_name[name], getattr(aux, name)) for name in aux._fields)


def saved_bytes(op: Operator, recompute: tuple[str, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in kept(op, contextlib.nullcontext(), recompute=recompute))


@pytest.mark.parametrize("recompute", [("cmp",), ("win", "slc")], ids=str)
def test_branches_computed_anew_give_the_same_bits_and_keep_none_of_what_the_docstring_names(
    recompute: tuple[str, ...],
) -> None:
    op = operator_of()
    found = gradients(op, lambda *x: op.nsa_attention(*x, recompute=recompute))
    assert same(found, gradients(op, op.nsa_attention))
    text = " ".join(op.nsa_attention.__doc__.split())
    _, *outputs = op.registration.operator("attention")(*drawn(op), None, None, None, 64, "")
    sizes = {name: x.numel() * x.element_size() for name, x in zip(op.ops.ATTENTION.outputs[1:], outputs, strict=True)}
    named = dict(re.findall(r" (cmp|slc|win): ([^;.]+)", text))
    dropped = [name for branch in recompute for name in named[branch].split(", ")]
    assert len(dropped) >= 2 * len(recompute) and not {"indices", "counts"} & set(dropped)
    assert saved_bytes(op, ()) - saved_bytes(op, recompute) == sum(sizes[name] for name in dropped) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"branches": "cmp win", "phi": "mlp", "kv": "per_branch"},
        {"branches": "slc", "gate": "none", "indices": "input"},
        {"branches": "win", "gate": "none"},
    ],
    ids=str,
)
def test_every_kind_of_operator_can_compute_its_branches_anew(changes: dict[str, str]) -> None:
    op = operator_of(**changes)
    inputs = inputs_of(op, TOKENS)

    def run(recompute: tuple[str, ...]) -> list[Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
        o = call(op, inputs.replace_differentiable(leaves), recompute=recompute)
        return list(torch.autograd.grad(o, list(leaves.values()), inputs.do))

    assert same(run(op.arguments.BRANCHES), run(()))


def test_branches_are_computed_anew_in_compiled_code_and_others_are_refused_by_name() -> None:
    op = operator_of()
    compiled = torch.compile(op.nsa_attention, backend="aot_eager", fullgraph=True)
    found = gradients(op, lambda *x: compiled(*x, recompute=("cmp", "slc")))
    assert same(found, gradients(op, op.nsa_attention))
    for wrong in ("cmp", ("swa",), ["cmp", 1]):
        with pytest.raises(ValueError, match=r"^recompute: expected some of cmp, slc, win in a tuple, got "):
            op.nsa_attention(*drawn(op), recompute=wrong)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(context: Callable[[], contextlib.AbstractContextManager]) -> None:
    op = operator_of()
    assert kept(op, context()) == []
    assert kept(op, contextlib.nullcontext(), grad=False) == []
