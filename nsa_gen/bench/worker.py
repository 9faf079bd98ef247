"""The process that measures: `python -m nsa_gen.bench.worker PLAN`, one task after the other, on the GPU.

A contender may exhaust memory, read where it must not, or hang; so measuring happens in a process that its parent may
lose. What is found goes to the plan's records file line by line, at once; what runs at the moment stands in its
current file, for the parent to know whom to blame.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import nsa_gen
from nsa_gen._trace import note_launches, watched
from nsa_gen.bench.breakdown import breakdown, estimates
from nsa_gen.bench.contenders import OURS, Contender, Operator, Prepared
from nsa_gen.bench.correct import faults
from nsa_gen.bench.inputs import draw_inputs, selection_overlap, selection_shares
from nsa_gen.bench.measure import PASSES, DeviceLost, Measurement, first_line, race
from nsa_gen.bench.records import (
    CheckRow,
    KernelRow,
    OverlapRow,
    Record,
    Row,
    SelectionRow,
    TaskRow,
    read_lines,
    to_line,
)
from nsa_gen.bench.registry import CONTENDERS
from nsa_gen.bench.workloads import Task
from nsa_gen.hardware import gpu_for_device
from nsa_gen.spec import Spec, parse_spec
from nsa_gen.verification.inputs import Inputs

DEVICE_LOST = 3
"""Exit status after a contender that left the device unusable."""


@dataclass(frozen=True)
class Plan:
    """What a worker is to do.

    Attributes:
        tasks: by number, the number being what `current` names.
        banned: by task, the contenders not to be tried again, with the reason.
        records: file that records are appended to.
        current: file that says which task and contender run.
        seed: of the inputs.
        deadline: time.time() from which on no task is started.
    """

    tasks: Mapping[int, Task]
    banned: Mapping[int, Mapping[str, str]]
    records: Path
    current: Path
    seed: int
    deadline: float

    def to_json(self) -> str:
        tasks = {number: {**_fields(task), "spec": task.spec.resolved_yaml()} for number, task in self.tasks.items()}
        rest = {"records": str(self.records), "current": str(self.current), "seed": self.seed}
        return json.dumps({"tasks": tasks, "banned": self.banned, **rest, "deadline": self.deadline})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        found = json.loads(text)
        tasks = {}
        for number, fields in found["tasks"].items():
            lists = {name: tuple(fields[name]) for name in ("contenders", "passes")}
            tasks[int(number)] = Task(**{**fields, **lists, "spec": parse_spec(fields["spec"])})
        banned = {int(number): reasons for number, reasons in found["banned"].items()}
        return cls(tasks, banned, Path(found["records"]), Path(found["current"]), found["seed"], found["deadline"])


def _fields(task: Task) -> dict[str, Any]:
    return {name: value for name, value in vars(task).items() if name != "spec"}


class Worker:
    """Does the tasks of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._packages: dict[str, ModuleType] = {}

    def run(self) -> int:
        """Do every task before the deadline; return the exit status."""
        for number, task in self._plan.tasks.items():
            if time.time() >= self._plan.deadline:
                self._emit(TaskRow(task.workload, task.inputs, task.tokens, "not run", "the budget was spent"))
                continue
            started = time.perf_counter()
            self._announce(number, "")
            status, reason = "ok", ""
            try:
                self._check(number, task) if task.check else self._time(number, task)
            except DeviceLost as lost:
                self._announce(number, lost.contender, "; ".join(_errors(lost)))
                return DEVICE_LOST
            except Exception as error:
                status, reason = "failed", first_line(error)
            seconds = time.perf_counter() - started
            self._emit(TaskRow(task.workload, task.inputs, task.tokens, status, reason, seconds))
            gc.collect()
            torch.cuda.empty_cache()
        return 0

    def _emit(self, record: Record) -> None:
        with self._plan.records.open("a", encoding="utf-8") as file:
            file.write(to_line(record) + "\n")

    def _announce(self, number: int, contender: str, reason: str = "") -> None:
        said = {"task": number, "contender": contender, "reason": reason, "time": time.time()}
        self._plan.current.write_text(json.dumps(said), encoding="utf-8")

    def _package(self, spec: Spec) -> ModuleType:
        """The package of a spec, rendered and imported once."""
        digest = spec.digest()
        if digest not in self._packages:
            self._packages[digest] = nsa_gen.load(spec)
        return self._packages[digest]

    def _contenders(self, number: int, task: Task) -> tuple[list[Contender], dict[str, str]]:
        """Ours and those the task names, without the banned; and why these are."""
        banned = dict(self._plan.banned.get(number, {}))
        everyone: list[Contender] = [
            Operator(self._package(task.spec)),
            *(CONTENDERS[name] for name in task.contenders),
        ]
        return [each for each in everyone if each.name not in banned], banned

    def _time(self, number: int, task: Task) -> None:
        contenders, banned = self._contenders(number, task)
        inputs = draw_inputs(task.spec, task.tokens, device="cuda", seed=self._plan.seed, kind=task.inputs)  # type: ignore[arg-type]
        found = race(
            contenders,
            task.spec,
            inputs,
            passes=task.passes,
            seconds=task.seconds,
            announce=lambda name: self._announce(number, name),
        )
        found += [Measurement(name, errors=dict.fromkeys(task.passes, why)) for name, why in banned.items()]
        for row in rows_of(task, found, _gpu_key()):
            self._emit(row)
        ours = next((each for each in contenders if each.name == OURS), None)
        if ours is None or found[0].problem:
            return
        self._announce(number, OURS)
        place = (task.workload, task.inputs, task.tokens)
        indices = _selected(self._package(task.spec), inputs)
        if indices is not None and (overlap := selection_overlap(indices)) is not None:
            self._emit(OverlapRow(*place, overlap))
        if indices is not None and task.profile and task.spec.selection is not None:
            self._emit(SelectionRow(*place, selection_shares(indices, task.spec.selection.block)))
        if task.profile:
            for one in breakdown(ours.prepare(task.spec, inputs), task.spec, task.tokens, _gpu_key()):
                self._emit(KernelRow(task.workload, task.inputs, task.tokens, **asdict(one)))

    def _check(self, number: int, task: Task) -> None:
        """Verify our operator, then run every contender once: its kernels are compiled, and its output is compared."""
        contenders, banned = self._contenders(number, task)
        # A worker before this one may have been lost halfway.
        known = {
            record.contender
            for record in read_lines(self._plan.records)
            if isinstance(record, CheckRow) and record.workload == task.workload
        }
        for name in banned.keys() - known:
            self._emit(CheckRow(task.workload, task.tokens, name, error=banned[name]))
        expected = None
        inputs = draw_inputs(task.spec, task.tokens, device="cuda", seed=self._plan.seed)
        for each in contenders:
            done = each.name in known and each.name != OURS
            if done or each.missing() or each.refuses(task.spec, task.tokens):
                continue
            self._announce(number, each.name)
            wrong: tuple[str, ...] = ()
            difference, error = None, ""
            try:
                if each.name == OURS:
                    wrong = tuple(faults(self._package(task.spec), task.spec, seed=self._plan.seed))
                o = _run_once(each.prepare(task.spec, inputs), task.passes)
                if each.name == OURS:
                    expected = o.float()
                elif expected is not None and not each.dense:
                    difference = ((o.float() - expected).norm() / expected.norm()).item()
            except Exception as problem:
                error = first_line(problem)
            if each.name not in known:
                self._emit(CheckRow(task.workload, task.tokens, each.name, wrong, difference, error))
            if error:
                _synchronize(each.name, error)


