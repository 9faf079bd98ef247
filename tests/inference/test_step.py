"""A decode step in one launch: the same as in three, whatever the lengths, the layout and the number of programs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nsa_gen.hardware import gpu
from nsa_gen.lowering import lower
from nsa_gen.lowering.decode_step import ALWAYS, decode_step_fits, kernels_of_call, programs_per_list
from nsa_gen.rendering import import_package
from nsa_gen.spec import load_spec
from nsa_gen.verification.inference import Scenario, Step, run_scenario
from tests.inference.test_choice import BLOCKS, IMPORTANCE, best, package
from tests.inference.test_scenarios import PASSES, SPECS, STEPS
from tests.support import DEVICE, Operator, operator_of, small_spec

OUTPUTS = ("o_cmp", "lse_cmp", "o_slc", "lse_slc", "o_win", "lse_win", "indices", "counts")
FITTING = [
    name
    for name, changes in SPECS.items()
    if decode_step_fits(small_spec(**{"branches": "cmp slc win", "passes": PASSES, **changes}))
]


@contextmanager
def in_one_launch(op: Operator, splits: int) -> Iterator[list[int]]:
    """Within the block, `splits` programs share each list. The yielded list gets their number for each step."""
    seen: list[int] = []
    decode = op.module.decode
    launched = decode.decode_step

    def step_splits(*_: Any) -> int:
        return splits

    def decode_step(*arguments: Any) -> None:
        seen.append(arguments[-1])
        launched(*arguments)

    with mock.patch.multiple(decode, step_splits=step_splits, decode_step=decode_step):
        yield seen


def widened(cache: Any, splits: int) -> None:
    """Give a cache's workspace the parts of `splits` programs per list, and fill what a step must write."""
    workspace = cache.workspace
    rows = 3 * workspace.sums.shape[0] * splits
    parts = {name: getattr(workspace, name) for name in ("parts", "max_parts", "sum_parts")}
    cache.workspace = workspace._replace(**{name: x.new_empty(rows, *x.shape[1:]) for name, x in parts.items()})
    for name, tensor in cache.workspace._asdict().items():
        if name not in ("counters", "arrivals"):
            tensor.fill_(math.nan if tensor.is_floating_point() else -7)


def test_what_the_kernel_serves() -> None:
    assert {"half precision", "codes", "keys of each branch", "blocks that reach over three others"} <= set(FITTING)
    others = {"maxima", "compressed scores, all heads together", "mlp and linear", "mean scores beside compression"}
    assert not others & set(FITTING)
    plan = lower(small_spec("cmp slc win", passes=PASSES))
    limits = {target: configs["decode_launches"].mapping() for target, configs in plan.defaults.items()}
    assert {target for target, limit in limits.items() if limit["MOST_ROUNDS"]} == {"sm_90"}


@pytest.mark.parametrize("name", FITTING)
def test_a_step_in_one_launch_decodes_what_one_forward_computes(name: str) -> None:
    changes = {"branches": "cmp slc win", **SPECS[name]}
    op = operator_of(changes.pop("branches"), scale=0.37, passes=PASSES, **changes)
    page_size, splits = ((None, 3), (16, 4))[FITTING.index(name) % 2]
    with in_one_launch(op, splits) as seen:
        rows = run_scenario(op.spec, op.module, Scenario(2, 140, page_size, STEPS), DEVICE.type)
    assert rows and [row for row in rows if not row.ok] == []
    assert set(seen) == {splits} and len(seen) >= 2


