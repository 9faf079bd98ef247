"""A tuning without a GPU and without a compiler: the fake worker in real processes, and stage 0 from a formula."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nsa_gen.spec import Spec, parse_spec
from nsa_gen.tuning import Settings, Store, Tools
from nsa_gen.tuning.backend import Backend

SPEC = """\
version: 1
name: under_test
heads: {query: 4, kv: 1}
head_dim: 64
dtype: bfloat16
selection: {block: 64, count: 3, indices: input}
window: {size: 10}
combine: {gate: sigmoid}
passes: [forward, backward]
"""
COMMAND = (sys.executable, str(Path(__file__).parent / "fake_worker.py"))


def spec() -> Spec:
    """Two branches, one of them with a choice of schedule; bfloat16, as on a GPU."""
    return parse_spec(SPEC)


class FakeCompiler:
    """Compiles nothing: each configuration's code is its own, unless told which are the same or do not compile."""

    def __init__(self, package: Path, target: str, passes: Any, cache: Path, jobs: int | None) -> None:
        self.target = target

    def compile(
        self, wanted: Mapping[str, Any], done: Callable[[str, Any], None] = lambda key, answer: None
    ) -> dict[str, Any]:
        found = {}
        for key, (kernel, config, _) in wanted.items():
            found[key] = self.answer(kernel, config)
            done(key, found[key])
        return found

    def answer(self, kernel: str, config: dict[str, int]) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps([kernel, config], sort_keys=True).encode()).hexdigest()[:16]
        return {"binaries": [binary(shared_memory=sum(config.values()))], "digest": digest}


def binary(**changes: Any) -> dict[str, Any]:
    """What reading a binary gives."""
    usual = {"threads": 128, "registers": 100, "spill_bytes": 0, "shared_memory": 1000, "tensor_memory": 0}
    return {**usual, "binary_bytes": 5000, **changes}


def fake_backend(script: dict[str, Any], **limits: float) -> Callable[..., Backend]:
    """What makes a backend whose process does what the script says."""

    def make(package: Path, of: Spec, settings: Settings, number: int, say: Callable[[str], None]) -> Backend:
        environment = {**os.environ, "FAKE_GPU": json.dumps(script), "CUDA_VISIBLE_DEVICES": str(number)}
        return Backend(COMMAND, {}, environment, tell=say, **limits)

    return make


def fake_tools(cache: Path, script: dict[str, Any] | None = None, **limits: float) -> Tools:
    """Tools with a fake GPU; what is said is in their list `said`."""
    said: list[str] = []
    tools = Tools(
        say=said.append, backend=fake_backend(script or {}, **limits), compiler=FakeCompiler, store=Store(cache)
    )
    tools.said = said  # type: ignore[attr-defined]
    return tools
