"""What can be timed: the protocol of an adapter, nsa_gen's own operator, and dense causal attention.

An adapter turns a library's operator into a call. To add one, write a class with the members of `Contender` and put an
instance into `nsa_gen.bench.peers.CONTENDERS`. It imports its library inside its methods, so that a machine without the
library loses only that row.

Dense attention computes another function than sparse attention. A ratio to it therefore says what sparsity saves, not
which of two implementations of the same function is better.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nsa_gen.bench.records import OURS
from nsa_gen.verification.calls import arguments_of
from nsa_gen.verification.reference.inputs import Inputs

if TYPE_CHECKING:
    from nsa_gen.spec import Spec


@dataclass(frozen=True)
class Prepared:
    """A contender ready to be timed.

    Attributes:
        call: one forward pass, without arguments; returns the output.
        leaves: the tensors whose gradients the backward pass computes.
        do: the gradient of the output, of the output's shape and dtype.
        note: what a reader of the row must know, such as parts that are left out; empty if there is nothing.
        within: a context for each forward with its backward, and for the capture of a graph of them.
        share: how often a call does the timed work; times are divided by it.
    """

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    do: Tensor
    note: str = ""
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    share: int = 1


class Contender(Protocol):
    """An adapter: makes some library's operator callable on a spec's inputs, to be timed.

    Attributes:
        name: what the command line and the tables call it.
        dense: whether it computes dense causal attention, the baseline of speed-ups.
    """

    name: str
    dense: bool = False

    def missing(self) -> str:
        """Why it cannot run on this machine (a package that cannot be imported), or "" if it can."""
        return ""

    def refuses(self, spec: Spec, tokens: int) -> str:
        """Why it cannot compute this spec's shapes at this length; "" if it can, as far as is known without trying."""
        return ""

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        """The call for these inputs, one sequence. An exception becomes the error of its row."""
        ...


class Operator(Contender):
    """The operator of a package that nsa_gen generated."""

    def __init__(self, package: ModuleType, name: str = OURS) -> None:
        self.name = name
        self._package = package

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        leaves, positional, arguments = arguments_of(self._package, inputs, True)
        attend: Callable[..., Any] = self._package.nsa_attention
        return Prepared(lambda: attend(*positional, **arguments), tuple(leaves.values()), inputs.do)


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    """The same values as new tensors that require gradients."""
    return [x.detach().requires_grad_() for x in tensors]


def keys_and_values(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """k and v of one sequence.

    Raises:
        ValueError: the spec takes none (only external compression), so other operators have nothing to read.
    """
    if inputs.k is None or inputs.v is None:
        raise ValueError("the spec takes no k and v, so there is no other attention of the same shape")
    return inputs.k, inputs.v


def not_importable(modules: Sequence[str], package: str) -> str:
    """Which of a package's modules cannot be found, in the form of `Contender.missing`; "" if all are there."""
    absent = [name for name in modules if not _found(name)]
    return f"{package} is not installed: no module {', '.join(absent)}" if absent else ""


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package is absent, or broken
        return False


class Sdpa(Contender):
    """One backend of torch's scaled_dot_product_attention, by the name it has in torch.nn.attention.SDPBackend.

    If the backend supports fewer KV heads than query heads, it gets them as they are. Otherwise they are repeated
    before the timing starts, and the note says so.
    """

    dense = True

    def __init__(self, name: str, backend: str) -> None:
        self.name = name
        self._backend = backend

    def missing(self) -> str:
        from torch.nn.attention import SDPBackend

        return "" if hasattr(SDPBackend, self._backend) else f"this torch has no SDPBackend.{self._backend}"

    def refuses(self, spec: Spec, tokens: int) -> str:
        return _no_float32(spec) if self._backend != "EFFICIENT_ATTENTION" else ""

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        grouped = self._prepared(spec, inputs, repeat=1)
        if spec.heads.group == 1:
            return grouped
        # torch cannot be asked whether a backend supports grouped heads, so try it.
        k, v = keys_and_values(inputs)
        tokens = min(256, inputs.q.shape[1])
        short = replace(inputs, q=inputs.q[:, :tokens], k=k[:, :tokens], v=v[:, :tokens], do=inputs.do[:, :tokens])
        trial = self._prepared(spec, short, repeat=1)
        try:
            torch.autograd.grad(trial.call(), trial.leaves, trial.do)
        except RuntimeError:
            return self._prepared(spec, inputs, repeat=spec.heads.group)
        return grouped

    def _prepared(self, spec: Spec, inputs: Inputs, repeat: int) -> Prepared:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        k, v = keys_and_values(inputs)
        wide = (inputs.q, k, v) if repeat == 1 else (inputs.q, *(x.repeat_interleave(repeat, 2) for x in (k, v)))
        leaves = leaves_of(*(x.transpose(1, 2).contiguous() for x in wide))
        backend = SDPBackend.__members__[self._backend]
        grouped = leaves[0].shape[1] != leaves[1].shape[1]
        scale = spec.scale_value

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    *leaves, is_causal=True, scale=scale, enable_gqa=grouped
                )

        note = "" if repeat == 1 else f"KV heads repeated {repeat} times beforehand: it takes no grouped heads"
        return Prepared(call, tuple(leaves), inputs.do.transpose(1, 2).contiguous(), note)


class FlashAttention4(Contender):
    """FlashAttention-4 of the package flash-attn-4 (its CuTe kernels), which serves Hopper and Blackwell."""

    name = "fa4"
    dense = True

    def missing(self) -> str:
        return not_importable(("flash_attn.cute", "cutlass"), "flash-attn-4")

    def refuses(self, spec: Spec, tokens: int) -> str:
        return _no_float32(spec)

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        attend: Any = importlib.import_module("flash_attn.cute").flash_attn_func
        leaves = leaves_of(inputs.q, *keys_and_values(inputs))
        scale = spec.scale_value

        def call() -> Tensor:
            found = attend(*leaves, softmax_scale=scale, causal=True)
            return found[0] if isinstance(found, tuple) else found

        return Prepared(call, tuple(leaves), inputs.do)


class FlexAttention(Contender):
    """torch's FlexAttention, compiled, with a causal block mask."""

    name = "flex"
    dense = True

    def missing(self) -> str:
        return not_importable(("torch.nn.attention.flex_attention",), "torch with FlexAttention")

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        tokens = inputs.q.shape[1]
        mask = create_block_mask(_causal, None, None, tokens, tokens, device=inputs.q.device)
        leaves = leaves_of(*(x.transpose(1, 2).contiguous() for x in (inputs.q, *keys_and_values(inputs))))
        compiled: Any = torch.compile(flex_attention, dynamic=False)
        grouped, scale = spec.heads.group > 1, spec.scale_value
        return Prepared(
            lambda: compiled(*leaves, block_mask=mask, scale=scale, enable_gqa=grouped),
            tuple(leaves),
            inputs.do.transpose(1, 2).contiguous(),
        )


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _no_float32(spec: Spec) -> str:
    return "it takes bfloat16 and float16 only" if spec.dtype == "float32" else ""
