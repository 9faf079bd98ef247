"""Measure host time per call: `python tools/gpu/host_time.py [--specs llama3_8b,mha_16] [--tokens 512] [--json F]`.

First, the results of our own launches and of Triton's dispatcher are compared bit by bit. Then calls are issued in
bursts that fit the GPU's queue, and only issuing them is timed. Exit status 1 if any result differs.

With `--device none`, no GPU is needed: the tool times the work in Python and in PyTorch's allocator (`no_device`). It
reports the first decile of single calls, which other work on the machine disturbs least. There are no results to
compare then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

from nsa_gen.rendering import generate, import_package  # noqa: E402
from nsa_gen.spec import Spec, load_spec  # noqa: E402
from nsa_gen.verification.calls import arguments_of  # noqa: E402
from nsa_gen.verification.reference.inputs import make_inputs  # noqa: E402
from tools.gpu.no_device import no_device  # noqa: E402

BURST, BURSTS = 20, 25
SPECS = ("llama3_8b", "mha_16", "tiny")


@contextmanager
def by_triton(module: ModuleType) -> Iterator[None]:
    """Within the block, Triton's own dispatcher launches a package's kernels."""
    with mock.patch.object(module.runtime.launch, "observed", lambda: True):
        yield


@contextmanager
def counted() -> Iterator[list[str]]:
    """Within the block, the yielded list gets the names of launched kernels; Triton's dispatcher launches all."""
    names: list[str] = []
    original = JITFunction.run

    def run(self: JITFunction, *arguments: Any, **named: Any) -> Any:
        names.append(self.__name__)
        return original(self, *arguments, **named)

    with mock.patch.object(JITFunction, "run", run):
        yield names


def calls(module: ModuleType, spec: Spec, tokens: int, device: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """A forward without gradients, one with, and a forward with its backward. Each returns its results."""
    inputs = make_inputs(spec, tokens=tokens, batch=1, dtype=getattr(torch, spec.dtype), device=torch.device(device))
    _, positional, named = arguments_of(module, inputs, False)
    given = {name: x for name, x in zip(("q", "k", "v"), positional, strict=True) if x is not None} | named
    plain = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    leaves = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in plain.items()}
    learned = [x for x in leaves.values() if x.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (module.nsa_attention(**given),)

    def recorded() -> tuple[Tensor, ...]:
        return (module.nsa_attention(**{**given, **leaves}),)

    def backward() -> tuple[Tensor, ...]:
        (o,) = recorded()
        return (o.detach(), *torch.autograd.grad(o, learned, inputs.do))

    return {"forward": forward, "forward with grad": recorded, "forward and backward": backward}


def host_microseconds(call: Callable[[], Any], synchronise: Callable[[], None], bursts: int = BURSTS) -> float:
    """Median over bursts of the microseconds for issuing one call."""
    found = []
    for _ in range(bursts):
        synchronise()
        start = time.perf_counter()
        for _ in range(BURST):
            call()
        found.append((time.perf_counter() - start) / BURST * 1e6)
    synchronise()
    return statistics.median(found)


def undisturbed_microseconds(call: Callable[[], Any], count: int) -> float:
    """First decile of the microseconds that one call takes."""
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e6)
    return sorted(found)[len(found) // 10]


def measure(module: ModuleType, spec: Spec, tokens: int, device: str, bursts: int = BURSTS) -> list[dict[str, Any]]:
    """By call: launches, host microseconds with our launches and with Triton's dispatcher, and whether bits are equal.

    `device` is "cuda", or "none" within `no_device`; then nothing is compared.
    """

    def microseconds(call: Callable[[], Any]) -> float:
        if device == "none":
            return undisturbed_microseconds(call, bursts * BURST)
        return host_microseconds(call, synchronise, bursts)

    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows = []
    for name, call in calls(module, spec, tokens, "cpu" if device == "none" else device).items():
        for _ in range(3):
            found = call()
        with by_triton(module):
            expected = call()
        equal = device == "none" or all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        with counted() as launches:
            call()
        row = {"spec": spec.name, "tokens": tokens, "device": device, "call": name, "launches": len(launches)}
        row |= {"equal": equal, "microseconds": microseconds(call)}
        with by_triton(module):
            row["by_triton_microseconds"] = microseconds(call)
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    each = row["microseconds"] / max(1, row["launches"])
    verdict = "equal" if row["equal"] else "DIFFERENT"
    if row["device"] == "none":
        verdict = "not compared"
    return (
        f"{row['spec']:<12} {row['tokens']:>6}  {row['call']:<22} {row['launches']:>3} launches  "
        f"{row['microseconds']:7.1f} us  ({row['by_triton_microseconds']:7.1f} by Triton's dispatcher), "
        f"{each:5.1f} us a launch, bits {verdict}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--specs", default=",".join(SPECS), help="comma-separated shipped specs")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument(
        "--device", choices=("cuda", "none"), default="cuda", help="none: without a GPU, up to the driver"
    )
    parser.add_argument("--json", type=Path, help="where the rows go")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a machine with a GPU, got none that torch can use; see --device none")
    if options.device == "none" and knobs.runtime.interpret:
        parser.error("--device none: expected TRITON_INTERPRET to be unset, as packages without kernels are not timed")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.specs.split(","):
            spec = load_spec(name)
            module = import_package(generate(spec, folder))
            with no_device(module) if options.device == "none" else nullcontext():
                rows += measure(module, spec, options.tokens, options.device)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(line(row) for row in rows))
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
