"""Packages of specs that no person chose compile, for a GPU of each vendor."""

from __future__ import annotations

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


CHOSEN = [spec for spec in drawn_specs() if light(spec)][:2]


@pytest.mark.slow
@pytest.mark.parametrize("spec", CHOSEN, ids=[spec.name for spec in CHOSEN])
def test_a_drawn_spec_compiles_for_a_gpu_of_each_vendor(spec, tmp_path):
    report = compile_spec(spec, TARGETS, jobs=2, cache_dir=tmp_path / "cache")
    assert [f"{row.target} {row.kernel}: {row.reason}" for row in report.rows if not row.ok] == []
    assert {row.target for row in report.rows} == set(TARGETS)
