"""The process that measures: `python -m nsa_gen.tuning.worker`, JSON lines in and out.

The first line opens it; each further one is a request, {"do": "device" | "check" | "race", ...}. While it works it
writes {"now": number} whenever it turns to a candidate, and {"round": times} after each round of a race. When a
candidate has left the GPU unusable it writes {"lost": reason} and ends: nothing more can be measured in this process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from nsa_gen._trace import note_launches, watched
from nsa_gen.targets.worker import end_with_parent
from nsa_gen.tuning.process import LOST_STATUS, Lost


class Engine(Protocol):
    """What answers requests. `announce` is to be called with a candidate's number each time work on it begins."""

    def device(self) -> dict[str, Any]: ...

    def check(self, candidates: list[Any], announce: Callable[[int], None], **request: Any) -> list[dict[str, Any]]: ...

    def race(self, candidates: list[Any], announce: Callable[[int], None], **request: Any) -> list[dict[str, Any]]: ...


def serve(build: Callable[[dict[str, Any]], Engine]) -> NoReturn:
    """Build an engine from the first line of standard input and answer the others until it ends."""
    end_with_parent()
    watched()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what compilers print is not for the reader of answers

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    engine = build(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(_answer(engine, request, say))
        except Lost as lost:
            say({"lost": str(lost)})
            os._exit(LOST_STATUS)  # an orderly end would wait for the GPU
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


def _answer(engine: Engine, request: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    do = request.pop("do")
    if do == "device":
        return {"device": engine.device()}

    def announce(number: int) -> None:
        say({"now": number})

    candidates = request.pop("candidates")
    if do == "check":
        return {"answers": engine.check(candidates, announce, **request)}
    return {"answers": engine.race(candidates, announce, hear=lambda times: say({"round": times}), **request)}


def main() -> None:
    """Serve with the GPU of this machine."""
    from nsa_gen.tuning.engine import GpuEngine

    def build(opening: dict[str, Any]) -> Engine:
        note_launches()
        return GpuEngine(opening)

    serve(build)


if __name__ == "__main__":
    main()
