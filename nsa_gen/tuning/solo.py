"""One kernel timed alone: the call of the package's function that launches it, again and again under each candidate.

A generated package has one function a launch (or a few launches that share buffers), which reads its own configurations
and allocates what they need. So the arguments that a whole pass hands it serve every candidate, and a kernel of 0.5 ms
is compared in milliseconds instead of the 100 of its pass.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from nsa_gen.bench.contenders import Operator, Prepared
from nsa_gen.targets.launches import name_with

if TYPE_CHECKING:
    from nsa_gen.lowering import Kernel
    from nsa_gen.spec import Spec
    from nsa_gen.verification.inputs import Inputs

Call = tuple[Callable[..., Any], dict[str, Any]]
"""A function of the package and the arguments it was called with."""


class NoLaunch(RuntimeError):
    """A pass went by without a launch of the kernel."""


@contextmanager
def noted_launches(package: ModuleType, kernel: Kernel) -> Iterator[list[Call]]:
    """Within the block, the list it gives holds the latest call of the function that launches a kernel.

    The latest of several, as those of chunks are: keeping all would keep their buffers.
    """
    launched = getattr(sys.modules[f"{package.__name__}.kernels.{kernel.module}"], f"{kernel.function}_kernel")
    # The package's wrapper of it, where it is launched past Triton's dispatcher. Triton's own have None there.
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
    """The package's function that asked for the launch on top of the stack, with its arguments as they are now."""
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
    """Whether a module is one of the package's, and not the one through which all launches go."""
    return module.startswith(f"{package}.") and module != f"{package}.runtime.launch"


class Solo(Operator):
    """A noted call under a candidate's configurations, as a contender."""

    def __init__(self, package: Any, number: int, call: Call, within: Callable[[], Any]) -> None:
        super().__init__(package, str(number))
        self._call, self._within = call, within

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        function, arguments = self._call
        return Prepared(lambda: function(**arguments), (), inputs.do, within=self._within)
