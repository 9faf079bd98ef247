"""Modules that packages carry as they stand: verbatim, self-contained, and right where they lie."""

from __future__ import annotations

import ast
import sys

import pytest
import torch

from nsa_gen._resources import runtime_dir
from nsa_gen.rendering import render
from nsa_gen.rendering.package import HEADER
from nsa_gen.runtime import sizes
from nsa_gen.runtime.launch import strides
from nsa_gen.runtime.pages import Pages
from nsa_gen.runtime.sequences import Sequences
from nsa_gen.spec import load_spec

MODULES = sorted(path.name for path in runtime_dir().glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("name", MODULES)
def test_a_package_carries_a_runtime_module_to_the_letter(name: str) -> None:
    files = render(load_spec("llama3_8b"))
    assert files[f"runtime/{name}"] == f"{HEADER}\n{(runtime_dir() / name).read_text(encoding='utf-8')}"


@pytest.mark.parametrize("name", MODULES)
def test_a_runtime_module_imports_torch_triton_and_its_neighbours_alone(name: str) -> None:
    tree = ast.parse((runtime_dir() / name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots = {str(node.module).partition(".")[0]}
        elif isinstance(node, ast.ImportFrom):
            assert f"{node.module}.py" in MODULES, ast.unparse(node)
            continue
        else:
            continue
        assert roots <= {"torch", "triton", *sys.stdlib_module_names}


def test_sizes_round_up() -> None:
    assert [sizes.cdiv(x, 4) for x in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [sizes.next_power_of_2(x) for x in (1, 2, 3, 192)] == [1, 2, 4, 256]


def test_a_page_that_two_sequences_use_is_copied_by_the_one_that_writes_and_freed_by_the_last() -> None:
    pages = Pages(batch=2, page_size=16, pages=4, width=4)
    assert pages.needed([(0, 0, 40)]) == 3 and pages.grow(0, 0, 40) is None
    assert (pages.free, pages.sharing, pages.changes()) == (1, False, [(0, [*pages.owned[0], -1])])
    pages.share(0, 1, 20)
    assert pages.changes() == [(1, [*pages.owned[1], -1, -1])] and pages.changes() == []
    assert pages.sharing and pages.owned[1] == pages.owned[0][:2] and pages.free == 1
    # The next token of sequence 1 goes to the second page, which sequence 0 uses too.
    assert pages.needed([(1, 20, 21)]) == 1
    source, target = pages.grow(1, 20, 21) or (-1, -1)
    assert source == pages.owned[0][1] and target == pages.owned[1][1] and source != target
    assert pages.needed([(1, 21, 49)]) == 2 > pages.free == 0
    pages.shrink(0, 0)
    assert pages.free == 2 and not pages.sharing


def test_launches_take_strides_of_rows_and_sizes_of_a_call_in_the_order_of_kernels() -> None:
    x, y = torch.empty(2, 3, 4, 5), torch.empty(2, 3, 4, 10)[..., :5]
    assert strides(x, y) == (60, 20, 5, 120, 40, 10)
    assert Sequences(2, 3, 7).numbers == (3, 7, 0)
    assert Sequences(1, 9, 9, torch.tensor([0, 4, 9])).numbers == (9, 9, 2)


def test_sizes_of_a_call_are_the_same_for_other_bounds_of_as_many_sequences() -> None:
    packed = Sequences(1, 9, 9, torch.tensor([0, 4, 9]))
    assert packed.sizes == Sequences(1, 9, 9, torch.tensor([0, 5, 9])).sizes and hash(packed.sizes)
    assert packed.sizes != Sequences(1, 9, 9, torch.tensor([0, 9])).sizes != Sequences(1, 9, 9).sizes
    for sequences in (packed, Sequences(1, 9, 9, torch.tensor([0])), Sequences(2, 9, 9)):
        sizes = sequences.sizes
        assert sizes.cu_seqlens is None and (sizes.packed, sizes.numbers) == (sequences.packed, sequences.numbers)
        assert sizes.tiles(9, 4) == sequences.tiles(9, 4)
