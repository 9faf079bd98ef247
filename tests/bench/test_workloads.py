"""The comparison's shapes and tasks."""

from __future__ import annotations

import pytest

from nsa_gen.bench.workloads import comparison_tasks, nsa_spec, parts, spec_tasks
from nsa_gen.lowering import lower

CONTENDERS = ("cudnn", "fa4", "fla")


def test_the_workloads_are_those_that_the_figures_of_the_field_are_of():
    shapes = {
        name: [(spec.heads.query, spec.heads.kv, spec.head_dim.qk, spec.head_dim.v) for spec in part.specs.values()]
        for name, part in parts().items()
    }
    assert shapes["A"] == [(64, 4, 128, 128)]
    assert shapes["B"] == [(32, 8, 128, 128)]
    assert shapes["C"] == [(16, 16, 128, 128)]
    assert shapes["D"] == [(64, 4, 192, 128)]
    assert [query // kv for query, kv, *_ in shapes["groups"]] == [1, 2, 4, 7, 8, 16, 32]
    assert all(
        query in (4 * kv_group, 8 * kv_group) for query, kv, *_ in shapes["groups"] for kv_group in [query // kv]
    )
    assert [query // kv for query, kv, *_ in shapes["breakeven"]] == [16, 4]


def test_every_spec_is_the_nsa_setting_and_can_be_lowered_for_both_passes():
    for part in parts().values():
        for spec in part.specs.values():
            assert (spec.compression.block, spec.compression.stride, spec.compression.phi.key) == (32, 16, "mean")
            assert (spec.selection.block, spec.selection.count) == (64, 16)
            assert (spec.selection.initial, spec.selection.local, spec.window.size) == (1, 2, 512)
            assert spec.combine.gate == "sigmoid" and spec.passes == ("forward", "backward")
    assert lower(parts()["D"].specs["D"]).backward


def test_each_spec_is_checked_once_and_before_anything_is_timed():
    tasks = comparison_tasks(parts().values(), CONTENDERS)
    checks = [task.spec.digest() for task in tasks if task.check]
    assert len(checks) == len(set(checks)) == 9  # the break-even search and two groups of the sweep are A's and B's
    assert all(task.check for task in tasks[: len(checks)]) and tasks[0].workload == "A"
    assert {task.spec.digest() for task in tasks if not task.check} == set(checks)
    assert all(task.contenders == CONTENDERS for task in tasks)


def test_the_parts_hold_the_lengths_and_the_inputs_that_are_asked_for():
    timed = [task for task in comparison_tasks(parts().values(), CONTENDERS) if not task.check]
    of_a = {(task.tokens, task.inputs) for task in timed if task.part == "A"}
    assert of_a == {(1024 * k, kind) for k in (8, 32, 64, 128) for kind in ("independent", "correlated")}
    assert {task.tokens for task in timed if task.part == "groups"} == {32768}
    lengths = {task.tokens for task in timed if task.part == "breakeven"}
    assert min(lengths) == 2048 and max(lengths) == 16384
    assert any(task.profile for task in timed) and not any(
        task.profile for task in timed if task.inputs == "correlated"
    )


@pytest.mark.parametrize("passes", [("forward",), ("forward", "backward")])
def test_the_tasks_of_one_spec_are_a_check_and_every_length_of_every_kind(passes):
    spec = nsa_spec("mine", 8, 2)
    check, *timed = spec_tasks(
        spec, lengths=(100, 300), inputs=("independent", "correlated"), contenders=CONTENDERS, passes=passes
    )
    assert check.check and {task.passes for task in (check, *timed)} == {passes}
    assert [(task.inputs, task.tokens) for task in timed] == [
        ("independent", 100),
        ("independent", 300),
        ("correlated", 100),
        ("correlated", 300),
    ]
    assert [task.tokens for task in timed if task.profile] == [300]
