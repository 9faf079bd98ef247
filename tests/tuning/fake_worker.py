"""A measuring process without a GPU: times from a formula, and faults from a script.

It speaks the protocol of `nsa_gen.tuning.engine`. The variable FAKE_GPU holds JSON:

    times      milliseconds of a forward by "kernel NAME=VALUE", subtracted (or added, if negative) where it applies
    faults     "kernel NAME=VALUE" -> crash | hang | lost | wrong | oom | kill | stop
    log        a file that gets a line for each candidate that is begun
    devices    how many GPUs there are
    final seconds, kill parent after
               races of so many seconds have six rounds, told as they end; the parent is killed after this one
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa_gen.tuning.backend import handler
from nsa_gen.workers import Lost, serve

SCRIPT: dict[str, Any] = json.loads(os.environ.get("FAKE_GPU", "{}"))
BASE = {"forward": 10.0, "backward": 20.0, "decode": 0.05}


def applies(rule: str, configs: dict[str, dict[str, int]]) -> bool:
    """Whether "kernel NAME=VALUE NAME=VALUE" holds for a candidate's configurations."""
    kernel, *values = rule.split()
    wanted = {name: int(value) for name, value in (each.split("=") for each in values)}
    return all(configs.get(kernel, {}).get(name) == value for name, value in wanted.items()) and kernel in configs


def milliseconds(name: str, configs: dict[str, dict[str, int]]) -> float:
    """The time of a pass: a constant, less what the script gives for each rule that applies."""
    saved = sum(ms for rule, ms in SCRIPT.get("times", {}).get(name, {}).items() if applies(rule, configs))
    return BASE[name] - saved


class FakeEngine:
    """Answers at once, and does what the script says."""

    def __init__(self, opening: dict[str, Any]) -> None:
        if SCRIPT.get("start") == "crash":
            sys.exit(9)

    def device(self) -> dict[str, Any]:
        facts = {"name": "NVIDIA H100 80GB HBM3", "multiprocessors": 132, "architecture": "sm_90"}
        versions = {"driver": "570.1", "torch": "2.11.0", "triton": "3.6.0"}
        return {**facts, **versions, **SCRIPT.get("device", {}), "count": SCRIPT.get("devices", 1)}

    def check(self, candidates: list[Any], announce: Callable[[int], None], **request: Any) -> list[dict[str, Any]]:
        return [self._checked(number, configs, announce) for number, configs in enumerate(candidates)]

    def race(self, candidates: list[Any], announce: Callable[[int], None], **request: Any) -> list[dict[str, Any]]:
        self._tell_rounds(candidates, **request)
        return [self._timed(number, configs, announce, request["passes"]) for number, configs in enumerate(candidates)]

    def _tell_rounds(self, candidates: list[Any], **request: Any) -> None:
        if request["seconds"] != SCRIPT.get("final seconds"):
            return
        earlier = len(request["earlier"])
        for number in range(earlier, 6):
            self._begin("round", number, {}, lambda number: None)
            request["hear"]([{name: milliseconds(name, each) for name in request["passes"]} for each in candidates])
            if SCRIPT.get("kill parent after") == number:
                time.sleep(0.3)
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60)

    def _checked(self, number: int, configs: Any, announce: Callable[[int], None]) -> dict[str, Any]:
        self._begin("check", number, configs, announce)
        return {"error": "wrong: dq 3 of 1"} if self._fault(configs) == "wrong" else {}

    def _timed(self, number: int, configs: Any, announce: Callable[[int], None], passes: list[str]) -> dict[str, Any]:
        self._begin("time", number, configs, announce)
        fault = self._fault(configs)
        if fault == "oom":
            return {"times": {}, "error": "OutOfMemoryError: CUDA out of memory"}
        if fault == "hang":
            time.sleep(3600)
        if fault == "crash":
            os._exit(11)
        if fault == "lost":
            raise Lost("CUDA error: an illegal memory access was encountered")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "kill once" and not (flag := Path(SCRIPT["log"] + ".killed")).exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "kill parent":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        times = {}
        for name in passes:
            ms = milliseconds(name, configs)
            times[name] = {"median": ms, "low": 0.9995 * ms, "high": 1.0005 * ms, "repeats": 9}
        return {"times": times, "error": ""}

    def _begin(self, what: str, number: int, configs: Any, announce: Callable[[int], None]) -> None:
        announce(number)
        if "log" in SCRIPT:
            with open(SCRIPT["log"], "a", encoding="utf-8") as file:
                device = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
                file.write(json.dumps({"what": what, "configs": configs, "device": device}) + "\n")

    def _fault(self, configs: Any) -> str:
        return next((fault for rule, fault in SCRIPT.get("faults", {}).items() if applies(rule, configs)), "")


if __name__ == "__main__":
    serve(lambda opening: handler(FakeEngine(opening)))
