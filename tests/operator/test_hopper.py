"""Hopper's kernel of banded attention: which packages have it, and which calls it serves.

Its values are checked on a GPU, by tests/gpu/hopper.py: the interpreter does not know the language it is written in.
"""

from __future__ import annotations

import importlib
from types import FunctionType
from typing import Any

import pytest
import torch

from nsa_gen.hardware import TARGETS
from nsa_gen.lowering import lower
from nsa_gen.rendering import render
from tests.support import Operator, assert_matches_oracle, operator_of, small_spec

FILES = {
    f"kernels/{name}.py"
    for name in ("hopper", "hopper_banded_forward", "hopper_banded_repair", "hopper_launch", "hopper_rows")
}
CALL = {"dims": (64, 64), "dtype": "float16"}

TRACED = """
import importlib, sys
from pathlib import Path
from nsa_gen.hardware import gpu_for_target
from nsa_gen.rendering import import_package
from nsa_gen.targets.launches import record_launches, specialize
from nsa_gen.targets.tracing import trace

package = import_package(sys.argv[1])
configs = importlib.import_module(f"{package.__name__}.configs")
for target in sys.argv[2].split(","):
    with configs.use_target(target), record_launches() as launches:
        trace(package, 64, 2, "meta", False, ("forward",))
    print(target, *sorted({launch.name for launch in launches}))
    if len(sys.argv) > 3:
        import triton

        (wanted,) = {
            one.key: one
            for launch in launches
            if launch.kernel.__name__ == "hopper_banded_forward_kernel" and launch.keywords["WINDOW"]
            for one in [specialize(launch, gpu_for_target(target))]
        }.values()
        compiled = triton.compile(wanted.source, target=wanted.target, options=wanted.options)
        print(compiled.metadata.shared, "wgmma.mma_async" in compiled.asm["ptx"], "setmaxnreg" in compiled.asm["ptx"])
"""


def operator() -> Operator:
    return operator_of("cmp win", **CALL)


def tensor(*strides: int, offset: int = 0, sizes: tuple[int, ...] = (2, 5, 3, 64)) -> torch.Tensor:
    storage = torch.zeros(8192, dtype=torch.float16)
    return torch.as_strided(storage, sizes, (*strides, 1), offset)


@pytest.mark.parametrize(
    ("changes", "has"),
    [
        ({}, True),
        ({"dims": (96, 128)}, True),
        ({"dims": (192, 128)}, True),
        ({"dims": (64, 128)}, False),
        ({"dims": (80, 80)}, False),
        ({"dims": (256, 256)}, False),
        ({"dtype": "float32"}, False),
        ({"branches": "slc", "indices": "input"}, False),
    ],
)
def test_a_package_has_the_kernel_where_its_tiles_fit(changes: dict[str, Any], has: bool) -> None:
    spec = small_spec(**{"branches": "cmp win", **CALL, **changes})
    program = lower(spec)
    assert program.hopper is has
    assert (set(render(spec)) & FILES) == (FILES if has else set())
    tables = {target: table.get("banded_attention") for target, table in program.defaults.items()}
    assert all((config is not None) is has for config in tables.values())
    if has:
        least = {target: config.mapping()["HOPPER_TOKENS"] for target, config in tables.items()}
        assert least.pop("sm_90") == 8192  # 2**18 rows, and no more than 8192 tokens
        assert set(least.values()) == {2**31}


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (tensor(960, 192, 64), True),
        (tensor(960, 192, 64, offset=8), True),  # 16 bytes
        (tensor(960, 192, 64, offset=4), False),
        (tensor(960, 196, 64), False),
        (tensor(960, 192, 64, sizes=(2, 0, 3, 64)), False),
        (tensor(0, 192, 64), False),  # one entry, expanded
        (tensor(3, 192, 64, sizes=(1, 5, 3, 64)), True),  # the stride of a single entry is of no account
    ],
)
def test_boxes_are_loaded_of_rows_at_multiples_of_16_bytes(x: torch.Tensor, fits: bool) -> None:
    assert importlib.import_module(f"{operator().module.__name__}.kernels.hopper_device").has_boxes(x) is fits