def rows_of(task: Task, found: list[Measurement], gpu_key: str | None) -> list[Row]:
    """A row for each contender and pass, with what our operator must do beside its own."""
    spec = task.spec
    common: dict[str, Any] = {
        "workload": task.workload,
        "part": task.part,
        "inputs": task.inputs,
        "tokens": task.tokens,
        "heads": (spec.heads.query, spec.heads.kv),
        "head_dim": (spec.head_dim.qk, spec.head_dim.v),
        "dtype": spec.dtype,
    }
    rows = []
    for one in found:
        dense = one.contender in CONTENDERS and CONTENDERS[one.contender].dense
        for direction in task.passes:
            said: dict[str, Any] = {"note": one.note, "refusal": one.refusal, "error": one.errors.get(direction, "")}
            if (timing := one.timings.get(direction)) is not None:
                measured = asdict(timing)
                del measured["least_ms"], measured["most_ms"]
                said |= measured
                if one.contender == OURS:
                    said |= _necessary(spec, task.tokens, direction, gpu_key)
            rows.append(Row(**common, contender=one.contender, dense=dense, direction=direction, **said))
    return rows


def _necessary(spec: Spec, tokens: int, direction: str, gpu_key: str | None) -> dict[str, float | None]:
    """FLOPs and bytes that no schedule of our kernels avoids in a pass, and the sum of the kernels' floors."""
    kernels = [one for one in estimates(spec, tokens, gpu_key).values() if one.direction == direction]
    floor = None if gpu_key is None else 1000 * sum(one.seconds_floor for one in kernels)
    return {
        "flops": sum(one.flops for one in kernels),
        "bytes": sum(one.bytes for one in kernels),
        "floor_ms": floor,
    }


def _run_once(prepared: Prepared, passes: tuple[str, ...]) -> torch.Tensor:
    """The output of a contender, its backward run too."""
    o = prepared.call()
    if PASSES[1] in passes:
        torch.autograd.grad(o, prepared.leaves, prepared.do, allow_unused=True)
    torch.cuda.synchronize()
    return o.detach()


def _synchronize(contender: str, reason: str) -> None:
    """Raise DeviceLost if an error has made the device unusable."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(contender, reason, []) from error


def _errors(lost: DeviceLost) -> list[str]:
    """What the culprit failed with, a reason each."""
    of_it = [each.problem for each in lost.measurements if each.contender == lost.contender and each.problem]
    return of_it or [str(lost)]


def _selected(package: Any, inputs: Inputs) -> torch.Tensor | None:
    """The blocks that our operator chooses, (1, T, Hkv, n) int32; None without a choice of its own."""
    arguments = {name: x for name, x in inputs.arguments().items() if x is not None}
    if "compression" in arguments:
        arguments["compression"] = package.CompressionParameters(**arguments["compression"])
    positional = [arguments.pop(name, None) for name in ("q", "k", "v")]
    with torch.no_grad():
        _, aux = package.nsa_attention(*positional, **arguments, return_aux=True)
    indices = getattr(aux, "indices", None)
    return None if inputs.indices is not None else indices


def _gpu_key() -> str | None:
    gpu = gpu_for_device(torch.cuda.get_device_name())
    return None if gpu is None else gpu.key


def main() -> int:
    """Do the plan in the file that the command line names; end at once, without what a lost device would hold up."""
    watched()
    note_launches()
    status = Worker(Plan.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))).run()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
