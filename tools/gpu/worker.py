"""One job in a process of its own: `python -m tools.gpu.worker '{"kind": "verify", ...}'`."""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from typing import Any

from nsa_gen.workers import note_launches, watched
from tools.gpu.progress import save

KINDS = {
    "verify": ("tools.gpu.correctness", "verify_job"),
    "touch": ("tools.gpu.correctness", "touch_job"),
    "long": ("tools.gpu.long", "long_job"),
    "examples": ("tools.gpu.examples", "examples_job"),
    "soak": ("tools.gpu.examples", "soak_job"),
    "hopper": ("tools.gpu.hopper", "hopper_job"),
    "repeats": ("tools.gpu.repeats", "repeats_job"),
    "hygiene": ("tools.gpu.hygiene", "hygiene_job"),
    "far apart": ("tools.gpu.far", "far_apart_job"),
    "far along": ("tools.gpu.far", "far_along_job"),
    "tuner fault": ("tools.gpu.tuner_faults", "tuner_fault_job"),
    "tuner run": ("tools.gpu.tuner_faults", "tuner_run_job"),
    "inference": ("tools.gpu.inference", "inference_job"),
    "decode": ("tools.gpu.decode", "decode_job"),
    "pytorch": ("tools.gpu.pytorch", "pytorch_job"),
    "training": ("tools.gpu.training", "training_job"),
    "fla": ("tools.gpu.reference_fla", "fla_job"),
    "bench": ("tools.gpu.bench", "bench_job"),
}
"""What a job may be, and the function that does it: it fills the result it is given, and sets `ok`."""


def main() -> int:
    """Do the job named on the command line and write its result, an exception's story included."""
    watched()
    note_launches()
    request: dict[str, Any] = json.loads(sys.argv[1])
    result: dict[str, Any] = {"ok": False, "request": request}
    started = time.perf_counter()
    module, name = KINDS[request.pop("kind")]
    try:
        getattr(importlib.import_module(module), name)(result, **request)
    except Exception as error:
        result["ok"] = False
        notes = "; ".join(getattr(error, "__notes__", []))
        result["error"] = f"{type(error).__name__}: {error}" + (f" ({notes})" if notes else "")
        result["traceback"] = traceback.format_exc()[-6000:]
    result["seconds"] = time.perf_counter() - started
    save(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
