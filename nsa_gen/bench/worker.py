"""The process that measures on the GPU, `python -m nsa_gen.bench.worker`: one task per request.

It is a worker (`nsa_gen.workers`), because a contender may exhaust memory, access memory illegally, or hang. It reports
{"at": contender} when it turns to one, and {"record": line} as soon as it has a result.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch

import nsa_gen
from nsa_gen.bench.contenders import Contender, Operator, Prepared
from nsa_gen.bench.inputs import draw_inputs, selection_overlap, selection_shares
from nsa_gen.bench.measure import PASSES, DeviceLost, Measurement, faults, first_line, race
from nsa_gen.bench.peers import CONTENDERS
from nsa_gen.bench.records import (
    OTHER,
    OURS,
    CheckRow,
    KernelRow,
    OverlapRow,
    Record,
    Row,
    SelectionRow,
    to_line,
)
from nsa_gen.bench.workloads import Task
from nsa_gen.hangs import note_launches
from nsa_gen.hardware import gpu_for_device
from nsa_gen.lowering import KernelEstimate, Plan, explain, lower
from nsa_gen.lowering.hopper import ordinary_kernel
from nsa_gen.spec import Spec, parse_spec
from nsa_gen.verification.calls import arguments_of
from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.inputs import Inputs, make_inputs
from nsa_gen.workers import Handle, Lost, Say, serve

RAGGED = 511
"""The length at which our operator is compared with the oracle: it ends inside every kind of block."""


class TaskRunner:
    """Does tasks with inputs of one seed, and reports its results."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._packages: dict[str, ModuleType] = {}
        self._say: Say = lambda said: None

    def handle(self, request: dict[str, Any], say: Say) -> None:
        """Do a task. `banned` contenders are not tried, and `known` ones were checked before, by a worker that died.

        Raises:
            Lost: a contender has left the device unusable.
        """
        self._say = say
        task, banned = task_of(request["task"]), request["banned"]
        try:
            if task.check:
                self._check(task, banned, set(request["known"]))
            else:
                self._time(task, banned)
        except DeviceLost as lost:
            self._announce(lost.contender)
            raise Lost("; ".join(_errors(lost))) from lost
        gc.collect()
        torch.cuda.empty_cache()

    def _emit(self, record: Record) -> None:
        self._say({"record": to_line(record)})

    def _announce(self, contender: str) -> None:
        self._say({"at": contender})

    def _package(self, spec: Spec) -> ModuleType:
        """A spec's package, which is generated and imported once."""
        digest = spec.digest()
        if digest not in self._packages:
            self._packages[digest] = nsa_gen.load(spec)
        return self._packages[digest]

    def _contenders(self, task: Task, banned: Mapping[str, str]) -> list[Contender]:
        """Our operator and the contenders that the task names, without the banned ones."""
        everyone = [Operator(self._package(task.spec)), *(CONTENDERS[name] for name in task.contenders)]
        return [each for each in everyone if each.name not in banned]

    def _time(self, task: Task, banned: Mapping[str, str]) -> None:
        contenders = self._contenders(task, banned)
        inputs = draw_inputs(task.spec, task.tokens, device="cuda", seed=self._seed, kind=task.inputs)  # type: ignore[arg-type]
        options: dict[str, Any] = {"passes": task.passes, "seconds": task.seconds, "announce": self._announce}
        found = race(contenders, task.spec, inputs, **options)
        found += [Measurement(name, errors=dict.fromkeys(task.passes, why)) for name, why in banned.items()]
        for row in rows_of(task, found, _gpu_key()):
            self._emit(row)
        ours = next((each for each in contenders if each.name == OURS), None)
        if ours is None or found[0].problem:
            return
        self._announce(OURS)
        place = (task.workload, task.inputs, task.tokens)
        indices = _selected(self._package(task.spec), inputs)
        if indices is not None and (overlap := selection_overlap(indices)) is not None:
            self._emit(OverlapRow(*place, overlap))
        if indices is not None and task.profile and task.spec.selection is not None:
            self._emit(SelectionRow(*place, selection_shares(indices, task.spec.selection.block)))
        if task.profile:
            for one in breakdown(ours.prepare(task.spec, inputs), task, _gpu_key()):
                self._emit(one)

    def _check(self, task: Task, banned: Mapping[str, str], known: set[str]) -> None:
        """Verify our operator, then run every contender once: this compiles its kernels, and its output is compared."""
        contenders = self._contenders(task, banned)
        for name in banned.keys() - known:
            self._emit(CheckRow(task.workload, task.tokens, name, error=banned[name]))
        expected = None
        inputs = draw_inputs(task.spec, task.tokens, device="cuda", seed=self._seed)
        for each in contenders:
            done = each.name in known and each.name != OURS
            if done or each.missing() or each.refuses(task.spec, task.tokens):
                continue
            self._announce(each.name)
            wrong: tuple[str, ...] = ()
            difference, error = None, ""
            try:
                if each.name == OURS:
                    wrong = tuple(self._faults(task.spec))
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

    def _faults(self, spec: Spec) -> list[str]:
        """What is wrong with our operator's outputs, gradients and selection at a length that ends inside blocks."""
        case, dtype = Case(RAGGED, batch=1, twice=False), getattr(torch, spec.dtype)
        inputs = make_inputs(spec, batch=1, tokens=RAGGED, dtype=dtype, device="cuda", seed=self._seed)
        p, backward = OracleParameters.from_spec(spec), "backward" in spec.passes
        return faults(check_case(self._package(spec), p, case, inputs, with_gradients=backward))


