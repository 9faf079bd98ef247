"""Call a generated package: outputs, auxiliary tensors and gradients by name, in poisoned memory."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_gen.verification.reference.alignment import LEARNED
from nsa_gen.verification.reference.inputs import Inputs


@dataclass(frozen=True)
class Call:
    """The results of one call: the output, the auxiliary tensors and the gradients, by name."""

    o: Tensor
    aux: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {"o": self.o, **self.aux, **{f"d{name}": x for name, x in self.gradients.items()}}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block, memory that is allocated but not written holds NaN; integers hold their largest value."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Dd]eterministic.*", category=UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill


@functools.cache
def steady_products() -> None:
    """Make Triton's interpreter round equal rows of a product equally, as GPUs do, for the rest of the process.

    numpy's float32 matrix product may round equal rows differently, depending on their place in the tile. Importances
    that should be equal then differ. Products are therefore formed in float64 and rounded once.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.data.dtype.kind != "f" or d.data.dtype != np.float32:
            return plain(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return type(d)(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


@functools.cache
def quick_interpreter() -> None:
    """Save two thirds of the time of Triton's interpreter, for the rest of the process. No result changes.

    Triton remaps its language in every call of a device function; here, only if the launcher has not done it. Triton
    computes sums and products of integers again in 64 bits, for an assertion that only runs when debugging. It
    broadcasts operands that already have one shape. It makes the type of a tile for each tile, and a table of all
    dtypes for each look-up of a numpy dtype. It parses each function again that another package has already had. All of
    this is avoided.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def languages(function: Any) -> list[Any]:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(tl.core.is_builtin(language.load) for language in languages(self.fn)):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)

    plain, scalars = interpreter._get_np_dtype, {}

    def np_dtype(dtype: Any) -> np.dtype:
        if type(dtype) is not tl.dtype:
            return plain(dtype)
        if dtype.name not in scalars:
            scalars[dtype.name] = plain(dtype)
        return scalars[dtype.name]

    interpreter._get_np_dtype = np_dtype

    semantic = interpreter.interpreter_semantic
    broadcast = semantic.broadcast_impl_value

    def broadcast_unlike(lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape == rhs.type.shape:
            return lhs, rhs
        return broadcast(lhs, rhs)

    semantic.broadcast_impl_value = broadcast_unlike

    fill, blocks = tl.block_type.__init__, {}

    def fill_once(self: Any, element: Any, shape: Any) -> None:
        key = (getattr(element, "name", None), *(getattr(size, "value", size) for size in shape))
        if type(element) is not tl.dtype:
            fill(self, element, shape)
            return
        if key not in blocks:
            fill(self, element, shape)
            blocks[key] = self.__dict__
        self.__dict__ = blocks[key]

    tl.block_type.__init__ = fill_once

    make = tl.tensor.__init__

    def make_of_known(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("made_before")
        if known is None:
            make(self, handle, type)
            type.made_before = {name: value for name, value in self.__dict__.items() if name not in ("handle", "type")}
            return
        self.handle, self.type = handle, type
        self.__dict__.update(known)

    tl.tensor.__init__ = make_of_known

    read, read_before = interpreter.FunctionRewriter.rewrite_ast, {}

    def read_once(self: Any) -> Any:
        """The function as the interpreter runs it. Code is equal if it only differs in file and globals."""
        fn = self.fn
        key = fn.__code__.replace(co_firstlineno=1)
        if key not in read_before or fn.__closure__:
            rewritten = read(self)
            if isinstance(rewritten, FunctionType) and rewritten is not fn:
                read_before[key] = rewritten.__code__, rewritten.__code__.co_firstlineno - fn.__code__.co_firstlineno
            return rewritten
        code, offset = read_before[key]
        place = {"co_filename": fn.__code__.co_filename, "co_firstlineno": fn.__code__.co_firstlineno + offset}
        for name, value in vars(interpreter).items():
            fn.__globals__.setdefault(name, value)
        rewritten = FunctionType(code.replace(**place), fn.__globals__, fn.__name__, fn.__defaults__)
        rewritten.__annotations__, rewritten.__kwdefaults__ = fn.__annotations__, fn.__kwdefaults__
        return rewritten

    interpreter.FunctionRewriter.rewrite_ast = read_once


def arguments_of(
    module: Any, inputs: Inputs, with_gradients: bool
) -> tuple[dict[str, Tensor], list[Any], dict[str, Any]]:
    """The arguments of a package's nsa_attention: q, k and v by position, the others that are present by name.

    Before both, returns the leaves among them that get gradients, by the names of `Inputs.differentiable()`.
    """
    leaves = {n: x.detach().requires_grad_(with_gradients) for n, x in inputs.differentiable().items()}
    arguments = {n: x for n, x in inputs.replace_differentiable(leaves).arguments().items() if x is not None}
    if isinstance(compression := arguments.get("compression"), Mapping):
        arguments["compression"] = module.CompressionParameters(**compression)
    return leaves, [arguments.pop(name, None) for name in ("q", "k", "v")], arguments


def call_package(
    module: Any, inputs: Inputs, with_gradients: bool, *, poisoned: bool = True, recompute: Sequence[str] = ()
) -> Call:
    """Call a package's nsa_attention on `inputs`, with its auxiliary outputs and with gradients for inputs.do.

    The gradients of an indexer's alignment loss, with respect to q_idx and k_idx, are for inputs.dloss.

    `recompute` are branches whose forward the backward runs again, for packages with a backward. Poisoned memory also
    turns on torch's deterministic algorithms. Without it, torch's algorithms are those of any user.
    """
    if inputs.q.device.type == "cpu":
        steady_products()
    leaves, positional, arguments = arguments_of(module, inputs, with_gradients)
    learned = with_gradients and inputs.dloss is not None and inputs.q_idx is not None
    for name in LEARNED if learned else ():
        leaves[name] = arguments[name] = arguments[name].detach().requires_grad_()
    if recompute:
        arguments["recompute"] = tuple(recompute)
    with poisoned_memory() if poisoned else nullcontext():
        o, aux = module.nsa_attention(*positional, **arguments, return_aux=True)
        found: Sequence[Tensor | None] = ()
        if with_gradients:
            outputs, slopes = ((o, aux.alignment_loss), (inputs.do, inputs.dloss)) if learned else (o, inputs.do)
            found = torch.autograd.grad(outputs, list(leaves.values()), slopes, allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=with_gradients)
    }
    named = {name: x.detach() for name, x in aux._asdict().items() if x is not None}
    return Call(o.detach(), named, gradients)
