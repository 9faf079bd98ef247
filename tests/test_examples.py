"""The scripts in examples/ run and show what they say; those of a page of docs/ are run by the tests of the page."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nsa_gen.spec import load_spec, parse_spec
from tests.machine import GPU

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for the packages that examples load, and the path as it was."""
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def example(name: str) -> ModuleType:
    """A script of the gallery as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_says_how_it_is_run_and_is_run_by_a_test():
    run = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert f"python examples/{path.name}" in source, path.name
        assert any(f'example("{path.stem}")' in text or f"examples/{path.name}" in text for text in run), path.name
        assert f"[{path.name}]({path.name})" in page, path.name


def test_an_operator_is_generated_and_called_forward_backward_and_packed(capsys):
    example("generate_and_use").main()
    said = capsys.readouterr().out
    assert "o (1, 40, 4, 16), dq (1, 40, 4, 16), dk (1, 40, 2, 16)" in said
    assert said.rstrip().endswith("True")


def test_a_spec_is_written_in_the_shape_of_a_model(capsys, tmp_path):
    module = example("write_spec")
    assert module.main([]) == 0
    spec = parse_spec(capsys.readouterr().out)
    assert (spec.heads.query, spec.heads.kv, spec.head_dim.qk, spec.dtype) == (32, 8, 64, "bfloat16")
    assert spec.compression.phi.key == "mlp" and spec.passes == ("forward", "backward")
    strange = tmp_path / "config.json"
    strange.write_text('{"model_type": "conjured"}')
    assert module.main([str(strange), str(tmp_path / "x.yaml")]) == 1
    assert "conjured" in capsys.readouterr().err and not (tmp_path / "x.yaml").exists()
    strange.write_text((ROOT / "tests" / "cli" / "configs").joinpath(CONFIG).read_text())
    assert module.main([str(strange), str(tmp_path / "mine.yaml")]) == 0
    assert load_spec(tmp_path / "mine.yaml").name == "mine"


CONFIG = "mistral_defaults.json"


@pytest.mark.skipif(GPU, reason="with a GPU it measures")
def test_predictions_of_a_longer_sequence_are_longer_and_below_the_dense_floor_in_the_end(capsys):
    assert example("bench").main("llama3_8b", "8192,131072") == 0
    rows = re.findall(r"^ *([\d,]+) +([\d.]+) +([\d.]+) +(\w+), ", capsys.readouterr().out, flags=re.MULTILINE)
    (short, sparse, dense, _), (long, sparse_later, dense_later, slowest) = rows
    assert (short, long) == ("8,192", "131,072")
    assert float(sparse) > float(dense) and float(sparse_later) < float(dense_later)
    # Seven products of 131072 * 131072 / 2 rows and columns of 128, 2 FLOPs each, 32 heads, at 989.4 TFLOP/s.
    assert float(dense_later) == pytest.approx(7 * 32 * 131072**2 * 128 / 989.4e9, abs=0.01)
    assert slowest in load_kernels()


def load_kernels() -> set[str]:
    """Names of llama3_8b's kernels."""
    from nsa_gen import lower

    return {kernel.name for kernel in lower(load_spec("llama3_8b")).kernels}


def test_an_indexer_is_warmed_up_on_dense_attention_and_learns_alone():
    module = example("warm_up_indexer")
    layer, dense = module.layers()
    assert dense.q_idx_proj is layer.q_idx_proj
    hidden = module.texts()
    before = {name: x.clone() for name, x in layer.named_parameters()}
    x = next(hidden)
    out, alignment = dense(x, return_alignment=True)
    # Every block is selected: the layer's output is that of dense attention.
    q, k, v = (proj(x).unflatten(-1, (-1, 16)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, layer.o_proj(o.transpose(1, 2).flatten(-2)), rtol=1e-4, atol=1e-5)
    losses = module.warm_up(dense, itertools.repeat(x), 3)
    assert losses[0] == alignment.item() and losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    moved = {name for name, parameter in layer.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"q_idx_proj.weight", "k_idx_proj.weight"}
    assert 0.0 < module.captured(layer, x) <= 1.0
    ((task, aligned),) = module.train(layer, hidden, 1)
    assert task > 0 and aligned > 0


@pytest.mark.skipif(GPU, reason="with a GPU it measures")
def test_the_tuner_shows_what_it_would_time(capsys):
    report = example("tune").main()
    ((each,),) = report.selections.values()
    assert each.kernel == "window_forward" and 1 < len(each.survivors) <= each.legal
    said = capsys.readouterr().out
    assert said.count("us predicted") == len(each.survivors)


def test_the_blocks_that_are_shown_are_the_ones_that_the_operator_attends_to(capsys, tmp_path):
    module = example("visualise_selection")
    path = tmp_path / "blocks.png" if importlib.util.find_spec("matplotlib") else None
    module.main(None if path is None else str(path))
    lines = capsys.readouterr().out.splitlines()
    assert path is None or path.read_bytes().startswith(b"\x89PNG")
    chosen, forced, sizes = module.selected_blocks()
    own = torch.arange(len(chosen)) // sizes["block"]
    assert torch.equal(chosen.sum(1), torch.minimum(own + 1, torch.tensor(sizes["count"])))
    assert bool((chosen | ~forced).all())  # forced blocks are selected
    assert bool(chosen[own > 3, 3].all())  # and so is the block that stands out, by all behind it
    last = lines[-2] if path is not None else lines[-1]
    marks = last.split()[-1]
    assert len(marks) == int(own[-1]) + 1 and marks[0] == marks[-1] == "#" and marks.count("o") == sizes["count"] - 2
