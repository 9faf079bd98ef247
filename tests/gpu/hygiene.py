"""Larger calls, which must not wait for the device, allocate more than is stated or write beside their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from nsa_gen.verification.cases import Case
from nsa_gen.verification.examples import Example, run_example
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.report import Row, environment
from tests.gpu.common import release, save, say
from tests.gpu.support import builder, memory_slot, spec_of_request

CHECKED = ("waiting", "memory", "guards")
LARGE_FROM = 8192
"""Lengths from here on are checked with a share of the GPU's memory."""


def hygiene_job(
    result: dict[str, Any],
    *,
    spec: str,
    shapes: Sequence[int | Sequence[int]],
    device: str,
    seed: int,
) -> None:
    """Check a shipped spec's package, in its own dtype, at each shape: a length, or lengths of packed sequences."""
    meaning = spec_of_request(spec)
    build = builder()
    module = build(meaning)
    p = OracleParameters.from_spec(meaning)
    rows: list[Row] = []
    result.update(spec=spec, dtype=meaning.dtype, seed=seed, rows=[])
    result["environment"] = asdict(environment(torch.device(device)))
    for shape in shapes:
        case = Case(shape if isinstance(shape, int) else tuple(shape), batch=1, twice=False)
        large = isinstance(shape, int) and shape >= LARGE_FROM
        for name in CHECKED:
            example = Example(name, case, seed)
            if not example.applies(p, device):
                continue
            say(f"{spec}: {example.text}")
            with memory_slot() if large else nullcontext():
                rows += run_example(meaning, module, example, device, build).rows
                release(device)
            result["rows"] = [asdict(row) for row in rows]
            save(result)
    bad = [row for row in rows if not row.ok]
    result["ok"] = bool(rows) and not bad
    result["error"] = f"{len(bad)} of {len(rows)} checks failed" if bad else ""