def test_the_ordinary_kernels_serve_a_device_that_is_no_hopper_gpu_whatever_is_asked_for() -> None:
    op = operator()
    with op.configs.override("banded_attention", HOPPER_TOKENS=0):
        if not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
            hopper, sequences = (
                importlib.import_module(f"{op.module.__name__}.{x}") for x in ("kernels.hopper", "runtime.sequences")
            )
            q, k = torch.zeros(1, 64, 4, 64, dtype=torch.float16), torch.zeros(1, 64, 2, 64, dtype=torch.float16)
            assert hopper.forward_for(q, k, k, sequences.Sequences(1, 64, 64)) is None
        assert_matches_oracle(op, 37, gradients=False)


def test_only_a_trace_for_hopper_launches_the_kernel_and_it_launches_the_ordinary_ones_too(compiling) -> None:
    done = compiling(TRACED, str(operator().folder), ",".join(TARGETS))
    found = {target: names for target, *names in map(str.split, done.stdout.splitlines())}
    assert set(found) == set(TARGETS)
    for target, names in found.items():
        for branch in ("compressed", "window"):
            assert f"{branch}_forward_kernel" in names
            for kernel in ("forward", "repair"):
                assert (f"hopper_{branch}_{kernel}_kernel" in names) is (target == "sm_90")


@pytest.mark.slow
def test_the_kernel_compiles_without_a_gpu_to_hoppers_own_instructions(compiling) -> None:
    done = compiling(TRACED, str(operator().folder), "sm_90", "compile")
    shared, *instructions = done.stdout.splitlines()[-1].split()
    assert int(shared) <= 227 * 1024 and instructions == ["True", "True"]


class Numbers:
    """The functions of Gluon's language that find row tiles, on ints."""

    constexpr = int

    @staticmethod
    def maximum(*xs: Any) -> int:
        return max(map(int_of, xs))

    @staticmethod
    def minimum(*xs: Any) -> int:
        return min(map(int_of, xs))

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> int:
        return int_of(x if condition else y)


def int_of(x: Any) -> int:
    return getattr(x, "value", x)


@pytest.mark.parametrize("last", [0, 16, 128])
@pytest.mark.parametrize(("block", "stride", "window"), [(32, 16, 0), (1, 1, 100), (1, 1, 700)])
def test_row_tiles_have_every_key_that_a_row_sees_and_a_mask_where_one_does_not(
    last: int, block: int, stride: int, window: int
) -> None:
    rows = importlib.import_module(f"{operator().module.__name__}.kernels.hopper_rows")
    names = ("first_visible", "end_visible", "find_item", "tile_at")
    within = {**vars(rows), "gl": Numbers, "locate_tile": lambda *given: (0, *given[2:5])}
    for name in names:
        within[name] = FunctionType(vars(rows)[name].fn.__code__, within)
    keys = 128 if last else 64  # the kernel of dq has no last tile of its own
    height, heads = rows.QUERY_BLOCK.value, rows.QUERY_HEADS.value // rows.PACK.value
    for tokens_q, tokens_kv in ((1, 1), (300, 300), (70, 900), (1000, 1000), (3, 2000)):
        num_tiles = -(-tokens_q // height)
        work = rows.Work(None, 1, tokens_q, tokens_kv, num_tiles, num_tiles * heads)
        for index in range(0, num_tiles * heads, heads):
            item = within["find_item"](index, work, False, block, stride, window, last, keys)
            item = rows.Item(*map(int_of, item))
            starts = [int_of(within["tile_at"](item, step, keys)) for step in range(item.tiles)]
            end = item.first_key + item.tiles * keys
            assert sorted(starts) == list(range(item.first_key, end, keys))
            assert last == 128 or item.tiles > 0
            position = torch.arange(item.query, min(item.query + height, tokens_q))[:, None] + tokens_kv - tokens_q
            key = torch.arange(tokens_kv + keys)
            seen = (key * stride + block - 1 <= position) & ((key > position - window) if window else True)
            assert not seen[:, : item.first_key].any() and not seen[:, end + last :].any()
            for start in starts[item.masked :]:
                assert seen[:, start : start + keys].all() and start + keys <= len(key)
