"""A worker that needs no GPU: `python fake_worker.py PLAN`. A contender's name says what becomes of the process."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from nsa_gen._trace import watched
from nsa_gen.bench.contenders import OURS
from nsa_gen.bench.records import CheckRow, Row, TaskRow, read_lines, to_line
from nsa_gen.bench.worker import DEVICE_LOST, Plan, Worker


class FakeWorker(Worker):
    def _check(self, number, task):
        if task.workload == "unchecked":
            raise ValueError("no check today")
        faults = ("o 3 of 1",) if task.workload == "wrong" else ()
        self._emit(CheckRow(task.workload, task.tokens, OURS, faults))

    def _time(self, number, task):
        banned = dict(self._plan.banned.get(number, {}))
        for name in (OURS, *task.contenders):
            self._announce(number, name)
            if name in banned:
                continue
            if name == "dies":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif name == "dies mid-line":
                with self._plan.records.open("a") as file:
                    file.write('{"record": "row", "workl')
                os.kill(os.getpid(), signal.SIGKILL)
            elif name == "loses the device":
                self._announce(number, name, "RuntimeError: illegal access")
                sys.stdout.flush()
                os._exit(DEVICE_LOST)
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
    watched()
    plan = Plan.from_json(Path(sys.argv[1]).read_text())
    assert all(isinstance(record, TaskRow | Row | CheckRow) for record in read_lines(plan.records))
    assert to_line(TaskRow("", "", 1, "ok"))
    os._exit(FakeWorker(plan).run())
