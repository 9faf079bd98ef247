"""What runs inside the measuring process: a package under candidates, held against the oracle, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import triton

from nsa_gen.bench.contenders import Operator, Prepared
from nsa_gen.bench.measure import Clock, CudaClock, DeviceLost, Measurement, first_line, race
from nsa_gen.rendering import import_package
from nsa_gen.spec import parse_spec
from nsa_gen.tuning.inputs import bucket_inputs
from nsa_gen.tuning.lengths import check_tokens
from nsa_gen.tuning.shapes import Bucket
from nsa_gen.tuning.store import Configs
from nsa_gen.tuning.worker import Lost
from nsa_gen.verification.cases import Case
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.gradients import References
from nsa_gen.verification.inputs import make_inputs
from nsa_gen.verification.verify import check_case, environment

if TYPE_CHECKING:
    from nsa_gen.spec import Spec
    from nsa_gen.verification.inputs import Inputs

FLUSHED_OVER_L2 = 2
USUAL_L2_BYTES = 2**26
"""Taken for the L2 cache's size where the driver does not tell."""


class ColdClock(CudaClock):
    """A clock that overwrites the L2 cache before each sample."""

    def __init__(self) -> None:
        super().__init__()
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or USUAL_L2_BYTES
        self._flushed = torch.empty(FLUSHED_OVER_L2 * cache, dtype=torch.uint8, device="cuda")

    def reset_peak(self) -> None:
        self._flushed.zero_()
        super().reset_peak()


class Tuned(Operator):
    """The operator under a candidate's configurations."""

    def __init__(self, package: Any, number: int, configs: Configs) -> None:
        super().__init__(package, str(number))
        self._configs = configs

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        return replace(super().prepare(spec, inputs), within=lambda: overridden(self._package, self._configs))


@contextmanager
def overridden(package: Any, configs: Configs) -> Iterator[None]:
    """Within the block a package launches with these configurations in place of its own."""
    with ExitStack() as stack:
        for name, values in configs.items():
            stack.enter_context(package.configs.override(name, **values))
        yield


class GpuEngine:
    """Checks and times candidates on the current GPU. What is not overridden is the cost model's choice, always.

    `opening` has the folder of the `package`, the `spec` as text and a `seed`. Another device and a clock for it are
    for tests: on the CPU the kernels are interpreted.
    """

    def __init__(self, opening: dict[str, Any], device: torch.device | None = None, clock: Clock | None = None) -> None:
        self._spec = parse_spec(opening["spec"])
        self._seed = int(opening.get("seed", 0))
        if device is None and not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU")
        self._package = import_package(opening["package"])
        self._device = device or torch.device("cuda", torch.cuda.current_device())
        # Nothing tuned before may stand in for the default.
        self._package.configs.use_target(self._package.configs.architecture(self._device)).__enter__()
        self._clock = clock or ColdClock()
        self._drawn_for: Bucket | None = None
        self._drawn: dict[str, Inputs] = {}
        self._checks: dict[str, tuple[Case, Inputs, References]] = {}

    def device(self) -> dict[str, Any]:
        gpu = self._package.configs.gpu_of(self._device)
        if gpu is None:
            raise RuntimeError("kernels are interpreted here; start without TRITON_INTERPRET")
        driver = environment(self._device).driver
        return {
            "name": gpu.name,
            "multiprocessors": gpu.multiprocessors,
            "architecture": gpu.architecture,
            "driver": driver,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "count": torch.cuda.device_count(),
        }

    def check(
        self, candidates: list[Configs], announce: Callable[[int], None], *, bucket: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Hold each candidate's outputs, gradients and selection against the oracle."""
        case, inputs, references = self._check_of(Bucket.from_json(bucket))
        return [
            self._checked(number, configs, announce, case, inputs, references)
            for number, configs in enumerate(candidates)
        ]

    def _checked(
        self,
        number: int,
        configs: Configs,
        announce: Callable[[int], None],
        case: Case,
        inputs: Inputs,
        references: References,
    ) -> dict[str, Any]:
        announce(number)
        try:
            with overridden(self._package, configs):
                rows = check_case(
                    self._package,
                    OracleParameters.from_spec(self._spec),
                    case,
                    inputs,
                    with_gradients="backward" in self._spec.passes,
                    references=references,
                )
            self._clock.recover()
        except Exception as error:
            return {"error": self._survived(error)}
        wrong = [
            f"{row.quantity} {row.error:.3g} of {row.bound:.3g} {row.problem}".strip() for row in rows if not row.ok
        ]
        return {"error": f"wrong: {'; '.join(wrong)}"} if wrong else {}

    def _check_of(self, bucket: Bucket) -> tuple[Case, Inputs, References]:
        """One call to check with, the same for all buckets that are packed, or that are not."""
        kind = f"{bucket.packed} {min(bucket.batch, 2)}"
        if kind not in self._checks:
            tokens = check_tokens(self._spec)
            shape = (tokens // 2 + 5, 1, tokens // 2 - 6) if bucket.packed else tokens
            case = Case(shape, batch=1 if bucket.packed else min(bucket.batch, 2), twice=False)
            dtype = getattr(torch, self._spec.dtype)
            inputs = make_inputs(
                self._spec, batch=case.batch, tokens=shape, dtype=dtype, device=self._device, seed=self._seed
            )
            self._checks[kind] = case, inputs, References()
        return self._checks[kind]

    def race(
        self,
        candidates: list[Configs],
        announce: Callable[[int], None],
        *,
        bucket: dict[str, Any],
        inputs: str,
        passes: list[str],
        seconds: float,
    ) -> list[dict[str, Any]]:
        """Time candidates in turn, round after round."""
        contenders = [Tuned(self._package, number, configs) for number, configs in enumerate(candidates)]
        drawn = self._inputs(Bucket.from_json(bucket), inputs)
        try:
            found = race(
                contenders,
                self._spec,
                drawn,
                passes=passes,
                seconds=seconds,
                clock=self._clock,
                announce=lambda name: announce(int(name)),
            )
        except DeviceLost as lost:
            announce(int(lost.contender))
            raise Lost(str(lost)) from lost
        return [reading_of(each) for each in found]

    def _inputs(self, bucket: Bucket, kind: str) -> Inputs:
        """The inputs of a bucket; those of the last one are kept."""
        if bucket != self._drawn_for:
            self._drawn_for, self._drawn = bucket, {}
            self._clock.recover()
        if kind not in self._drawn:
            self._drawn[kind] = bucket_inputs(self._spec, bucket, kind, device=self._device, seed=self._seed)  # type: ignore[arg-type]
        return self._drawn[kind]

    def _survived(self, error: Exception) -> str:
        """An error in words; raises Lost if the GPU did not survive it."""
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
