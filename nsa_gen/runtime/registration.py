"""Registration of a package's operators with PyTorch: one library per package, and one convention for gradients."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from .lookup import Bucket, bucket_of

# From the device and bucket of a call, makes the context that configures its kernels.
Serving = Callable[[torch.device, Bucket], AbstractContextManager[None]]

_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_NO_TENSORS = frozenset((int, str, type(None)))
# Types of inputs that are not tensors: as declared here, and in PyTorch's notation.
_CONSTANTS = {"int": "SymInt", "str": "str"}


class Output(NamedTuple):
    """One output of an operator.

    `dims` are names or numbers separated by spaces. `dtype` is that of the first input if None. A `saved` output is
    passed to the backward. If `branch` is set and the operator's last input, a string, names this branch, the backward
    gets None instead and computes the output again.
    """

    name: str
    dims: str
    dtype: torch.dtype | None = None
    saved: bool = False
    branch: str = ""

    def allocate(self, like: torch.Tensor, size: Callable[[str], int]) -> torch.Tensor:
        """Allocate the output, uninitialized, on the device of the first input, `like`; `size` gives a dim's size."""
        return like.new_empty([size(dim) for dim in self.dims.split()], dtype=self.dtype or like.dtype)


class Operator(NamedTuple):
    """An operator whose backward is the operator `<name>_backward(*gradients of outputs, *inputs, *saved outputs)`.

    inputs are names in order. A name with a trailing "?" may be None; one with ":int" or ":str" is an int or a string.
    The first `differentiable_outputs` outputs are differentiable. `gradients` names the inputs that get a gradient.
    """

    name: str
    inputs: tuple[str, ...]
    returns: tuple[Output, ...]
    gradients: tuple[str, ...] = ()
    differentiable_outputs: int = 1

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(each.name for each in self.returns)

    @property
    def saved(self) -> tuple[str, ...]:
        """Names of the outputs that are passed to the backward."""
        return tuple(each.name for each in self.returns if each.saved)

    @property
    def recomputed(self) -> dict[str, tuple[str, ...]]:
        """Names of the outputs that the backward can compute again, by branch."""
        found: dict[str, tuple[str, ...]] = {}
        for each in self.returns:
            if each.branch:
                found[each.branch] = (*found.get(each.branch, ()), each.name)
        return found

    @property
    def schema(self) -> str:
        """The operator's schema in PyTorch's notation."""
        return f"({', '.join(map(_declare, self.inputs))}) -> {_declare_outputs(len(self.outputs))}"

    @property
    def backward_schema(self) -> str:
        """The schema of the backward operator."""
        incoming = [f"Tensor grad_{name}" for name in self.outputs[: self.differentiable_outputs]]
        optional = {name for names in self.recomputed.values() for name in names}
        saved = [f"Tensor{'?' if name in optional else ''} saved_{name}" for name in self.saved]
        arguments = ", ".join([*incoming, *map(_declare, self.inputs), *saved])
        return f"({arguments}) -> {_declare_outputs(len(self.gradients))}"


def _declare(declared: str) -> str:
    name, _, kind = declared.partition(":")
    if kind:
        return f"{_CONSTANTS[kind]} {name}"
    return f"Tensor? {name[:-1]}" if name.endswith("?") else f"Tensor {name}"


def name_of(declared: str) -> str:
    """The name of a declared input, without its type."""
    return declared.partition(":")[0].rstrip("?")


