"""Eq. 9's weights, against counting positions one by one, and the formula that kernels compute them by."""

from __future__ import annotations

import ast
from types import SimpleNamespace

import pytest
import torch

from nsa_gen.lowering.overlap import overlap
from nsa_gen.rendering import render
from nsa_gen.spec import load_spec
from tests.lowering.drawn_specs import specs

STRIDES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def geometries(selection_block: int) -> list[tuple[int, int]]:
    """Every legal (l, d) for a selection block."""
    return [
        (multiple * stride, stride)
        for stride in STRIDES
        if stride <= selection_block
        for multiple in range(1, selection_block // stride + 1)
    ]


def counted(block: int, stride: int, selection_block: int) -> dict[int, float]:
    """Weights of a selection block far from the start, by the number of compressed blocks from its first one on."""
    number = 3  # its first position is 3 l', so that compressed blocks before it exist: l <= l'
    mine = range(number * selection_block, (number + 1) * selection_block)
    own = number * selection_block // stride
    weights = {}
    for i in range(5 * selection_block // stride):
        common = len(range(max(mine.start, i * stride), min(mine.stop, i * stride + block)))
        if common:
            weights[i - own] = common / stride
    return weights


@pytest.mark.parametrize("selection_block", [16, 32, 64, 128, 256])
def test_weights_are_the_positions_two_blocks_share_over_the_stride(selection_block):
    for block, stride in geometries(selection_block):
        found = overlap(block, stride, selection_block)
        weights = {found.first + number: weight for number, weight in enumerate(found.weights)}
        assert weights == counted(block, stride, selection_block), (block, stride)
        assert found.ratio == selection_block // stride


def test_counting_agrees_with_sets_of_positions():
    block, stride, selection_block = 24, 8, 32
    mine = set(range(3 * 32, 4 * 32))
    by_sets = {i - 12: len(mine & set(range(i * 8, i * 8 + 24))) / 8 for i in range(40)}
    assert counted(block, stride, selection_block) == {i: weight for i, weight in by_sets.items() if weight}


def test_the_papers_blocks_have_weights_1_2_2_2_1_from_4j_minus_1_on():
    found = overlap(32, 16, 64)
    assert (found.ratio, found.first, found.weights) == (4, -1, (1, 2, 2, 2, 1))


def test_equal_blocks_without_overlap_are_taken_one_for_one():
    found = overlap(64, 64, 64)
    assert (found.ratio, found.first, found.weights) == (1, 0, (1,))


@pytest.mark.parametrize(("block", "stride", "selection_block"), [(24, 16, 64), (32, 16, 24)])
def test_a_stride_that_divides_not_both_blocks_is_refused(block, stride, selection_block):
    with pytest.raises(ValueError, match="stride must divide"):
        overlap(block, stride, selection_block)


def test_the_description_fits_a_line_however_many_weights_there_are():
    longest = max(len(overlap(*geometry, 256).description) for geometry in geometries(256))
    assert longest <= 100
    assert overlap(32, 16, 64).description == "1, 2, 2, 2, 1 on i = 4j - 1 .. 4j + 3."


@pytest.fixture(scope="module")
def emitted_formula() -> ast.FunctionDef:
    """The function `overlap_weight` of a generated package, its decorator removed."""
    source = render(load_spec("tiny"))["kernels/selection.py"]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "overlap_weight":
            node.decorator_list = []
            return node
    raise AssertionError("selection.py has no function overlap_weight")


@pytest.mark.parametrize("selection_block", [16, 64, 256])
def test_the_emitted_formula_gives_the_same_weights(emitted_formula, selection_block):
    tl = SimpleNamespace(
        maximum=lambda a, b: torch.clamp(a, min=b), minimum=lambda a, b: torch.clamp(a, max=b), float32=torch.float32
    )
    code = compile(ast.Module([emitted_formula], []), "kernels/selection.py", "exec")
    for block, stride in geometries(selection_block):
        namespace = {
            "tl": tl, "COMPRESSION_BLOCK": block, "COMPRESSION_STRIDE": stride, "SELECTION_BLOCK": selection_block,
        }  # fmt: skip
        exec(code, namespace)
        expected = counted(block, stride, selection_block)
        offsets = torch.arange(min(expected), max(expected) + 1)
        found = namespace["overlap_weight"](offsets)
        assert found.dtype == torch.float32
        assert dict(zip(offsets.tolist(), found.tolist(), strict=True)) == expected, (block, stride)


def test_the_constants_of_a_package_name_the_compressed_blocks_that_overlap():
    scored = [s for s in specs().values() if s.selection and s.selection.indices == "computed"]
    computed = [s for s in scored if s.selection.scores == "compression"]
    assert len(computed) > 6
    for spec in computed:
        constants = render(spec)["spec.py"]
        expected = counted(spec.compression.block, spec.compression.stride, spec.selection.block)
        assert f"\nFIRST_OVERLAP = tl.constexpr({min(expected)})\n" in constants
        ratio = spec.selection.block // spec.compression.stride
        assert f"\nBLOCKS_PER_SELECTION = tl.constexpr({ratio})\n" in constants
