"""A first table of times: the operator and torch's dense attention in turn, and time by kernel."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nsa_gen.bench.breakdown import breakdown
from nsa_gen.bench.compare import beside_dense
from nsa_gen.bench.contenders import Operator
from nsa_gen.bench.correct import RAGGED, faults
from nsa_gen.bench.inputs import draw_inputs
from nsa_gen.bench.measure import Measurement
from nsa_gen.hardware import gpu_for_device
from nsa_gen.rendering import import_package
from nsa_gen.verification.report import environment
from tools.gpu.packages import package_of, variant
from tools.gpu.progress import say


def bench_job(
    result: dict[str, Any], *, spec: str, dtype: str, lengths: Sequence[int], profile_at: int, seed: int, root: str
) -> None:
    """Time one spec at each length, one gaussian sequence; profile one forward and backward at `profile_at`.

    The operator is verified at a ragged length first: times of a wrong kernel are no times. The dense contender is the
    first of torch's backends that runs.
    """
    meaning = variant(spec, dtype)
    module = import_package(package_of(meaning, Path(root)))
    result.update(environment=asdict(environment(torch.device("cuda"))), rows=[], kernels=[], dense_refusals={})
    say(f"{spec}: verifying")
    if wrong := faults(module, meaning, seed=seed):
        result["error"] = f"wrong at {RAGGED} tokens, so not timed: {'; '.join(wrong)}"
        return
    for tokens in lengths:
        say(f"{spec}: {tokens} tokens")
        inputs = draw_inputs(meaning, tokens, device="cuda", seed=seed)
        operator = Operator(module)
        mine, dense, refusals = beside_dense(operator, meaning, inputs)
        result["dense_refusals"][str(tokens)] = refusals
        if mine.problem:
            result["error"] = f"{tokens} tokens: {mine.problem}"
            return
        result["rows"] += _rows(spec, tokens, mine, *([] if dense is None else [dense]))
        if tokens == profile_at:
            say(f"{spec}: profiling")
            device = gpu_for_device(torch.cuda.get_device_name())
            prepared = operator.prepare(meaning, inputs)
            times = breakdown(prepared, meaning, tokens, device.key if device else None)
            result["kernels"] = [asdict(one) for one in times]
            result["profiled_tokens"] = tokens
            del prepared
        del inputs
        gc.collect()
        torch.cuda.empty_cache()
    result["ok"] = True


def _rows(spec: str, tokens: int, *measurements: Measurement) -> list[dict[str, Any]]:
    """A row for each contender and pass that was timed."""
    return [
        {"spec": spec, "tokens": tokens, "contender": one.contender, "direction": direction, **asdict(timing)}
        for one in measurements
        for direction, timing in one.timings.items()
    ]
