"""nsa_attention under torch.compile, torch.export, fake tensors and the meta device: one graph, and few of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import DEVICE, Operator, call, inputs_of, operator_of

# Enough keys for two compressed blocks: PyTorch compiles anew where a size becomes 0 or 1.
LENGTHS = (12, 14, 16)


def leaves(op: Operator, tokens: int) -> list[Tensor]:
    inputs = inputs_of(op, tokens)
    return [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.gates)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "dynamic", "graphs"),
    [("eager", False, len(LENGTHS)), ("aot_eager", None, 2), ("eager", True, 1)],
)
def test_compiled_forward_is_one_graph_compiled_as_seldom_as_pytorch_allows(
    backend: str, dynamic: bool | None, graphs: int
) -> None:
    op = operator_of() if dynamic else operator_of("cmp win")
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(op.nsa_attention, backend=counter, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for tokens in LENGTHS:
            arguments = leaves(op, tokens)
            assert torch.equal(compiled(*arguments), op.nsa_attention(*arguments))
    assert counter.frame_count == graphs


def test_compiled_backward_gives_the_same_bits_at_every_length() -> None:
    op = operator_of()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.nsa_attention, backend=counter, fullgraph=True, dynamic=True)
    for tokens in LENGTHS[:2]:
        arguments, others = leaves(op, tokens), leaves(op, tokens)
        compiled(*arguments).square().sum().backward()
        op.nsa_attention(*others).square().sum().backward()
        assert all(torch.equal(x.grad, y.grad) for x, y in zip(arguments, others, strict=True))
    assert counter.frame_count == 1


def test_packed_sequences_compile_once_for_every_length_and_number_of_sequences() -> None:
    op = operator_of()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, bounds: Tensor) -> Tensor:
        return op.nsa_attention(q, k, v, gates, cu_seqlens=bounds)

    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        # Four bounds: PyTorch takes sizes that are equal at first, as of three gates, for one and the same.
        for bounds in ([0, 3, 7, 12], [0, 5, 9, 9, 14]):
            arguments = [x[0] for x in leaves(op, bounds[-1])]
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
            assert torch.equal(compiled(*arguments, cu_seqlens), attend(*arguments, cu_seqlens))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "changes", [{"phi": "mlp"}, {"kv": "per_branch"}, {"phi": "external", "indices": "input"}], ids=str
)
def test_operators_with_other_inputs_compile_whole(changes: dict[str, str]) -> None:
    op = operator_of(**changes)
    inputs = inputs_of(op, 12)
    compiled = torch.compile(lambda: call(op, inputs), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(), call(op, inputs))


def test_the_meta_device_and_fake_tensors_give_shapes_forward_and_backward() -> None:
    op = operator_of()
    arguments = [x.detach().to("meta").expand(2, 300, -1, -1).requires_grad_() for x in leaves(op, 1)]
    o, aux = op.nsa_attention(*arguments, return_aux=True)
    o.sum().backward()
    assert o.shape == arguments[0].grad.shape == (2, 300, 2, 16) and o.device.type == "meta"
    assert aux.indices.shape == (2, 300, 1, 3) and aux.indices.dtype == torch.int32
    with FakeTensorMode():
        faked = [torch.empty(x.shape, device=DEVICE, requires_grad=True) for x in arguments]
        o = op.nsa_attention(*faked)
        o.sum().backward()
    assert o.shape == (2, 300, 2, 16) and [x.grad.shape for x in faked] == [x.shape for x in faked]


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return operator_of().nsa_attention(q, k, v, gates)


def test_the_exported_forward_is_one_operator_and_serves_every_length_of_its_bucket() -> None:
    op = operator_of()
    tokens = torch.export.Dim("tokens", min=16, max=op.configs.lookup.FEWEST_TOKENS)
    example = tuple(x.detach() for x in leaves(op, 20))
    program = torch.export.export(Attention(), example, dynamic_shapes=({1: tokens},) * 4)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(op.registration.operator("attention")) == 1
    for length in (16, 19):
        other = [x.detach() for x in leaves(op, length)]
        assert torch.equal(program.module()(*other), op.nsa_attention(*other))
