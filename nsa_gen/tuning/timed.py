"""What is timed for candidates, and on which inputs: whole passes, steps of decode on a full cache, single kernels.

A generated package has one function per launch (or per few launches that share buffers), which reads its own
configurations and allocates its buffers. The arguments that a whole pass gives it therefore serve every candidate of a
kernel, and a kernel of 0.5 ms is timed alone, not within a pass of 100 ms.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

import torch

from nsa_gen.bench.contenders import Operator, Prepared
from nsa_gen.bench.decode import DecodeInputs
from nsa_gen.bench.inputs import InputKind, draw_inputs
from nsa_gen.bench.measure import captured
from nsa_gen.targets.launches import name_with
from nsa_gen.tuning.space import Bucket
from nsa_gen.tuning.store import Configs
from nsa_gen.verification.inference import Scenario, Step
from nsa_gen.verification.reference.oracle import SINKS

if TYPE_CHECKING:
    from nsa_gen.lowering import Kernel
    from nsa_gen.spec import Spec
    from nsa_gen.verification.reference.inputs import Inputs


def bucket_inputs(
    spec: Spec, bucket: Bucket, kind: InputKind, *, device: torch.device | str = "cuda", seed: int = 0
) -> Inputs:
    """Inputs at the upper ends of a bucket: (B, T, H, D), or packed (T, H, D) with cu_seqlens; see `draw_inputs`."""
    if not bucket.packed:
        drawn = [draw_inputs(spec, bucket.tokens, device=device, seed=seed + n, kind=kind) for n in range(bucket.batch)]
        return _joined(drawn, dim=0)
    lengths = bucket.lengths
    drawn = [draw_inputs(spec, length, device=device, seed=seed + n, kind=kind) for n, length in enumerate(lengths)]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    whole = _joined(drawn, dim=1)
    changed: dict[str, Any] = {"cu_seqlens": bounds}
    for name in ("k_cmp", "v_cmp"):
        if getattr(whole, name) is not None:
            changed[name] = _laid_out(spec, [getattr(each, name) for each in drawn], bucket)
    whole = replace(whole, **changed)
    flat = {each.name: getattr(whole, each.name) for each in fields(whole) if each.name not in SINKS}
    return replace(whole, **{name: x[0] for name, x in flat.items() if isinstance(x, torch.Tensor) and x is not bounds})


def _joined(drawn: list[Inputs], dim: int) -> Inputs:
    """Inputs concatenated along `dim`; learned parameters of phi and sinks are those of the first."""
    first = drawn[0]
    names = [each.name for each in fields(first) if each.name not in SINKS]
    names = [name for name in names if isinstance(getattr(first, name), torch.Tensor)]
    return replace(first, **{name: torch.cat([getattr(each, name) for each in drawn], dim) for name in names})


def _laid_out(spec: Spec, blocks: list[torch.Tensor], bucket: Bucket) -> torch.Tensor:
    """Packed compressed rows (1, T // stride, H, D): block j of sequence s is row start_s // stride + j."""
    assert spec.compression is not None
    stride = spec.compression.stride
    rows = blocks[0].new_zeros((1, bucket.tokens // stride, *blocks[0].shape[2:]))
    start = 0
    for block, length in zip(blocks, bucket.lengths, strict=True):
        rows[:, start // stride : start // stride + block.shape[1]] = block
        start += length
    return rows


def check_scenario(tokens: int, batch: int, seed: int = 0) -> Scenario:
    """The scenario that checks candidates: caches that end inside tiles of every size, then one token, then two."""
    held = (tokens - 3, tokens // 2 + 5)[:batch]
    steps = (Step("fill", held), Step("decode", (1,) * batch), Step("decode", (2,) * batch))
    return Scenario(batch, tokens, None, steps, seed=seed)


@contextmanager
def overridden(package: Any, configs: Configs) -> Iterator[None]:
    """Within the block, a package launches with these configurations instead of its own."""
    with ExitStack() as stack:
        for name, values in configs.items():
            stack.enter_context(package.configs.override(name, **values))
        yield


class Tuned(Operator):
    """The whole operator with a candidate's configurations, as a contender named by a number."""

    def __init__(self, package: Any, number: int, configs: Configs) -> None:
        super().__init__(package, str(number))
        self._within = functools.partial(overridden, package, configs)

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        return replace(super().prepare(spec, inputs), within=self._within)


class DecodeStep(Tuned):
    """Steps of decode with a candidate's configurations: captured once; its call is a replay."""

    def __init__(self, inputs: DecodeInputs, number: int, configs: Configs) -> None:
        super().__init__(inputs.package, number, configs)
        self._inputs = inputs

    def prepare(self, spec: Spec, inputs: Any) -> Prepared:
        """Capture a graph. On the CPU, the step is called directly."""
        if not self._inputs.q.is_cuda:
            return Prepared(self._inputs.step, (), self._inputs.out, within=self._within, share=self._inputs.layers)
        with torch.no_grad(), self._within():
            graph = captured(self._inputs.step)
        return Prepared(graph.replay, (), self._inputs.out, share=self._inputs.layers)


Call = tuple[Callable[..., Any], dict[str, Any]]
"""A function of the package and the arguments it was called with."""


class NoLaunch(RuntimeError):
    """The pass did not launch the kernel."""


@contextmanager
def noted_launches(package: ModuleType, kernel: Kernel) -> Iterator[list[Call]]:
    """Within the block, the yielded list holds the latest call of the function that launches a kernel.

    Only the latest of several calls (such as those of chunks) is kept, because keeping all would keep their buffers.
    """
    launched = getattr(sys.modules[f"{package.__name__}.kernels.{kernel.module}"], f"{kernel.function}_kernel")
    # The package's wrapper of the kernel, if it is launched past Triton's dispatcher. Triton's own have None.
    launched = getattr(launched, "kernel", None) or launched
    kind = type(launched)
    original = kind.run
    found: list[Call] = []

    def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self is launched and name_with(self, keywords) == f"{kernel.name}_kernel":
            found[:] = [_call_of(sys._getframe(1), package.__name__)]
        return original(self, *arguments, **keywords)

    kind.run = run
    try:
        yield found
    finally:
        kind.run = original


def _call_of(frame: FrameType | None, package: str) -> Call:
    """The package's function that requested the launch on top of the stack, with its arguments as they are now."""
    while frame is not None and not _asks(frame.f_globals.get("__name__", ""), package):
        frame = frame.f_back
    assert frame is not None, "a launch of the package comes from the package"
    code = frame.f_code
    function = getattr(sys.modules[frame.f_globals["__name__"]], code.co_name)
    named = code.co_argcount + code.co_kwonlyargcount
    names = code.co_varnames[:named]
    if code.co_flags & inspect.CO_VARARGS:
        first, names = names[: code.co_argcount], names[code.co_argcount :]
        rest = frame.f_locals[code.co_varnames[named]]
        bound = functools.partial(function, *(frame.f_locals[name] for name in first), *rest)
        function = functools.update_wrapper(bound, function)
    return function, {name: frame.f_locals[name] for name in names}


def _asks(module: str, package: str) -> bool:
    """Whether a module belongs to the package and is not the one through which all launches go."""
    return module.startswith(f"{package}.") and module != f"{package}.runtime.launch"


class Solo(Tuned):
    """A noted call with a candidate's configurations."""

    def __init__(self, package: Any, number: int, configs: Configs, call: Call) -> None:
        super().__init__(package, number, configs)
        self._call = call

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        function, arguments = self._call
        return Prepared(lambda: function(**arguments), (), inputs.do, within=self._within)
