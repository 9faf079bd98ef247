"""Checks with PyTorch's tools, on training and on flash-linear-attention, as far as a CPU shows them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nsa_gen.spec import load_spec
from tests.gpu import pytorch, reference_fla, training
from tools.gpu import host_time, plot_training


def test_every_check_named_for_gpus_alone_is_a_check() -> None:
    assert set(pytorch.ONLY_ON_A_GPU) < set(pytorch.CHECKS)


def test_losses_that_part_or_do_not_fall_are_not_ok() -> None:
    falling = [5.0 - step / 100 for step in range(300)]
    rising = falling[::-1]
    nudged = [loss * (1 + 1e-4) for loss in falling]
    early = [*(loss * 1.01 for loss in falling[:1]), *falling[1:]]
    late = [*falling[:200], *(loss * 1.1 for loss in falling[200:])]

    def ok(eager: list[float], compiled: list[float], dense: float = 1.0) -> bool:
        return training.compared({"sparse": eager, "sparse, compiled": compiled, "dense": [dense]})["ok"]

    assert ok(falling, nudged)
    assert not ok(falling, early) and not ok(falling, late) and not ok(rising, rising)
    assert not ok(falling, falling, dense=float("nan"))


def test_the_model_is_of_ten_million_parameters_and_the_corpus_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    size = training.SIZES["cuda"]
    model = training.Model(size, lambda: training.DenseAttention(size.hidden, "meta"), "meta")
    assert 9e6 < sum(x.numel() for x in model.parameters()) < 13e6
    text = training.corpus()
    assert len(text) > 500_000 and (text < 128).float().mean() > 0.99


def test_the_loss_curve_is_drawn_from_the_last_report_of_losses(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = {
        "losses": {"sparse": [3.0, 2.0], "dense": [3.0, 1.0]},
        "parameters": 10_000_000,
        "size": {"batch": 1, "tokens": 2},
    }
    document = tmp_path / "report.jsonl"
    lines = [
        {"machine": {}},
        {"test": "a", "found": {"losses": {}}},
        {"test": "b", "found": result},
        {"outcome": "passed"},
    ]
    document.write_text("\n".join(map(json.dumps, lines)))
    plot_training.plot(document, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_configurations_beside_fla_are_specs_that_the_front_end_takes() -> None:
    for each in reference_fla.CONFIGURATIONS:
        query, kv = each.heads
        spec = each.spec
        assert (
            spec.combine.gate == "given" and query // kv in (16, 32) and (spec.compression is not None) == each.chosen
        )
    assert {each.against for each in reference_fla.CONFIGURATIONS} == {"naive_nsa", "parallel_nsa"}


def test_lists_are_compared_as_sets_of_blocks_that_a_token_can_see() -> None:
    each = reference_fla.Configuration((16, 1), 64, 3, 16, (0, 20, 53), 0, "float16", False, "naive_nsa")
    lists = reference_fla.some_lists(each, "cpu", 0)
    assert lists.shape == (1, 53, 1, 3) and lists[0, 19].max() == 1 and lists[0, 20].max() == 0
    other = lists.flip(-1).clone()
    assert reference_fla.same_lists(lists, other, each).all()
    other[other == -1] = 77
    assert reference_fla.same_lists(lists, other, each).all()
    other[0, 50] = 0
    assert reference_fla.same_lists(lists, other, each).logical_not().nonzero().tolist() == [[0, 50]]


def test_calls_timed_on_the_host_give_the_same_bits_by_either_way(tmp_path: Path) -> None:
    from nsa_gen.rendering import generate, import_package

    spec = load_spec("tiny")
    module = import_package(generate(spec, tmp_path))
    found = host_time.calls(module, spec, 5, "cpu")
    assert [len(call()) for call in found.values()] == [1, 1, 5]
    assert host_time.host_microseconds(lambda: None, lambda: None, bursts=3) < 1e4


NO_DEVICE = """
import json, sys
from pathlib import Path
from nsa_gen.rendering import generate, import_package
from nsa_gen.spec import load_spec
from tools.gpu import host_time
spec = load_spec("tiny")
module = import_package(generate(spec, Path(sys.argv[1])))
with host_time.no_device(module):
    print(json.dumps(host_time.measure(module, spec, 64, "none", bursts=1)))
try:
    host_time.main(["--specs", "tiny"])
except SystemExit as stopped:
    assert stopped.code == 2
"""


def test_what_calls_cost_the_host_is_measured_without_a_gpu(
    tmp_path: Path, compiling: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = compiling(NO_DEVICE, str(tmp_path))
    rows = json.loads(done.stdout)
    assert [(row["call"], row["launches"]) for row in rows] == [
        ("forward", 10),
        ("forward with grad", 10),
        ("forward and backward", 19),
    ]
    for row in rows:
        assert row["microseconds"] > 0 and "not compared" in host_time.line(row)
    assert "expected a machine with a GPU" in done.stderr
