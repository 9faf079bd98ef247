"""The process that runs a package's cases: `python -m nsa_gen.verification.worker`, JSON lines in and out.

The first line says which package; each further one is a request of `running.Isolated`, answered with
{"rows": [...], "lost": whether the device is of no more use to this process}. A read or write out of bounds may end it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nsa_gen.rendering import import_package
from nsa_gen.spec import parse_spec
from nsa_gen.targets.worker import end_with_parent
from nsa_gen.verification.calls import quick_device_functions
from nsa_gen.verification.running import InProcess, answer
from nsa_gen.verification.verify import builder


def main() -> None:
    """Answer requests until standard input ends."""
    end_with_parent()
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what kernels print is not for the reader of answers

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    opening = json.loads(sys.stdin.readline())
    device = torch.device(opening["device"])
    if device.type == "cpu":
        quick_device_functions()
    module = import_package(Path(opening["package"]))
    runner = InProcess(parse_spec(opening["spec"]), module, device, builder(Path(opening["workplace"])))
    say({"ready": True})
    for line in sys.stdin:
        rows = answer(runner, json.loads(line))
        say({"rows": [asdict(row) for row in rows], "lost": _lost(device)})
    os._exit(0)  # an orderly end would wait for the GPU


def _lost(device: torch.device) -> bool:
    """Whether every further call on the device would fail, as after a fault of a kernel."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main()
