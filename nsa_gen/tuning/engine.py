"""The measuring process, `python -m nsa_gen.tuning.engine`: checks a package with candidates, then times them.

It is a worker (`nsa_gen.workers`) that answers {"do": "device" | "check" | "race", ...}. It reports {"now": number}
when it turns to a candidate and {"round": times} after each round of a race. It ends if a candidate made the GPU
unusable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton

from nsa_gen.bench.contenders import Contender
from nsa_gen.bench.decode import DecodeInputs, decode_inputs
from nsa_gen.bench.measure import GRAPH_BELOW_MS, Clock, DeviceLost, Measurement, Times, faults, first_line, race
from nsa_gen.hangs import note_launches
from nsa_gen.lowering import lower
from nsa_gen.rendering import import_package
from nsa_gen.spec import parse_spec
from nsa_gen.tuning.backend import handler
from nsa_gen.tuning.race import FORWARD, Race
from nsa_gen.tuning.space import Bucket, check_tokens
from nsa_gen.tuning.store import Configs
from nsa_gen.tuning.timed import (
    Call,
    DecodeStep,
    NoLaunch,
    Solo,
    Tuned,
    bucket_inputs,
    check_scenario,
    noted_launches,
    overridden,
)
from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.inference import run_scenario
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.gradients import References
from nsa_gen.verification.reference.inputs import make_inputs
from nsa_gen.verification.report import environment
from nsa_gen.workers import Handle, Lost, serve

if TYPE_CHECKING:
    from nsa_gen.verification.reference.inputs import Inputs
    from nsa_gen.verification.report import Row

FLUSHED_OVER_L2 = 2
USUAL_L2_BYTES = 2**26
"""Assumed L2 cache size if the driver does not report it."""
KEPT_MEMORY_SHARE = 0.4
"""The share of the GPU's memory that torch's allocator may keep between candidates."""
GRAPH_KERNELS_BELOW_MS = 1.0
"""Faster kernels, if timed alone, are replayed as a graph. Otherwise the launch would take as long as the kernel."""


class ColdClock(Clock):
    """A clock that overwrites the L2 cache before each sample, and keeps memory for the next candidate."""

    def __init__(self) -> None:
        super().__init__()
        properties = torch.cuda.get_device_properties(0)
        cache = getattr(properties, "L2_cache_size", 0) or USUAL_L2_BYTES
        self._most_kept = KEPT_MEMORY_SHARE * properties.total_memory
        self._flushed = torch.empty(FLUSHED_OVER_L2 * cache, dtype=torch.uint8, device="cuda")

    def reset_peak(self) -> None:
        self._flushed.zero_()
        super().reset_peak()

    def recover(self) -> None:
        """Wait for the device. Free memory only if much is kept: doing so per candidate costs more than a race."""
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > self._most_kept:
            super().recover()


class GpuEngine:
    """Checks and times candidates on the current GPU. Everything that is not overridden is the cost model's choice.

    `opening` has the folder of the `package`, the `spec` as text and a `seed`. Tests may pass another device and its
    clock: on the CPU, kernels are interpreted.
    """

    def __init__(self, opening: dict[str, Any], device: torch.device | None = None, clock: Clock | None = None) -> None:
        self._spec = parse_spec(opening["spec"])
        self._seed = int(opening.get("seed", 0))
        if device is None and not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU")
        self._package = import_package(opening["package"])
        self._device = device or torch.device("cuda", torch.cuda.current_device())
        # No earlier tuning may replace the default.
        self._package.configs.use_target(self._package.configs.architecture(self._device)).__enter__()
        self._clock = clock or ColdClock()
        self._drawn_for: Bucket | None = None
        self._drawn: dict[str, Inputs] = {}
        self._checks: dict[str, Callable[[], list[Row]]] = {}
        self._cache: DecodeInputs | None = None
        self._noted: tuple[tuple[Any, ...], Call] | None = None

    def device(self) -> dict[str, Any]:
        gpu = self._package.configs.gpu_of(self._device)
        if gpu is None:
            raise RuntimeError("kernels are interpreted here; start without TRITON_INTERPRET")
        driver = environment(self._device).driver
        versions = {"driver": driver, "torch": torch.__version__, "triton": triton.__version__}
        return {**gpu._asdict(), **versions, "count": torch.cuda.device_count()}

    def check(
        self, candidates: list[Configs], announce: Callable[[int], None], *, bucket: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Compare each candidate's outputs, gradients and selection with the oracle; of decode, a scenario's steps."""
        kind = Bucket(**bucket)
        rows_of = self._decode_check(kind) if kind.decode else self._operator_check(kind)
        answers = []
        for number, configs in enumerate(candidates):
            announce(number)
            try:
                with overridden(self._package, configs):
                    rows = rows_of()
                self._clock.recover()
            except Exception as error:
                answers.append({"error": self._survived(error)})
                continue
            wrong = faults(rows)
            answers.append({"error": f"wrong: {'; '.join(wrong)}"} if wrong else {})
        return answers

    def _decode_check(self, bucket: Bucket) -> Callable[[], list[Row]]:
        scenario = check_scenario(check_tokens(self._spec), min(bucket.batch, 2), self._seed)
        return partial(run_scenario, self._spec, self._package, scenario, self._device.type)

    def _operator_check(self, bucket: Bucket) -> Callable[[], list[Row]]:
        """A call to check with. It is the same for all packed buckets, and for all others."""
        kind = f"{bucket.packed} {min(bucket.batch, 2)}"
        if kind not in self._checks:
            tokens = check_tokens(self._spec)
            shape = (tokens // 2 + 5, 1, tokens // 2 - 6) if bucket.packed else tokens
            case = Case(shape, batch=1 if bucket.packed else min(bucket.batch, 2), twice=False)
            dtype = getattr(torch, self._spec.dtype)
            inputs = make_inputs(
                self._spec, batch=case.batch, tokens=shape, dtype=dtype, device=self._device, seed=self._seed
            )
            self._checks[kind] = partial(
                check_case,
                self._package,
                OracleParameters.from_spec(self._spec),
                case,
                inputs,
                with_gradients="backward" in self._spec.passes,
                references=References(),
            )
        return self._checks[kind]

    def race(
        self,
        candidates: list[Configs],
        announce: Callable[[int], None],
        *,
        earlier: Sequence[Sequence[Times | None]] = (),
        hear: Callable[[list[Times | None]], None] = lambda times: None,
        **more: Any,
    ) -> list[dict[str, Any]]:
        """Time candidates in turn, round after round. `more` are the fields of a `Race`."""
        asked = Race.from_json({"candidates": candidates, **more})
        bucket = asked.bucket
        announce(0)
        try:
            drawn: Any = self._decoded(bucket) if bucket.decode else self._inputs(bucket, asked.inputs)
            contenders = self._contenders(asked, drawn)
        except NoLaunch:
            return [{"times": {}, "error": ""} for _ in candidates]
        except Exception as error:
            # All others are compared with the first candidate: without it there is no race.
            return [{"times": {}, "error": "" if n else self._survived(error)} for n in range(len(candidates))]
        try:
            found = race(
                contenders,
                self._spec,
                drawn,
                passes=asked.passes,
                seconds=asked.seconds,
                clock=self._clock,
                announce=lambda name: announce(int(name)),
                graph_below_ms=0.0 if bucket.decode else GRAPH_KERNELS_BELOW_MS if asked.kernel else GRAPH_BELOW_MS,
                earlier=earlier,
                hear=hear,
            )
        except DeviceLost as lost:
            announce(int(lost.contender))
            raise Lost(str(lost)) from lost
        return [reading_of(each) for each in found]

    def _contenders(self, asked: Race, drawn: Any) -> list[Contender]:
        numbered = [(number, candidate.configs) for number, candidate in enumerate(asked.candidates)]
        if asked.bucket.decode:
            return [DecodeStep(drawn, *each) for each in numbered]
        if not asked.kernel:
            return [Tuned(self._package, *each) for each in numbered]
        call = self._call_of(asked, drawn)
        return [Solo(self._package, *each, call) for each in numbered]

    def _call_of(self, asked: Race, drawn: Inputs) -> Call:
        """The call that launches a kernel, as in a whole pass of the first candidate. The last one is kept."""
        first = asked.candidates[0]
        key = (asked.kernel, first.key, asked.bucket, asked.inputs)
        if self._noted is not None and self._noted[0] == key:
            return self._noted[1]
        self._noted = None
        prepared = Tuned(self._package, 0, first.configs).prepare(self._spec, drawn)
        with prepared.within(), noted_launches(self._package, lower(self._spec).kernel(asked.kernel)) as noted:
            backward = FORWARD not in asked.passes
            with torch.set_grad_enabled(backward):
                o = prepared.call()
            if backward:
                torch.autograd.grad(o, prepared.leaves, prepared.do, allow_unused=True)
        if not noted:
            raise NoLaunch(f"{asked.kernel} is not launched")
        self._noted = key, noted[0]
        return noted[0]

    def _decoded(self, bucket: Bucket) -> DecodeInputs:
        """The cache of a decode bucket. The last one is kept."""
        if bucket != self._drawn_for or self._cache is None:
            self._forget(bucket)
            self._cache = decode_inputs(
                self._spec, self._package, bucket.tokens, bucket.batch, device=self._device, seed=self._seed
            )
        return self._cache

    def _forget(self, bucket: Bucket) -> None:
        """Free what belongs to the previous bucket."""
        self._drawn_for, self._drawn, self._cache, self._noted = bucket, {}, None, None
        self._clock.recover()

    def _inputs(self, bucket: Bucket, kind: str) -> Inputs:
        """The inputs of a bucket. The last ones are kept."""
        if bucket != self._drawn_for:
            self._forget(bucket)
        if kind not in self._drawn:
            self._drawn[kind] = bucket_inputs(self._spec, bucket, kind, device=self._device, seed=self._seed)  # type: ignore[arg-type]
        return self._drawn[kind]

    def _survived(self, error: Exception) -> str:
        """An error's text. Raises Lost if the GPU did not survive the error."""
        reason = first_line(error)
        try:
            self._clock.recover()
        except RuntimeError as lost:
            raise Lost(reason) from lost
        return reason


def reading_of(found: Measurement) -> dict[str, Any]:
    """A measurement as an answer: times by pass, or the error."""
    times = {
        name: {"median": each.median_ms, "low": each.low_ms, "high": each.high_ms, "repeats": each.repeats}
        for name, each in found.timings.items()
    }
    return {"times": {} if found.problem else times, "error": found.problem}


def main() -> None:
    """Serve with the GPU of this machine."""

    def build(opening: dict[str, Any]) -> Handle:
        note_launches()
        return handler(GpuEngine(opening))

    serve(build)


if __name__ == "__main__":
    main()
