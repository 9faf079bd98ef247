"""A worker that needs no GPU. A contender's name says what becomes of the process."""

from __future__ import annotations

import os
import signal
import time

from nsa_gen.bench.measure import DeviceLost, Measurement
from nsa_gen.bench.records import OURS, CheckRow, Row
from nsa_gen.bench.worker import TaskRunner
from nsa_gen.workers import serve


class FakeRunner(TaskRunner):
    def _check(self, task, banned, known):
        if task.workload == "unchecked":
            raise ValueError("no check today")
        faults = ("o 3 of 1",) if task.workload == "wrong" else ()
        self._emit(CheckRow(task.workload, task.tokens, OURS, faults))

    def _time(self, task, banned):
        for name in (OURS, *task.contenders):
            self._announce(name)
            if name in banned:
                continue
            if name == "dies":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif name == "dies mid-line":
                os.write(answers, b'{"says": {"record": "row')
                os.kill(os.getpid(), signal.SIGKILL)
            elif name == "loses the device":
                failed = Measurement(name, errors={"forward": "RuntimeError: illegal access"})
                raise DeviceLost(name, "gone", [failed])
            elif name == "hangs":
                time.sleep(60)
            elif name == "takes a second":
                time.sleep(1)
            elif name == "raises":
                raise ValueError("outside of any contender")
        for name in (OURS, *task.contenders):
            spec = task.spec
            heads, dims = (spec.heads.query, spec.heads.kv), (spec.head_dim.qk, spec.head_dim.v)
            place = (task.workload, task.part, task.inputs, task.tokens, heads, dims, spec.dtype)
            ms = None if name in banned else 1.0
            self._emit(Row(*place, name, False, "forward", ms, error=banned.get(name, "")))
        if "dies after all is done" in task.contenders:
            os.kill(os.getpid(), signal.SIGSEGV)


if __name__ == "__main__":
    answers = os.dup(1)
    serve(lambda opening: FakeRunner(opening["seed"]).handle)
