"""The same call again and again: every output and every gradient must keep its bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from nsa_gen.rendering import import_package
from nsa_gen.verification.calls import call_package
from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import written
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.inputs import make_inputs
from nsa_gen.verification.report import Row, environment
from tests.gpu.common import other_bits, release, save, say
from tests.gpu.support import package_of, spec_of_request

SAVE_EVERY = 20


def repeats_job(
    result: dict[str, Any],
    *,
    spec: str,
    shapes: Sequence[int | Sequence[int]],
    repeats: int,
    device: str,
    seed: int,
) -> None:
    """Call a shipped spec's package `repeats` times more at each shape, forward and backward, beside other processes.

    Every other call is made in poisoned memory; the rest with torch's usual algorithms in memory that holds what calls
    before it left there.
    """
    meaning = spec_of_request(spec)
    module = import_package(package_of(meaning))
    p = OracleParameters.from_spec(meaning)
    gradients = "backward" in meaning.passes
    rows: list[Row] = []
    result.update(spec=spec, dtype=meaning.dtype, repeats_wanted=repeats, shapes=[], rows=[])
    result["environment"] = asdict(environment(torch.device(device)))
    for number, shape in enumerate(shapes):
        tokens = shape if isinstance(shape, int) else tuple(shape)
        label = Case(tokens).label
        element = getattr(torch, meaning.dtype)
        inputs = make_inputs(meaning, batch=1, tokens=tokens, dtype=element, device=device, seed=seed + number)
        first = written(p, inputs, call_package(module, inputs, gradients).tensors())
        done = {"shape": label, "seed": seed + number, "tensors": sorted(first), "repeats": 0}
        result["shapes"].append(done)
        differing: dict[str, int] = {}
        for repeat in range(repeats):
            if repeat % SAVE_EVERY == 0:
                say(f"{spec}: {label}: repeat {repeat} of {repeats}")
                save(result)
            call = call_package(module, inputs, gradients, poisoned=repeat % 2 == 0)
            for name, count in other_bits(first, written(p, inputs, call.tensors())).items():
                differing[name] = max(count, differing.get(name, 0))
                done.setdefault("first_difference", {}).setdefault(name, repeat)
            done["repeats"] = repeat + 1
            del call
        for name in first:
            count = differing.get(name, 0)
            told = f"{count} elements have other bits" if count else ""
            rows.append(Row(label, name, "bits", float(count), 0.0, not count, told))
        result["rows"] = [asdict(row) for row in rows]
        save(result)
        del first, inputs
        release(device)
    bad = [row for row in rows if not row.ok]
    result["ok"] = bool(rows) and not bad
    result["error"] = f"{len(bad)} of {len(rows)} tensors changed" if bad else ""
