"""One job in a process of its own: `python -m tools.gpu.worker '{"kind": "verify", ...}'`."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tools.gpu.pool import RESULT_VARIABLE

KINDS = {
    "verify": ("tools.gpu.correctness", "verify_job"),
    "touch": ("tools.gpu.correctness", "touch_job"),
    "long": ("tools.gpu.long", "long_job"),
    "bench": ("tools.gpu.bench", "bench_job"),
}
"""What a job may be, and the function that does it: it fills the result it is given, and sets `ok`."""


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def main() -> int:
    """Do the job named on the command line and write its result, an exception's story included."""
    request: dict[str, Any] = json.loads(sys.argv[1])
    path = Path(os.environ[RESULT_VARIABLE])
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
    part = path.with_suffix(".part")
    part.write_text(json.dumps(finite(result)), encoding="utf-8")
    part.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
