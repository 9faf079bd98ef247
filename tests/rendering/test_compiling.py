"""Packages of specs that no person chose compile, for a GPU of each vendor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from nsa_gen.spec import Spec
from nsa_gen.targets import compile_spec
from tests.lowering.drawn_specs import drawn_specs

TARGETS = ("sm_90", "gfx942")


def light(spec: Spec) -> bool:
    """Whether a compiler is quickly done with it: few kernels, small tiles, and few blocks to select."""
    sizes = [spec.head_dim.qk, spec.head_dim.v]
    sizes += [spec.selection.block, 4 * spec.selection.count] if spec.selection else []
    sizes += [spec.compression.block, spec.compression.phi.hidden or 0] if spec.compression else []
    few = len(spec.branches) == 1 or "backward" not in spec.passes
    return max(sizes) <= 128 and spec.heads.group <= 8 and few


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_drawn_spec_compiles_for_a_gpu_of_each_vendor(number, tmp_path):
    spec = [spec for spec in drawn_specs() if light(spec)][number]
    report = compile_spec(spec, TARGETS, jobs=2, cache_dir=tmp_path / "cache")
    assert [f"{row.target} {row.kernel}: {row.reason}" for row in report.rows if not row.ok] == []
    assert {row.target for row in report.rows} == set(TARGETS)


ROOT = Path(__file__).resolve().parents[2]


def refused(specs: Iterable[Spec], folder: Path) -> str:
    """What Triton's front end refuses of the kernels of specs, or of those of unusual sizes; "" if nothing."""
    paths = []
    for number, spec in enumerate(specs):
        paths.append(folder / f"{number}.yaml")
        paths[-1].write_text(spec.resolved_yaml(), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.rendering.lower_kernels", *map(str, paths)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    return "" if done.returncode == 0 else done.stdout[-3000:] + done.stderr[-3000:]


def test_triton_s_front_end_takes_every_kernel_of_unusual_sizes(tmp_path: Path) -> None:
    assert refused((), tmp_path) == ""


def test_triton_s_front_end_takes_every_kernel_of_drawn_specs(tmp_path: Path) -> None:
    assert refused(drawn_specs(), tmp_path) == ""
