"""Jobs that hold a generated package against the oracle, or only run it (for a memory checker to watch)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from nsa_gen.lowering import lower
from nsa_gen.rendering import import_package
from nsa_gen.spec import Spec
from nsa_gen.verification.calls import call_package
from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.inference import Scenario, Step, run_scenario
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.inputs import Inputs, make_inputs
from nsa_gen.verification.report import Row, environment
from nsa_gen.verification.verify import verify
from tests.gpu.common import release, save, say
from tests.gpu.support import memory_slot, package_of, spec_of_request, variant

CACHED = Scenario(2, 200, 16, (Step("fill", (100, 61)), Step("prefill", (3, 0)), Step("decode", (1, 1))))
SHORT, HOPPER_ROWS = 128, 2**19
"""Tokens of many short sequences, and query rows, tokens times heads, of a call that all of Hopper's kernels serve."""
LONG_FROM = 1024
"""Lengths from here on are verified with one sequence at a time, and one process in a share of the GPU's memory."""


def verify_job(
    result: dict[str, Any],
    *,
    spec: str,
    dtype: str,
    lengths: Sequence[int],
    packed: Sequence[Sequence[int]],
    device: str,
    seed: int,
    hopper: bool = False,
) -> None:
    """Verify a shipped spec in a dtype: `verify` at the short lengths and with its own packed batch and input kinds,
    then the long lengths, many short sequences and the packed batches named here, forward and backward.

    With `hopper`, calls of any length use every kernel for Hopper that the package has.
    """
    meaning = variant(spec, dtype)
    module = import_package(package_of(meaning))
    with ExitStack() as stack:
        for decision in lower(meaning).decisions if hopper else ():
            tokens = [tunable.name for tunable in decision.tunables if tunable.name.startswith("HOPPER_")]
            if tokens:
                stack.enter_context(module.configs.override(decision.name, **dict.fromkeys(tokens, 0)))
        _verify(result, module, meaning, lengths, packed, device, seed)


def _verify(
    result: dict[str, Any],
    module: Any,
    meaning: Spec,
    lengths: Sequence[int],
    packed: Sequence[Sequence[int]],
    device: str,
    seed: int,
) -> None:
    short = [length for length in lengths if length < LONG_FROM]
    report = verify(meaning, package=module, lengths=short, device=device, seed=seed, progress=say)
    result.update(json.loads(report.to_json()), ok=False)
    rows, labels = list(report.rows), list(report.cases)
    cases = [Case(length, batch=1) for length in lengths if length >= LONG_FROM]
    cases += [Case(tuple(each)) for each in packed]
    many = HOPPER_ROWS // (meaning.heads.query * SHORT)
    cases.append(Case(SHORT, batch=many) if device == "cuda" else Case(9, batch=3))
    release(device)
    with memory_slot():
        parameters = OracleParameters.from_spec(meaning)
        for number, case in enumerate(cases, 1):
            say(f"{meaning.name}: {case.label}")
            labels.append(case.label)
            rows += _rows_of(module, meaning, parameters, case, device, seed + 1000 + number)
            result.update(cases=labels, rows=[asdict(row) for row in rows])
            save(result)
            release(device)
    bad = [row for row in rows if not row.ok]
    result["ok"] = bool(rows) and not bad
    result["error"] = f"{len(bad)} of {len(rows)} comparisons failed" if bad else ""
    if device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()


def _rows_of(module: Any, spec: Any, parameters: OracleParameters, case: Case, device: str, seed: int) -> list[Row]:
    inputs = make_inputs(
        spec, batch=case.batch, tokens=case.tokens, dtype=getattr(torch, spec.dtype), device=device, seed=seed
    )
    return check_case(module, parameters, case, inputs, with_gradients="backward" in spec.passes)


def touch_job(
    result: dict[str, Any],
    *,
    spec: str,
    dtype: str | None,
    heads: Sequence[int] | None,
    batch: int,
    shapes: Sequence[int | Sequence[int]],
    device: str,
    seed: int,
    steps: bool = False,
) -> None:
    """Run forward and backward at each shape (a length, or packed lengths), without an oracle; all must be finite.

    `steps` runs the window alone as well, whose backward has a kernel that the whole operator does without, and, where
    the spec has decode, a cache, held against the oracle.
    """
    meaning = spec_of_request(spec, dtype, heads)
    module = import_package(package_of(meaning))
    broken: list[str] = []
    for number, shape in enumerate(shapes):
        say(f"{meaning.name}: tokens {shape}")
        inputs = make_inputs(
            meaning,
            batch=batch,
            tokens=shape,
            dtype=getattr(torch, meaning.dtype),
            device=device,
            seed=seed + number,
        )
        if steps and hasattr(module, "window_attention"):  # joint branches have no window of their own
            broken += [f"window alone, tokens {shape}: {name}" for name in _window_alone(module, inputs)]
        broken += [f"tokens {shape}: {name}" for name in not_finite(call_package(module, inputs, True))]
    if "decode" in meaning.passes and steps:
        say(f"{meaning.name}: {CACHED.text}")
        found = run_scenario(meaning, module, CACHED, device)
        broken += [f"{row.case}: {row.quantity}" for row in found if not row.ok]
    result["environment"] = asdict(environment(torch.device(device)))
    result["ok"] = not broken
    if broken:
        result["error"] = f"not finite, or not the oracle's: {', '.join(broken)}"


def _window_alone(module: Any, inputs: Inputs) -> list[str]:
    """Names of what is not finite when the window of a spec with shared keys is called by itself."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in ("q", "k", "v")}
    sink = {} if inputs.sink_win is None else {"sink_win": inputs.sink_win}
    o, lse = module.window_attention(*leaves.values(), **sink, cu_seqlens=inputs.cu_seqlens)
    gradients = torch.autograd.grad(o, list(leaves.values()), inputs.do)
    found = {"o": o, "lse": lse, **{f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}}
    return [name for name, x in found.items() if not torch.isfinite(x).all()]


def not_finite(call: Any) -> list[str]:
    """Names of outputs and gradients that hold NaN or infinity. Where a row sees nothing its lse is -inf, and the
    compressed keys of a packed call have rows between sequences that nobody writes."""
    names = [name for name in call.tensors() if name not in ("indices", "counts", "k_cmp", "v_cmp")]
    broken = []
    for name in names:
        x = call.tensors()[name]
        bad = torch.isnan(x) | torch.isposinf(x) if name.startswith("lse") else ~torch.isfinite(x)
        if bad.any():
            broken.append(name)
    return broken


def main() -> int:
    """Touch what the command line asks for, as a process that compute-sanitizer watches."""
    result: dict[str, Any] = {}
    touch_job(result, **json.loads(sys.argv[1]))
    print(result.get("error", ""))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
