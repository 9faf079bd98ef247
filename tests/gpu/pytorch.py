"""What PyTorch's tools do with a generated operator on a GPU: compilers, graphs, memory, autocast, checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nsa_gen.spec import Spec
from nsa_gen.verification.reference.inputs import make_inputs
from tools.gpu import host_time

SPECS = ("llama3_8b", "mha_16", "tiny")
"""Specs that PyTorch's tools are tried on."""
# A length outside the first bucket of tile sizes, and others of the same bucket.
LENGTHS = {"cuda": (600, 777, 1000), "cpu": (12, 14, 16)}


@dataclass(frozen=True)
class Subject:
    """A package under test. Gates, where it has them, are the fourth argument."""

    spec: Spec
    module: ModuleType
    device: str

    def drawn(self, tokens: int, seed: int = 0, dtype: torch.dtype | None = None) -> tuple[list[Tensor], Tensor]:
        """q, k, v and gates as leaves, and an output gradient."""
        own = getattr(torch, self.spec.dtype)
        inputs = make_inputs(self.spec, tokens=tokens, batch=1, dtype=own, device=torch.device(self.device), seed=seed)
        given = [x for x in (inputs.q, inputs.k, inputs.v, inputs.gates) if x is not None]
        return [x.detach().to(dtype or own).requires_grad_() for x in given], inputs.do

    def gradients(self, attend: Callable[..., Tensor], leaves: Sequence[Tensor], do: Tensor) -> list[Tensor]:
        """The output and every gradient."""
        o = attend(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def expect(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Raise unless all bits are equal."""
    differing = [number for number, (x, y) in enumerate(zip(found, expected, strict=True)) if not torch.equal(x, y)]
    if differing:
        raise AssertionError(f"{what}: tensors {differing} of (o, gradients) differ from the eager call")


def _compiled(subject: Subject, dynamic: bool, frames: int) -> str:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor" if subject.device == "cuda" else "aot_eager")
    compiled = torch.compile(subject.module.nsa_attention, backend=counter, fullgraph=True, dynamic=dynamic)
    lengths = LENGTHS[subject.device]
    for tokens in (*lengths, *lengths):
        leaves, do = subject.drawn(tokens)
        eager = subject.gradients(subject.module.nsa_attention, leaves, do)
        expect(subject.gradients(compiled, leaves, do), eager, f"{tokens} tokens")
    if counter.frame_count != frames:
        raise AssertionError(f"compiled {counter.frame_count} times for {len(lengths)} lengths, expected {frames}")
    return f"{len(lengths)} lengths, {frames} compilations, one graph each"


def _static(subject: Subject) -> str:
    return _compiled(subject, False, len(LENGTHS[subject.device]))


def _dynamic(subject: Subject) -> str:
    return _compiled(subject, True, 1)


def _captured(subject: Subject, run: Callable[[list[Tensor], Tensor], list[Tensor]]) -> str:
    tokens = LENGTHS["cuda"][0]
    leaves, do = subject.drawn(tokens)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(leaves, do)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run(leaves, do)
    for seed in (1, 2, 3):
        others, other_do = subject.drawn(tokens, seed)
        with torch.no_grad():
            for leaf, other in zip((*leaves, do), (*others, other_do), strict=True):
                leaf.copy_(other)
        graph.replay()
        expect(kept, run(others, other_do), f"replay {seed}")
    return "3 replays on new inputs"


def _forward_graph(subject: Subject) -> str:
    def run(leaves: list[Tensor], do: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [subject.module.nsa_attention(*leaves)]

    return _captured(subject, run)


def _training_graph(subject: Subject) -> str:
    return _captured(subject, lambda leaves, do: subject.gradients(subject.module.nsa_attention, leaves, do))


def _saved(subject: Subject) -> str:
    """Memory that is held between forward and backward, against the tensors that the docstring names."""
    tokens = LENGTHS["cuda"][-1] * 8
    leaves, do = subject.drawn(tokens)
    subject.gradients(subject.module.nsa_attention, leaves, do)
    before = torch.cuda.memory_allocated()
    o = subject.module.nsa_attention(*leaves)
    held = torch.cuda.memory_allocated() - before
    saved: dict[int, int] = {}
    given = {x.data_ptr() for x in leaves}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in given:
            saved[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = subject.module.nsa_attention(*leaves)
    named = sum(saved.values()) + (0 if o.data_ptr() in saved else o.numel() * o.element_size())
    slack = 512 * (len(saved) + 1) + 2**21  # the allocator rounds, and large blocks are not split to the last
    if held > named + slack:
        raise AssertionError(f"{held} bytes are held after the forward, {named} of them named")
    return f"{held / 2**20:.1f} MiB held at {tokens} tokens, {named / 2**20:.1f} named"


def _autocast(subject: Subject) -> str:
    own = getattr(torch, subject.spec.dtype)
    if own == torch.float32:
        return "nothing to cast to: the spec is float32"
    leaves, do = subject.drawn(LENGTHS[subject.device][0], dtype=torch.float32)
    with torch.autocast(subject.device, dtype=own):
        found = subject.gradients(subject.module.nsa_attention, leaves, do)
    cast = [x.detach().to(own).requires_grad_() for x in leaves]
    eager = subject.gradients(subject.module.nsa_attention, cast, do)
    expect([found[0], *(x.to(own) for x in found[1:])], eager, "autocast")
    if {x.dtype for x in found[1:]} != {torch.float32}:
        raise AssertionError("gradients of float32 inputs are not float32")
    return "float32 inputs, float32 gradients"


def _checkpointed(subject: Subject) -> str:
    leaves, do = subject.drawn(LENGTHS[subject.device][0])
    eager = subject.gradients(subject.module.nsa_attention, leaves, do)
    for reentrant in (True, False):

        def attend(*x: Tensor, reentrant: bool = reentrant) -> Tensor:
            return checkpoint(subject.module.nsa_attention, *x, use_reentrant=reentrant)

        found = attend(*leaves)
        found.backward(do)
        expect([found.detach(), *(x.grad for x in leaves)], eager, f"reentrant {reentrant}")
        for x in leaves:
            x.grad = None
    return "reentrant and not"


class _Recorder(TorchDispatchMode):
    """The arguments of the first call of each operator of a namespace."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix, self.calls = prefix, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == self.prefix:
            kept = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)
            self.calls.setdefault(name.partition(".")[0], kept)
        return func(*args, **(kwargs or {}))


def _opcheck(subject: Subject) -> str:
    registration = subject.module.registration
    leaves, do = subject.drawn(LENGTHS[subject.device][0] // (4 if subject.device == "cuda" else 1))
    with _Recorder(registration.NAMESPACE) as recorder:
        subject.gradients(subject.module.nsa_attention, leaves, do)
    declared = subject.module.ops.ATTENTION
    every = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for name, tests in (("attention", every), ("attention_backward", every[:2])):
        arguments = recorder.calls[name]
        if name == "attention":
            names = [x.rstrip("?").removesuffix(":int") for x in declared.inputs]
            pairs = zip(arguments, names, strict=True)
            arguments = tuple(
                x.requires_grad_() if isinstance(x, Tensor) and each in declared.gradients else x for x, each in pairs
            )
        found = torch.library.opcheck(registration.operator(name), arguments, test_utils=tests)
        if set(found.values()) != {"SUCCESS"}:
            raise AssertionError(f"{name}: {found}")
    return "attention and its backward"


def _host(subject: Subject) -> str:
    rows = host_time.measure(subject.module, subject.spec, 512, "cuda")
    if not all(row["equal"] for row in rows):
        raise AssertionError("launches past Triton's dispatcher give other bits than by it")
    each = (
        f"{row['call']} {row['microseconds']:.0f} us ({row['by_triton_microseconds']:.0f} by Triton), "
        f"{row['launches']} launches"
        for row in rows
    )
    return "512 tokens: " + "; ".join(each)


CHECKS: dict[str, Callable[[Subject], str]] = {
    "compiled, static": _static,
    "compiled, dynamic": _dynamic,
    "graph of the forward": _forward_graph,
    "graph of forward and backward": _training_graph,
    "saved memory": _saved,
    "autocast": _autocast,
    "checkpointing": _checkpointed,
    "opcheck": _opcheck,
    "host time": _host,
}
ONLY_ON_A_GPU = ("graph of the forward", "graph of forward and backward", "saved memory", "host time")
