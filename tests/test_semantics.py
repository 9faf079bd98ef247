"""What docs/semantics.md says in numbers, names and shapes is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from nsa_gen import load_spec, lower
from nsa_gen.spec import RANGES, Phi
from nsa_gen.verification.reference.dense import OracleParameters, compress, overlap_weights

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "semantics.md").read_text(encoding="utf-8")


def of(block: int, stride: int, selection: int) -> OracleParameters:
    """Parameters of the reference for these sizes."""
    return OracleParameters(
        query_heads=1, kv_heads=1, head_dim_qk=16, head_dim_v=16, scale=1.0,
        compression_block=block, compression_stride=stride, selection_block=selection,
    )  # fmt: skip


def test_the_weights_of_the_example_are_those_of_the_definition():
    numbers = re.search(r"For l = (\d+), d = (\d+), l′ = (\d+) the weights are ([\d, ]+) on i = 4j − 1", PAGE).groups()
    block, stride, selection = map(int, numbers[:3])
    weights = overlap_weights(of(block, stride, selection), 40, 11)[:, 2]
    first = 4 * 2 - 1
    said = [float(number) for number in numbers[3].split(",")]
    assert weights[first : first + len(said)].tolist() == said and weights.sum() == sum(said)
    assert torch.equal(overlap_weights(of(16, 16, 16), 4, 4), torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [0, 7, 8, 11, 12, 33])
def test_only_complete_blocks_are_compressed(tokens):
    assert "Nc(T) = max(0, ⌊(T − l) / d⌋ + 1)" in PAGE
    k, v = torch.zeros(2, tokens, 1, 16, dtype=torch.float64)
    found, _ = compress(of(8, 4, 16), k, v, None)
    assert len(found) == max(0, (tokens - 8) // 4 + 1)


def test_head_dims_are_in_the_range_that_the_page_names():
    least, most, step = map(int, re.search(r"Dk, Dv from (\d+) to (\d+) in steps of (\d+)", PAGE).groups())
    for name in ("head_dim.qk", "head_dim.v"):
        field = RANGES[name]
        assert (field.minimum, field.maximum, field.multiple_of) == (least, most, step)


def test_parameters_of_each_phi_have_the_shapes_of_the_table():
    rows = dict(re.findall(r"^\| `(weighted|linear|mlp)` \| .*? \| ([^|]+) \|$", PAGE, flags=re.MULTILINE))
    base = load_spec("nsa_paper")
    for kind, cell in rows.items():
        phi = Phi(key=kind, value=kind, hidden=256 if kind == "mlp" else None)
        spec = base.replace(compression=base.compression.model_copy(update={"phi": phi}))
        said = {name: shape for name, shape in re.findall(r"`(\w+)` \(([^)]*)\)", cell)}
        found = {
            argument.name.removeprefix("key_"): argument.dims
            for argument in lower(spec).arguments
            if argument.group == "compression" and argument.name.startswith("key_") and "position" not in argument.name
        }
        assert list(said) == list(found)
        sizes = {"l·D": str(32 * 192), "l": "32", "hidden": "256", "D": "192", "Hkv": "Hkv"}
        for name, shape in said.items():
            assert tuple(sizes[part.strip()] for part in shape.split(",")) == found[name], (kind, name)


def test_arguments_that_the_page_names_are_those_of_operators():
    per_branch = {each.name for each in lower(load_spec("nsa_paper").replace(kv="per_branch")).arguments}
    assert {"k_slc", "v_slc", "k_win", "v_win"} <= per_branch
    text = PAGE + (Path(__file__).resolve().parent.parent / "generated" / "tiny" / "operator.py").read_text()
    for name in ("cu_seqlens", "indices", "counts", "gates", "k_cmp", "v_cmp"):
        assert text.count(name) > 1