@pytest.mark.parametrize("splits", [1, 2, 5, 8])
@pytest.mark.parametrize("dims", [(16, 16), (24, 40)])
def test_the_result_is_that_of_three_launches_and_nothing_that_was_left_shows(
    splits: int, dims: tuple[int, int]
) -> None:
    op = operator_of(passes=PASSES, kv_heads=2, group=3, count=5, dims=dims, window=40)
    lengths, heads = [300, 37, 1, 0, 150], 6
    generator = torch.Generator().manual_seed(splits)
    k, v = (torch.randn(len(lengths), max(lengths), 2, dim, generator=generator).to(DEVICE) for dim in dims)
    for new in (1, 3):
        q, gates = (torch.randn(len(lengths), new, heads, n, generator=generator).to(DEVICE) for n in (dims[0], 3))
        found = []
        for programs in (0, splits):
            cache = op.NSACache(len(lengths), 320, max_new_tokens=new, device=DEVICE)
            widened(cache, max(splits, 16))
            cache.extend(lengths)
            cache.write(k, v)
            with in_one_launch(op, programs) as seen:
                o, aux = op.nsa_decode(q, cache, gates, return_aux=True)
            assert seen == ([programs] if programs else [])
            found.append((o, *(getattr(aux, name) for name in OUTPUTS)))
        for name, one, other in zip(("o", *OUTPUTS), *found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("compared", [16, 128], ids=["searched", "compared"])
@pytest.mark.parametrize("name", IMPORTANCE)
def test_blocks_are_chosen_by_importance_and_number_whatever_the_bits(name: str, compared: int) -> None:
    op, values = package(), IMPORTANCE[name]
    module, length = op.module, BLOCKS * 16 - 3
    layout = module.storage.Layout(1, BLOCKS * 16, 0, None)
    cache = op.NSACache(1, BLOCKS * 16, device=DEVICE)
    widened(cache, 4)
    workspace = cache.workspace
    each = [values, [*reversed(values)]]
    workspace.sums.copy_(torch.tensor(each, device=DEVICE))
    # A list's importances as they are: stage 1, which sums them over heads, is left out.
    kernel = module.kernels.decode_step
    starts, ends = (torch.tensor([length - new], dtype=torch.int32, device=DEVICE) for new in (1, 0))
    q, gates, o = (torch.zeros(1, 1, 4, width, device=DEVICE) for width in (16, 3, 16))
    limit = kernel.tl.constexpr(compared)
    with mock.patch.multiple(kernel, STAGES=1, MOST_COMPARED_BLOCKS=limit), staged(kernel, 2):
        kernel.decode_step(q, gates, cache.layers[0], workspace, o, starts, ends, layout, 4)
    assert workspace.indices[0, 0].tolist() == [best(one, length) for one in each]


@contextmanager
def staged(kernel: Any, stage: int) -> Iterator[None]:
    """Within the block, the launch of the first stage is one of another stage."""
    launched = kernel.decode_step_kernel

    class Launches:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given, **named: launched[grid](*given, **{**named, "STAGE": stage})

    with mock.patch.multiple(kernel, decode_step_kernel=Launches()):
        yield


def test_logits_far_apart_and_values_that_are_not_finite_reach_who_sees_them() -> None:
    op = operator_of(scale=0.37, passes=PASSES, count=4)
    steps = (Step("fill", (150,)), Step("decode", (1,)), Step("decode", (1,)))
    with in_one_launch(op, 4):
        for kind in ("spread", "ties"):
            rows = run_scenario(op.spec, op.module, Scenario(1, 200, 32, steps, kind=kind), DEVICE.type)
            assert rows and [row for row in rows if not row.ok] == []
    generator = torch.Generator().manual_seed(2)
    q, gates = (torch.randn(1, 1, 2, width, generator=generator).to(DEVICE) for width in (16, 3))
    k, v = (torch.randn(1, 150, 1, 16, generator=generator).to(DEVICE) for _ in range(2))
    found = []
    for programs in (0, 4):
        for value in (math.nan, math.inf):
            torn = v.clone()
            torn[0, (3, 145), 0, 5] = value
            cache = op.NSACache(1, 200, device=DEVICE)
            cache.extend(150)
            cache.write(k, torn)
            with in_one_launch(op, programs):
                o, aux = op.nsa_decode(q, cache, gates, return_aux=True)
            found.append(torch.stack((o, aux.o_cmp, aux.o_slc, aux.o_win)).isfinite())
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not found[0].all() and found[0].any()


def test_how_many_programs_share_a_list() -> None:
    op = package()
    workspace, configs = op.module.workspace, op.module.configs
    tokens = configs.get("decode_step", DEVICE)["KEY_BLOCK"] * 16
    with mock.patch.multiple(configs, multiprocessors=lambda device: 132):
        assert workspace.step_splits(1, 1, DEVICE) == 0, "the interpreter's default is three launches"
        with configs.override("decode_launches", MOST_ROUNDS=2):
            most = workspace.MOST_STEP_SPLITS
            assert workspace.step_splits(1, 2 * most * tokens, DEVICE) == most
            assert workspace.step_splits(1, 2 * most * tokens + 1, DEVICE) == 0, "three tiles for a program"
            assert workspace.step_splits(20, tokens, DEVICE) == 6, "one program on a multiprocessor"
            assert workspace.step_splits(20, 12 * tokens + 1, DEVICE) == 0
            assert workspace.step_splits(33, tokens, DEVICE) == 4 and workspace.step_splits(34, 1, DEVICE) == 0
        with configs.override("decode_launches", MOST_ROUNDS=ALWAYS, FEWEST_PROGRAMS=1):
            assert workspace.step_splits(132, tokens, DEVICE) == 1 and workspace.step_splits(133, 1, DEVICE) == 0
            assert workspace.step_splits(1, 1536 * 16, DEVICE) == most
            assert workspace.step_splits(1, 1536 * 16 + 1, DEVICE) == 0, "more blocks than one program ranks"


def test_few_programs_merge_their_heads_in_turns() -> None:
    op = operator_of(passes=PASSES, group=20, count=4, window=70)
    steps = (Step("fill", (200,)), Step("decode", (1,)))
    with mock.patch.multiple(op.module.kernels.decode_step, MERGED_FLOATS=64), in_one_launch(op, 3):
        rows = run_scenario(op.spec, op.module, Scenario(1, 240, None, steps), DEVICE.type)
    assert rows and [row for row in rows if not row.ok] == []


def test_programs_that_wait_for_each_other_are_launched_to_run_at_the_same_time() -> None:
    op = package()
    module, kernel = op.module, op.module.kernels.decode_step
    layout = module.storage.Layout(3, 320, 0, None)
    cache = op.NSACache(3, 320, device=DEVICE)

    def meta(tensors: Any) -> Any:
        return type(tensors)(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in tensors))

    starts = torch.zeros(3, dtype=torch.int32, device="meta")
    q, gates, o = (torch.zeros(3, 1, 4, width, device="meta") for width in (16, 3, 16))
    launched: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    class Launches:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given, **named: launched.append((grid, named))

    with mock.patch.multiple(kernel, decode_step_kernel=Launches()), module.configs.use_target("sm_90"):
        kernel.decode_step(q, gates, meta(cache.layers[0]), meta(cache.workspace), o, starts, starts, layout, 7)
    ((grid, named),) = launched
    assert grid == (7, 2, 3) and named["launch_cooperative_grid"] is True and named["STAGE"] is None


@pytest.mark.parametrize("name", ["nsa_64x4", "llama3_8b", "tiny"])
def test_explain_predicts_the_launches_that_a_package_makes(name: str, project_root: Path) -> None:
    plan, h100 = lower(load_spec(project_root / "specs" / f"{name}.yaml")), gpu("h100")
    package = import_package(project_root / "generated" / name)
    device, seen = torch.device("meta"), set()
    with package.configs.use_target("sm_90"):
        for tokens, batch in itertools.product(
            (1, 1000, 4096, 16384, 32769, 65536, 98304, 98305, 10**6), (1, 3, 8, 40)
        ):
            splits = package.workspace.step_splits(batch * plan.lists, tokens, device)
            assert splits == programs_per_list(plan, h100, tokens, batch), (tokens, batch)
            kernels = [each.name for each in kernels_of_call(plan, h100, tokens, batch)]
            assert ("decode_step" in kernels, "decode_attend" in kernels) == (splits > 0, splits == 0)
            seen.add(splits > 0)
    assert seen == {False, True}
    a100 = [each.name for each in kernels_of_call(plan, gpu("a100"), 4096, 1)]
    assert "decode_step" not in a100 and "decode_select" in a100
