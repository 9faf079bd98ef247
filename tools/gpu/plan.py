"""Which jobs the suite runs: specs, dtypes, lengths, and what each may cost."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_gen.spec import load_spec
from tools.gpu.pool import Job

PARTS = ("correctness", "long", "sanitizer", "bench")
DTYPES = ("bfloat16", "float16", "float32")
LENGTHS = (1, 31, 63, 65, 511, 2049, 8192)
PACKED = ((700, 0, 1, 2049, 63), (1, 0, 511, 65, 0))
"""Packed batches beside verify's own, on a GPU: with sequences longer than a window, and than all selected blocks."""
LONG = ("llama3_8b", 131072)
LONG_ROWS = 48
SANITIZED = (("tiny", "float32", None), ("nsa_paper", "bfloat16", (6, 2)))
SANITIZER_PLACES = ("/usr/local/cuda/bin",)
BENCHED: Mapping[str, tuple[int, ...]] = {
    "llama3_8b": (8192, 32768, 65536),
    "nsa_64x4": (8192, 32768, 65536),
    "mha_16": (8192, 32768),
    "nsa_paper": (8192, 32768, 65536),
}
MEMORY_SHARE_GB = 25
"""What a process verifying 64 heads of 192 at 8192 tokens in float32 needs: some 20 tensors of 0.8 GB in float64."""


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

    def jobs(self, part: str) -> list[Job]:
        """The jobs of a part. Empty where none of the specs asked for belongs to it."""
        return {
            "correctness": self._correctness,
            "long": self._long,
            "sanitizer": self._sanitizer,
            "bench": self._bench,
        }[part]()

    def _correctness(self) -> list[Job]:
        packed = PACKED if self.device == "cuda" and not self.lengths_only else ()
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
        spec, tokens = LONG
        if spec not in self.specs:
            return []
        request: dict[str, Any] = {"spec": spec, "dtype": "bfloat16", "tokens": tokens, "rows": LONG_ROWS}
        return [self._job(f"long {spec} {tokens}", 1e6, kind="long", device=self.device, slots=self._slots, **request)]

    def _sanitizer(self) -> list[Job]:
        program = sanitizer_program()
        if program is None:
            return []
        # Every allocation its own, so that a read past one tensor does not land in the next.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTORCH_CUDA_ALLOC_CONF": ""}
        prefix = (program, "--tool", "memcheck", "--error-exitcode", "86")
        return [
            self._job(
                f"memcheck {spec} {dtype}",
                1e6,
                prefix=prefix,
                environment=environment,
                kind="touch",
                spec=spec,
                dtype=dtype,
                heads=heads,
                batch=2,
                shapes=(97, (33, 0, 1, 97)),
                device=self.device,
            )
            for spec, dtype, heads in SANITIZED
            if spec in self.specs
        ]

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
            for spec in BENCHED
            if spec in self.specs
        ]

    @property
    def _slots(self) -> int:
        return max(1, int(self.gpu_memory_gb // MEMORY_SHARE_GB))

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
            for number, (spec, lengths) in enumerate(BENCHED.items())
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
        text = json.dumps({**request, "seed": self.seed, "root": str(self.root)})
        return Job(name, (*prefix, sys.executable, "-m", "tools.gpu.worker", text), expected, settings)


def _weight(spec: str, dtype: str) -> float:
    """What orders the verifications: heads times head dims, and float32 compiles and runs slowest."""
    meaning = load_spec(spec)
    learned = 1.5 if meaning.compression is not None and meaning.compression.phi.hidden else 1.0
    slow = 1.5 if dtype == "float32" else 1.0
    return meaning.heads.query * (meaning.head_dim.qk + meaning.head_dim.v) * learned * slow


def sanitizer_program() -> str | None:
    """The path of compute-sanitizer, or None."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *SANITIZER_PLACES]))