def rows_of(task: Task, found: list[Measurement], gpu_key: str | None) -> list[Row]:
    """One row for each contender and pass; our operator's rows also have its necessary work."""
    spec = task.spec
    shape = ((spec.heads.query, spec.heads.kv), (spec.head_dim.qk, spec.head_dim.v), spec.dtype)
    place = (task.workload, task.part, task.inputs, task.tokens, *shape)
    rows = []
    for one in found:
        dense = one.contender in CONTENDERS and CONTENDERS[one.contender].dense
        for direction in task.passes:
            said: dict[str, Any] = {"note": one.note, "refusal": one.refusal, "error": one.errors.get(direction, "")}
            if (timing := one.timings.get(direction)) is not None:
                said |= asdict(timing)
                if one.contender == OURS:
                    said |= _necessary(spec, task.tokens, direction, gpu_key)
            rows.append(Row(*place, one.contender, dense, direction, **said))
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
    """The output of a contender, after its backward has also run."""
    o = prepared.call()
    if PASSES[1] in passes:
        torch.autograd.grad(o, prepared.leaves, prepared.do, allow_unused=True)
    torch.cuda.synchronize()
    return o.detach()


def _synchronize(contender: str, reason: str) -> None:
    """Raise DeviceLost if an error has left the device unusable."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(contender, reason, []) from error


def _errors(lost: DeviceLost) -> list[str]:
    """The culprit's errors."""
    of_it = [each.problem for each in lost.measurements if each.contender == lost.contender and each.problem]
    return of_it or [str(lost)]


def _selected(package: Any, inputs: Inputs) -> torch.Tensor | None:
    """The blocks that our operator selects, (1, T, Hkv, n) int32; None if it does not select."""
    if inputs.indices is not None:
        return None
    _, positional, arguments = arguments_of(package, inputs, False)
    with torch.no_grad():
        _, aux = package.nsa_attention(*positional, **arguments, return_aux=True)
    return getattr(aux, "indices", None)


def estimates(spec: Spec, tokens: int, gpu_key: str | None) -> dict[str, KernelEstimate]:
    """The cost model's estimates of a spec's kernels, by kernel. FLOPs and bytes do not depend on the GPU.

    `gpu_key` decides the floors. With None, they are the H100's and must not be used.
    """
    return {one.kernel: one for one in explain(_lowered(spec), tokens=tokens, gpu_key=gpu_key or "h100")}


@functools.lru_cache(maxsize=32)
def _lowered(spec: Spec) -> Plan:
    """A spec's plan. It is cached: lowering takes half a second, and a benchmark asks for a few specs many times."""
    return lower(spec)


def breakdown(prepared: Prepared, task: Task, gpu_key: str | None) -> list[KernelRow]:
    """Profile one forward and, if the spec has one, one backward of our operator; the longest kernels come first."""
    backward = "backward" in task.spec.passes
    found: dict[str, Any] = {}

    def forward() -> None:
        with torch.set_grad_enabled(backward):
            found["o"] = prepared.call()

    rows = _profiled(forward, "forward", task, gpu_key)
    if backward:
        arguments = prepared.leaves, prepared.do
        rows += _profiled(
            lambda: torch.autograd.grad(found.pop("o"), *arguments, allow_unused=True), "backward", task, gpu_key
        )
    return sorted(rows, key=lambda one: -one.ms)


def _profiled(action: Callable[[], Any], direction: str, task: Task, gpu_key: str | None) -> list[KernelRow]:
    """Every kernel that runs in an action, with the cost model's data on it."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        action()
        torch.cuda.synchronize()
    known = estimates(task.spec, task.tokens, gpu_key)
    branches = {kernel.name: kernel.branch for kernel in _lowered(task.spec).kernels}
    rows = []
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.self_device_time_total <= 0:
            continue
        own = event.key.removesuffix("_kernel")
        planned = ordinary_kernel(own)
        one = known.get(planned)
        # The estimates cover one schedule. Kernels of another one belong to the package too.
        branch = branches.get(planned, OTHER)
        name = event.key[:120] if branch == OTHER else own
        costs: tuple[Any, ...] = ()
        if one is not None:
            floor = (None, "") if gpu_key is None else (1000 * one.seconds_floor, one.limited_by)
            costs = (one.flops, one.bytes, *floor)
        time = (event.self_device_time_total / 1000, event.count)
        rows.append(KernelRow(task.workload, task.inputs, task.tokens, name, branch, direction, *time, *costs))
    return rows


def _gpu_key() -> str | None:
    gpu = gpu_for_device(torch.cuda.get_device_name())
    return None if gpu is None else gpu.key


def task_fields(task: Task) -> dict[str, Any]:
    """A task as the fields of a request."""
    return {**vars(task), "spec": task.spec.resolved_yaml()}


def task_of(fields: Mapping[str, Any]) -> Task:
    """The inverse of `task_fields`, through JSON."""
    lists = {name: tuple(fields[name]) for name in ("contenders", "passes")}
    return Task(**{**fields, **lists, "spec": parse_spec(fields["spec"])})


def main() -> None:
    """Serve with the GPU of this machine."""

    def build(opening: dict[str, Any]) -> Handle:
        note_launches()
        return TaskRunner(opening["seed"]).handle

    serve(build)


if __name__ == "__main__":
    main()