def _declare_outputs(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


class Library:
    """The operators of a package, in their own namespace."""

    def __init__(self, package: str, serving: Serving) -> None:
        self._again = (
            f"{package}: a package's operators are registered once; to import it again, importlib.reload({package})"
        )
        if hasattr(sys.modules.get(f"{package}.ops"), "ATTENTION"):
            raise ImportError(self._again)
        self._serving = serving
        self._library = _own_library(package)
        self.namespace = self._library.ns
        # By operator: the function that the dispatcher would call for tensors with data; the same function as a
        # torch.autograd.Function; and the registered operator as one, which torch.func can transform.
        self._launches: dict[str, Callable] = {}
        self._eager: dict[str, type[torch.autograd.Function]] = {}
        self._functions: dict[str, type[torch.autograd.Function]] = {}
        self._no_gradient = _refusal(
            f"{self.namespace}: no gradient; either it has none (a selection), or the spec's passes are [forward] alone"
        )
        self._no_second_derivative = _refusal(
            f"{self.namespace}: second derivatives are not offered; call backward without create_graph"
        )
        self._no_forward_mode = _refusal(
            f"{self.namespace}: forward-mode derivatives are not offered; use torch.func.grad or vjp"
        )

    def register(self, operator: Operator, forward: Callable, fake: Callable, backward: Callable | None = None) -> None:
        """Register an operator and its backward, if any, with shapes for tracing and gradients for autograd.

        `forward` and `backward` launch kernels. `fake` allocates forward's outputs and launches nothing. `backward`
        gets
        its arguments in a list and removes them from it: each tensor is then freed after its last use, unless the graph
        is retained.
        """
        launch = self._within(lambda arguments: forward(*arguments), _bucket_reader(operator.inputs, 0))
        self._install(operator.name, operator.schema, lambda *arguments: launch(arguments), fake)
        if backward is None:
            torch.library.register_autograd(f"{self.namespace}::{operator.name}", self._no_gradient, lib=self._library)
            self._transformable(operator.name, self._no_gradient, _save_nothing)
            return

        name = f"{operator.name}_backward"
        count, offset = len(operator.inputs), operator.differentiable_outputs
        positions = [
            position for position, declared in enumerate(operator.inputs) if name_of(declared) in operator.gradients
        ]

        def backward_fake(*arguments: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
            inputs = arguments[offset : offset + count]
            gradients = tuple(inputs[position].new_empty(inputs[position].shape) for position in positions)
            return gradients[0] if len(gradients) == 1 else gradients

        launch_backward = self._within(backward, _bucket_reader(operator.inputs, offset))
        self._install(
            name, operator.backward_schema, lambda *arguments: launch_backward(list(arguments)), backward_fake
        )
        saved_positions = [operator.outputs.index(output) for output in operator.saved]
        dropped_positions = {
            branch: {operator.outputs.index(output) for output in names}
            for branch, names in operator.recomputed.items()
        }

        def setup_context(ctx, inputs: tuple, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            ctx.constants = [None if isinstance(value, torch.Tensor) else value for value in inputs]
            tensors = [value if isinstance(value, torch.Tensor) else None for value in inputs]
            again = inputs[-1] if dropped_positions else ""
            dropped = {at for branch, positions in dropped_positions.items() if branch in again for at in positions}
            ctx.save_for_backward(*tensors, *(None if at in dropped else outputs[at] for at in saved_positions))
            ctx.mark_non_differentiable(*outputs[offset:])
            ctx.set_materialize_grads(False)
            ctx.incoming = [(value.shape, value.dtype, value.device) for value in outputs[:offset]]

        def run_backward(ctx, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            result: list[torch.Tensor | None] = [None] * count
            if all(gradient is None for gradient in gradients[:offset]):
                return tuple(result)
            incoming = [
                torch.zeros(shape, dtype=dtype, device=device) if _is_nothing(gradient) else gradient
                for gradient, (shape, dtype, device) in zip(gradients, ctx.incoming, strict=False)
            ]
            tensors = ctx.saved_tensors
            inputs = [
                constant if tensor is None else tensor
                for tensor, constant in zip(tensors[:count], ctx.constants, strict=True)
            ]
            given = [*incoming, *inputs, *tensors[count:]]
            del incoming, tensors, inputs
            route = self._route(name, given)
            if route is self._launches[name]:
                # If the graph is not retained, only the list now holds the saved tensors.
                ctx.maybe_clear_saved_tensors()
                computed = launch_backward(given)
            else:
                computed = route(*given)
            computed = computed if isinstance(computed, tuple) else (computed,)
            for position, gradient in zip(positions, computed, strict=True):
                result[position] = gradient
            return tuple(result)

        torch.library.register_autograd(
            f"{self.namespace}::{operator.name}", run_backward, setup_context=setup_context, lib=self._library
        )
        torch.library.register_autograd(f"{self.namespace}::{name}", self._no_second_derivative, lib=self._library)
        self._transformable(operator.name, run_backward, setup_context)
        self._transformable(name, self._no_second_derivative, _save_nothing)

    def _transformable(self, name: str, run_backward: Callable, setup: Callable) -> None:
        """Make an operator's autograd Functions: one for eager calls without the dispatcher, one for torch.func."""

        class Transformed(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(*arguments: Any) -> Any:
                return self.operator(name)(*arguments)

            setup_context = staticmethod(setup)
            backward = staticmethod(run_backward)
            jvp = staticmethod(self._no_forward_mode)

        launch = self._launches[name]

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments: Any) -> Any:
                output = launch(*arguments)
                setup(ctx, arguments, output)
                return output

            backward = staticmethod(run_backward)

        self._functions[name], self._eager[name] = Transformed, Eager

    def _within(self, implementation: Callable, bucket: Callable[[Sequence], Bucket]) -> Callable:
        """Wrap an implementation so that its kernels use the configurations of the call's bucket."""

        def launch(arguments: Sequence) -> Any:
            # Triton launches on the current device, which may differ from the tensors' device.
            with torch.cuda.device_of(arguments[0]), self._serving(arguments[0].device, bucket(arguments)):
                return implementation(arguments)

        return launch

    def _install(self, name: str, schema: str, launch: Callable, fake: Callable) -> None:
        if name in self._launches:
            raise ImportError(self._again)
        self._launches[name] = launch
        self._library.define(name + schema)
        self._library.impl(name, launch, "CUDA")
        self._library.impl(name, launch, "CPU")
        torch.library.register_fake(f"{self.namespace}::{name}", fake, lib=self._library)

    def register_in_place(self, name: str, schema: str, implementation: Callable, fake: Callable | None = None) -> None:
        """Register an operator without gradients that writes to its arguments; `fake` is needed if it returns any."""

        def launch(*arguments):
            tensors = (x[0] if isinstance(x, list) else x for x in arguments)
            with torch.cuda.device_of(next(tensors)):
                return implementation(*arguments)

        self._install(name, schema, launch, fake or (lambda *_: None))

    def operator(self, name: str) -> Callable:
        """The registered operator `name` of this package."""
        return getattr(getattr(torch.ops, self.namespace), name).default

    def call(self, name: str, *arguments: Any) -> Any:
        """Call an operator with support for autograd, torch.compile and torch.func; the backward may raise an error."""
        return self._route(name, arguments)(*arguments)

    def _route(self, name: str, arguments: Sequence) -> Callable:
        """The function that calls an operator with these arguments.

        The dispatcher costs time on the host, so it is bypassed if it would do nothing but launch.
        """
        if torch.compiler.is_compiling():
            return self.operator(name)
        # Dual tensors exist only inside a forward-mode level.
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return self._functions[name].apply
        if torch._C._len_torch_dispatch_stack():
            return self.operator(name)
        requires_grad = False
        for x in arguments:
            kind = type(x)
            if kind in _TENSORS:
                # A tensor without data, or a lazily negated view, which the dispatcher resolves.
                if not (x.is_cuda or x.is_cpu) or x.is_neg():
                    return self.operator(name)
                requires_grad = requires_grad or x.requires_grad
            elif kind not in _NO_TENSORS and isinstance(x, torch.Tensor):  # a subclass may intercept operators
                return self.operator(name)
        if requires_grad and torch.is_grad_enabled():
            return self._eager[name].apply
        return self._launches[name]


def _own_library(package: str) -> torch.library.Library:
    """A library with a unique namespace: a package may be imported again while the earlier import is still in use."""
    name = namespace = package.replace(".", "__")
    for times in range(2, 1000):
        try:
            return torch.library.Library(namespace, "DEF")
        except RuntimeError as error:
            if "Only a single TORCH_LIBRARY" not in str(error):
                raise
            namespace = f"{name}_{times}"
    raise ImportError(f"{package}: imported 1000 times in this process; start another")


def _is_nothing(gradient: torch.Tensor | None) -> bool:
    """Whether `gradient` represents zeros without memory."""
    return gradient is None or (not torch.compiler.is_compiling() and gradient._is_zerotensor())


def _save_nothing(ctx, inputs: tuple, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    pass


def _refusal(reason: str) -> Callable:
    """A backward or forward-mode derivative that raises an error with this reason."""

    def refuse(ctx, *gradients: torch.Tensor | None) -> None:
        raise NotImplementedError(reason)

    return refuse


def _bucket_reader(inputs: tuple[str, ...], offset: int) -> Callable[[Sequence], Bucket]:
    """A function that gives the bucket of a call from its arguments; `offset` arguments precede the inputs."""
    place, packed = sequence_places(inputs)
    keys, counted = offset + place, name_of(inputs[place]) == "tokens"
    ends = None if packed is None else offset + packed

    def bucket(arguments: Sequence) -> Bucket:
        rows = arguments[keys] if counted else arguments[keys].shape[1]
        return bucket_of(rows, arguments[offset].shape[0], ends is not None and arguments[ends] is not None)

    return bucket


def sequence_places(inputs: tuple[str, ...]) -> tuple[int, int | None]:
    """Positions of the input that gives the number of raw keys, and of `cu_seqlens`, or None.

    The former is "tokens", "k" or "k_idx", the first that exists, or else the first input.
    """
    names = [name_of(each) for each in inputs]
    keys = next((names.index(name) for name in ("tokens", "k", "k_idx") if name in names), 0)
    return keys, names.index("cu_seqlens") if "cu_seqlens" in names else None
