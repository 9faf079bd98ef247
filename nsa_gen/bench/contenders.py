"""What may be timed: the protocol of an adapter, and the adapter of nsa_gen's own operator.

An adapter makes a call out of a library's operator. To add one, write a class with the members of `Contender` and put
an instance into `nsa_gen.bench.registry.CONTENDERS`; it imports its library inside its methods, so that a machine
without the library loses nothing but that row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from nsa_gen.verification.inputs import Inputs

if TYPE_CHECKING:
    from torch import Tensor

    from nsa_gen.spec import Spec

OURS = "nsa_gen"


@dataclass(frozen=True)
class Prepared:
    """A contender ready to be timed.

    Attributes:
        call: one forward pass, without arguments; returns the output.
        leaves: the tensors that the backward pass gives gradients of.
        do: the gradient of the output, of the output's shape and dtype.
        note: what a reader of the row must know, such as parts that are left out; empty if nothing.
        within: surrounds each forward with its backward, and the capture of a graph of them.
    """

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    do: Tensor
    note: str = ""
    within: Callable[[], AbstractContextManager[None]] = nullcontext


class Contender(Protocol):
    """An adapter: an operator of some library as something to be timed on a spec's inputs.

    Attributes:
        name: what the command line and the tables call it.
        dense: whether it computes dense causal attention, which speed-ups are against.
    """

    name: str
    dense: bool

    def missing(self) -> str:
        """Why it cannot run on this machine (a package that cannot be imported), or "" if it can."""
        ...

    def refuses(self, spec: Spec, tokens: int) -> str:
        """Why it cannot compute this spec's shapes at this length, or "" if it can, as far as can be told untried."""
        ...

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        """The call for these inputs, one sequence. Whatever it raises becomes the error of its row."""
        ...


class Operator:
    """The operator of a package that nsa_gen generated."""

    dense = False

    def __init__(self, package: ModuleType, name: str = OURS) -> None:
        self.name = name
        self._package = package

    def missing(self) -> str:
        return ""

    def refuses(self, spec: Spec, tokens: int) -> str:
        return ""

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
        arguments = {n: x for n, x in inputs.replace_differentiable(leaves).arguments().items() if x is not None}
        if "compression" in arguments:
            arguments["compression"] = self._package.CompressionParameters(**arguments["compression"])
        positional = [arguments.pop(name, None) for name in ("q", "k", "v")]
        attend: Callable[..., Any] = self._package.nsa_attention
        return Prepared(lambda: attend(*positional, **arguments), tuple(leaves.values()), inputs.do)


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    """The same numbers as tensors that gradients are asked of."""
    return [x.detach().requires_grad_() for x in tensors]


def keys_and_values(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """k and v of one sequence.

    Raises:
        ValueError: the spec takes none (external compression alone), so that other operators have nothing to read.
    """
    if inputs.k is None or inputs.v is None:
        raise ValueError("the spec takes no k and v, so there is no other attention of the same shape")
    return inputs.k, inputs.v


def not_importable(modules: Sequence[str], package: str) -> str:
    """Which of a package's modules cannot be found, as the answer of `Contender.missing`; "" if none."""
    absent = [name for name in modules if not _found(name)]
    return f"{package} is not installed: no module {', '.join(absent)}" if absent else ""


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package is absent, or broken
        return False
