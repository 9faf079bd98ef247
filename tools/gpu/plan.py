"""Which jobs the suite runs, made of what the command line asked for and the numbers of sizes.py."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_gen.lowering import lower
from nsa_gen.spec import load_spec
from tools.gpu import far_specs, sanitizer, sizes
from tools.gpu.packages import variant
from tools.gpu.pool import Job


@dataclass(frozen=True)
class Plan:
    """What the command line asked for."""

    specs: tuple[str, ...]
    parts: tuple[str, ...]
    dtypes: tuple[str, ...]
    lengths: tuple[int, ...]
    device: str
    seed: int
    root: Path
    lengths_only: bool = False
    gpu_memory_gb: float = 80.0
    workers: int = 6
    examples: int | None = None
    soak_seconds: float = 600.0

    def jobs(self, part: str) -> list[Job]:
        """The jobs of a part. Empty where none of the specs asked for belongs to it."""
        return {
            "correctness": self._correctness,
            "examples": self._examples,
            "repeats": self._repeats,
            "hopper": self._hopper,
            "hygiene": self._hygiene,
            "long": self._long,
            "sanitizer": self._sanitizer,
            "far": self._far,
            "soak": self._soak,
            "tuner_faults": self._tuner_faults,
            "inference": self._inference,
            "pytorch": self._pytorch,
            "training": self._training,
            "fla": self._fla,
            "decode": self._decode,
            "bench": self._bench,
        }[part]()

    def _correctness(self) -> list[Job]:
        packed = sizes.PACKED if self.device == "cuda" and not self.lengths_only else ()
        return [
            self._job(
                f"verify {spec} {dtype}",
                _weight(spec, dtype),
                kind="verify",
                spec=spec,
                dtype=dtype,
                lengths=self.lengths,
                packed=packed,
                lengths_only=self.lengths_only,
                slots=self._slots,
                device=self.device,
            )
            for spec in self.specs
            for dtype in self.dtypes
        ]

    def _long(self) -> list[Job]:
        spec, tokens = sizes.LONG
        if spec not in self.specs:
            return []
        request: dict[str, Any] = {"spec": spec, "dtype": "bfloat16", "tokens": tokens, "rows": sizes.LONG_ROWS}
        return [self._job(f"long {spec} {tokens}", 1e6, kind="long", device=self.device, slots=self._slots, **request)]

    def _examples(self) -> list[Job]:
        """Each shipped spec in each dtype, then drawn specs, each in one; every job has seeds of its own."""
        total = self.examples or sizes.EXAMPLES[self.device]
        shipped = [(spec, dtype) for spec in self.specs for dtype in self.dtypes]
        drawn = [(number, self.dtypes[number % len(self.dtypes)]) for number in range(sizes.DRAWN_SPECS[self.device])]
        of_shipped = _shares(int(total * sizes.SHIPPED_SHARE[self.device]), len(shipped))
        of_drawn = _shares(total - sum(of_shipped), len(drawn))
        jobs: list[Job] = []
        for number, ((spec, dtype), count) in enumerate(zip(shipped, of_shipped, strict=True)):
            request = {"spec": spec, "spec_seed": None, "dtype": dtype, "count": count, "first": number}
            jobs += self._example_job(f"examples {spec} {dtype}", _weight(spec, dtype), **request)
        for (number, dtype), count in zip(drawn, of_drawn, strict=True):
            spec_seed, first = self.seed + number, len(shipped) + number
            request = {"spec": None, "spec_seed": spec_seed, "dtype": dtype, "count": count, "first": first}
            jobs += self._example_job(f"examples drawn {spec_seed} {dtype}", 1000.0, **request)
        return jobs

    def _example_job(self, name: str, expected: float, *, first: int, **request: Any) -> list[Job]:
        if not request["count"]:
            return []
        seed = self.seed + sizes.EXAMPLE_SEEDS * (first + 1)
        return [self._job(name, expected, kind="examples", slots=self._slots, device=self.device, seed=seed, **request)]

    def _soak(self) -> list[Job]:
        return [
            self._job(
                f"soak {worker}",
                kind="soak",
                worker=worker,
                seconds=self.soak_seconds,
                per_spec=sizes.SOAK_PER_SPEC[self.device],
                slots=self._slots,
                device=self.device,
                seed=sizes.SOAK_SEED + self.seed,
            )
            for worker in range(self.workers)
        ]

    def _tuner_faults(self) -> list[Job]:
        faults = (*sizes.TUNER_FAULTS, *sizes.TUNER_RUNS)
        return [self._job(f"tuner {fault}", kind="tuner fault", fault=fault) for fault in faults]

    def _repeats(self) -> list[Job]:
        repeats, shapes = sizes.REPEATS[self.device]
        return [
            self._job(
                f"repeats {spec}",
                _weight(spec, "bfloat16"),
                kind="repeats",
                spec=spec,
                shapes=shapes,
                repeats=repeats,
                device=self.device,
            )
            for spec in self._runnable
        ]

    def _hopper(self) -> list[Job]:
        if self.device != "cuda":
            return []
        return [
            self._job(f"hopper {spec} {dtype}", kind="hopper", spec=spec, dtype=dtype, device=self.device)
            for spec in self.specs
            for dtype in self.dtypes
            if lower(variant(spec, dtype)).hopper
        ]

    def _hygiene(self) -> list[Job]:
        return [
            self._job(
                f"hygiene {spec}",
                _weight(spec, "bfloat16"),
                kind="hygiene",
                spec=spec,
                shapes=sizes.HYGIENE[self.device],
                slots=self._slots,
                device=self.device,
            )
            for spec in self._runnable
        ]

    @property
    def _runnable(self) -> tuple[str, ...]:
        """The specs that run in their own dtype: on the CPU those that are neither bfloat16 nor large."""
        return tuple(spec for spec in self.specs if self.device == "cuda" or load_spec(spec).dtype != "bfloat16")

    def _far(self) -> list[Job]:
        dtype = "bfloat16" if self.device == "cuda" else "float16"
        limit = sizes.FAR_LIMIT[self.device]
        common: dict[str, Any] = {"limit": limit, "slots": self._slots, "device": self.device}
        apart = [
            self._job(
                f"far apart {name}",
                kind="far apart",
                spec=text.replace("DTYPE", dtype),
                batch=3,
                tokens=far_specs.APART_TOKENS[self.device],
                **common,
            )
            for name, text in far_specs.APART.items()
        ]
        along = [
            self._job(
                f"far along {name}",
                1e3,
                kind="far along",
                spec=each.spec.replace("DTYPE", dtype),
                lengths=each.lengths if self.device == "cuda" else each.few,
                packed=each.packed,
                shares=2,
                **common,
            )
            for name, each in far_specs.ALONG.items()
        ]
        return [*along, *apart]

    def _sanitizer(self) -> list[Job]:
        program = sanitizer.program()
        if program is None:
            return []
        # Every allocation its own, so that a read past one tensor does not land in the next.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTORCH_CUDA_ALLOC_CONF": ""}
        return [
            self._job(
                f"{tool} {name}",
                1e7 if tool == "racecheck" else 1e6,
                prefix=sanitizer.command(program, tool),
                environment=environment,
                kind="touch",
                spec=text,
                dtype=None,
                heads=None,
                batch=2,
                shapes=shapes,
                steps=True,
                device=self.device,
            )
            for tool, shapes in sanitizer.SHAPES.items()
            for name, text in sanitizer.SPECS.items()
        ]

    def _pytorch(self) -> list[Job]:
        specs = [spec for spec in sizes.PYTORCH if spec in self._runnable]
        return [self._job(f"pytorch {spec}", kind="pytorch", spec=spec, device=self.device) for spec in specs]

    def _training(self) -> list[Job]:
        return [self._job("training", 1e6, kind="training", device=self.device)]

    def _fla(self) -> list[Job]:
        return [] if missing_for_fla() else [self._job("fla", kind="fla", device=self.device)]

    def compile_for_bench(self) -> list[Job]:
        """Jobs that leave the benchmark's kernels in Triton's cache, side by side; the benchmark itself runs alone."""
        return [
            self._job(
                f"compile {spec}",
                kind="touch",
                spec=spec,
                dtype="bfloat16",
                heads=None,
                batch=1,
                shapes=(511, 1024),
                device=self.device,
            )
            for spec in sizes.BENCHED
            if spec in self.specs
        ]

    @property
    def _slots(self) -> int:
        return max(1, int((self.gpu_memory_gb - sizes.RESERVED_GB * self.workers) // sizes.MEMORY_SHARE_GB))

    def _decode(self) -> list[Job]:
        return [
            self._job(f"decode {spec}", -number, kind="decode", spec=spec, shapes=sizes.DECODE_SHAPES, timed=True)
            for number, spec in enumerate(sizes.DECODED)
            if spec in self.specs
        ]

    def compile_for_decode(self) -> list[Job]:
        """Jobs that leave in Triton's cache what the times of decode and prefill need, side by side."""
        return [
            self._job(
                f"compile decode {spec} {number}",
                -number,
                kind="decode",
                spec=spec,
                shapes=sizes.DECODE_SHAPES[number :: sizes.DECODE_JOBS],
                timed=False,
                prefill=number == 0,
            )
            for spec in sizes.DECODED
            if spec in self.specs
            for number in range(sizes.DECODE_JOBS)
        ]

    def _inference(self) -> list[Job]:
        """Scenarios of each spec that decodes, a few a job, since most of their time is compilation."""
        jobs, each = sizes.SCENARIO_JOBS[self.device]
        return [
            self._job(
                f"inference {spec} {number}",
                1e5,
                kind="inference",
                spec=spec,
                device=self.device,
                first=number * each,
                count=each,
                graphs=number == 0,
            )
            for spec in self._runnable
            if "decode" in load_spec(spec).passes
            for number in range(jobs)
        ]

    def _bench(self) -> list[Job]:
        return [
            self._job(
                f"bench {spec}",
                -number,
                kind="bench",
                spec=spec,
                dtype="bfloat16",
                lengths=lengths,
                profile_at=lengths[-1],
            )
            for number, (spec, lengths) in enumerate(sizes.BENCHED.items())
            if spec in self.specs
        ]

    def _job(
        self,
        name: str,
        expected: float = 0.0,
        *,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        **request: Any,
    ) -> Job:
        project = Path(__file__).resolve().parents[2]
        settings = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(project), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "2",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "TRITON_INTERPRET": "1" if self.device == "cpu" else "0",
            **(environment or {}),
        }
        text = json.dumps({"seed": self.seed, **request, "root": str(self.root)})
        return Job(name, (*prefix, sys.executable, "-m", "tools.gpu.worker", text), expected, settings)


def missing_for_fla() -> str:
    """Packages of the part `fla` that cannot be imported here; empty where all can."""
    return ", ".join(name for name in ("fla", "einops") if importlib.util.find_spec(name) is None)


def _weight(spec: str, dtype: str) -> float:
    """What orders the verifications: heads times head dims, and float32 compiles and runs slowest."""
    meaning = load_spec(spec)
    learned = 1.5 if meaning.compression is not None and meaning.compression.phi.hidden else 1.0
    slow = 1.5 if dtype == "float32" else 1.0
    return meaning.heads.query * (meaning.head_dim.qk + meaning.head_dim.v) * learned * slow


def _shares(total: int, parts: int) -> list[int]:
    """`total` in as many whole parts, none more than one larger than another."""
    return [total // parts + (number < total % parts) for number in range(parts)] if parts else []
