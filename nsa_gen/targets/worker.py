"""The process that imports a package, records its launches and compiles them: `python -m nsa_gen.targets.worker`.

A compiler may crash or hang, and Triton decides on import whether it interprets kernels. All of this therefore happens
in a worker (`nsa_gen.workers`), which the caller may end.

    {"do": "trace", "target": "sm_90", "packed": false}   -> {"launches": [{"key": ...}, ...], "refused": [...], ...}
    {"do": "compile", ..., "key": of a launch}            -> {"registers": ..., "seconds": ..., ...}
    {"do": "candidate", "kernel": ..., "config": ..., "calls": [{"tokens": ..., ...}, ...], ...}
                                                          -> {"binaries": [{"registers": ..., ...}], "digest": ...}
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nsa_gen.hardware import gpu_for_target
from nsa_gen.rendering import import_package
from nsa_gen.workers import Handle, describe, serve

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

    from nsa_gen.targets.launches import Specialization


@dataclasses.dataclass
class _State:
    """What the process was told at its start, and what it has traced since."""

    package_dir: Path
    tokens: int
    batch: int
    passes: tuple[str, ...]
    traces: dict[tuple[str, bool], _Trace] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def package(self) -> ModuleType:
        """The package. It is imported when first needed, so that an error in it belongs to a request."""
        return import_package(self.package_dir)


@dataclasses.dataclass(frozen=True)
class _Trace:
    """One run of the operator for one architecture.

    Attributes:
        found: what to compile, by key, in launch order.
        refused: kernels whose launch does not fit their signature or whose source cannot be read, with the error.
    """

    found: dict[str, Specialization]
    refused: list[tuple[JITFunction, Exception]]


def _trace(state: _State, target: str, packed: bool) -> _Trace:
    from nsa_gen.targets.launches import record_launches, specialize
    from nsa_gen.targets.tracing import trace as launch_all

    if (target, packed) in state.traces:
        return state.traces[target, packed]
    package = state.package
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec(f"{package.__name__}.configs") is not None:
            configs = importlib.import_module(f"{package.__name__}.configs")
            stack.enter_context(configs.use_target(target))
        launches = stack.enter_context(record_launches())
        launch_all(package, state.tokens, state.batch, "meta", packed, state.passes)
    if not launches:
        raise RuntimeError(f"{package.__name__} launched no kernel for passes {state.passes}")
    gpu = gpu_for_target(target)
    trace = _Trace({}, [])
    for launch in launches:
        try:
            one = specialize(launch, gpu)
        except Exception as error:
            trace.refused.append((launch.kernel, error))
        else:
            trace.found[one.key] = one
    state.traces[target, packed] = trace
    return trace


def _do_trace(state: _State, target: str, packed: bool) -> dict[str, Any]:
    import torch
    import triton

    trace = _trace(state, target, packed)
    listed = [
        {
            "key": one.key,
            **_whereabouts(state, one.kernel),
            "kernel": one.name,  # the step's name, if several steps share a kernel
            "num_warps": one.options["num_warps"],
            "num_stages": one.options["num_stages"],
            "constants": {name: _plain(value) for name, value in one.constants.items()},
        }
        for one in trace.found.values()
    ]
    refused = [{**_whereabouts(state, kernel), **describe(error)} for kernel, error in trace.refused]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return {"launches": listed, "refused": refused, "versions": versions}


def _do_candidate(
    state: _State, target: str, kernel: str, config: dict[str, int], calls: list[dict[str, Any]]
) -> dict[str, Any]:
    """Compile one kernel with other tiles than its table's, for every listed call; equal code is compiled once.

    Calls are {"tokens": ..., "batch": ..., "packed": ...}; those of decode have "new_tokens" instead of "packed". A
    trace launches the kernels of every schedule. The digest covers the machine code and the grids, because some
    tunables only change the number of programs.
    """
    import triton

    from nsa_gen.targets.launches import record_launches, specialize
    from nsa_gen.targets.resources import read_resources

    package = state.package
    name = package.__name__
    configs = importlib.import_module(f"{name}.configs")
    gpu = gpu_for_target(target)
    wanted: dict[str, Specialization] = {}
    grids = []
    with configs.use_target(target), configs.override(kernel, **config):
        for call in calls:
            with record_launches() as launches:
                _trace_call(state, package, call)
            mine = [launch for launch in launches if launch.name == f"{kernel}_kernel"]
            grids.append([launch.grid for launch in mine])
            for one in (specialize(launch, gpu) for launch in mine):
                wanted[one.key] = one
    if not wanted:
        raise RuntimeError(f"{kernel}: no call launches it")
    start = time.perf_counter()
    binaries, digest = [], hashlib.sha256(str(grids).encode())
    for one in wanted.values():
        compiled = triton.compile(one.source, target=one.target, options=one.options)
        binaries.append(dataclasses.asdict(read_resources(compiled, gpu)))
        digest.update(f"{one.options['num_warps']} ".encode() + compiled.kernel)
    return {"binaries": binaries, "digest": digest.hexdigest()[:16], "seconds": time.perf_counter() - start}


def _trace_call(state: _State, package: ModuleType, call: dict[str, Any]) -> None:
    """Launch what one call launches, on tensors without storage."""
    from nsa_gen.targets import tracing

    if "new_tokens" in call:
        tracing.trace_inference(
            package, call["tokens"], call["batch"], "meta", new_tokens=(call["new_tokens"],), page_sizes=(0,)
        )
        return
    passes = tuple(each for each in state.passes if each != "decode")
    tracing.trace(package, **call, device="meta", passes=passes)


def _whereabouts(state: _State, kernel: JITFunction) -> dict[str, str]:
    return {"kernel": kernel.__name__, "module": kernel.module.removeprefix(f"{state.package.__name__}.")}


def _plain(value: Any) -> Any:
    """A constant as JSON: numbers, strings and None as they are, everything else by name."""
    value = getattr(value, "value", value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _do_compile(state: _State, target: str, packed: bool, key: str) -> dict[str, Any]:
    import triton

    from nsa_gen.targets.resources import read_resources

    one = _trace(state, target, packed).found[key]
    cached: list[bool] = []
    triton.knobs.compilation.listener = lambda **event: cached.append(bool(event["cache_hit"]))
    start = time.perf_counter()
    compiled = triton.compile(one.source, target=one.target, options=one.options)
    seconds = time.perf_counter() - start
    used = read_resources(compiled, gpu_for_target(target))
    return {"seconds": seconds, "cached": any(cached), **dataclasses.asdict(used)}


def main() -> None:
    """Answer requests. The opening message names the package and what to trace."""
    handlers: dict[str, Callable[..., dict[str, Any]]] = {
        "trace": _do_trace,
        "compile": _do_compile,
        "candidate": _do_candidate,
    }

    def build(opening: dict[str, Any]) -> Handle:
        state = _State(Path(opening["package"]), opening["tokens"], opening["batch"], tuple(opening["passes"]))
        return lambda request, say: handlers[request.pop("do")](state, **request)

    serve(build)


if __name__ == "__main__":
    main()
