"""`nsa-gen export hub`, and what the library of hub kernels makes of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nsa_gen import load_spec
from nsa_gen.rendering import render

ROOT = Path(__file__).resolve().parents[2]


def report_of(path: str, **changes: Any) -> dict[str, Any]:
    """A report as verify prints it, cut short."""
    spec = load_spec(path)
    rows = [
        {"case": "T=17", "quantity": "o", "measure": "max", "error": 1e-7, "bound": 1e-5, "ok": True, "problem": ""},
        {"case": "T=65", "quantity": "o", "measure": "max", "error": 3e-6, "bound": 1e-5, "ok": True, "problem": ""},
    ]
    environment = {"device": "cpu", "gpu": "", "torch": "2.13.0", "triton": "3.7.1"}
    found = {"ok": True, "name": spec.name, "digest": spec.digest(), "dtype": "float32", "cases": ["T=17", "T=65"]}
    return {**found, "rows": rows, "environment": environment, **changes}


@pytest.fixture
def exported(call, small, tmp_path) -> Path:
    answer = call("export", "hub", small, "-o", "out")
    assert (answer.returncode, answer.stdout.strip()) == (0, "out/small"), answer.stderr
    return tmp_path / "out" / "small"


def test_the_build_is_the_package_with_metadata_beside_it(exported: Path, small: str) -> None:
    variant = exported / "build" / "torch-universal"
    for name, text in render(load_spec(small)).items():
        assert (variant / "small" / name).read_text() == text
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["name"] == "small" and metadata["id"].startswith("small_") and metadata["id"].isidentifier()
    card = (exported / "README.md").read_text()
    assert f"namespace is `{metadata['id']}`" in card and "No report came with this export" in card
    assert load_spec(small).resolved_yaml().strip() in card


def test_tuned_tables_go_along_and_change_the_id_and_old_ones_go(call, exported: Path, small: str, tmp_path) -> None:
    metadata = exported / "build" / "torch-universal" / "metadata.json"
    before = json.loads(metadata.read_text())["id"]
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "gpu.json").write_text("{}")
    assert call("export", "hub", small, "-o", "out", "--tuned", "tables").returncode == 0
    carried = exported / "build" / "torch-universal" / "small" / "tuned"
    assert (carried / "gpu.json").read_text() == "{}"
    assert json.loads(metadata.read_text())["id"] != before
    assert "Tuned tables: gpu.json" in (exported / "README.md").read_text()
    assert call("export", "hub", small, "-o", "out").returncode == 0
    assert not list(carried.glob("*")) and json.loads(metadata.read_text())["id"] == before


def test_the_card_shows_the_worst_of_each_quantity(call, small: str, tmp_path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report_of(small)))
    answer = call("export", "hub", small, "--report", "report.json", "--json")
    assert json.loads(answer.stdout)["path"] == "hub/small"
    card = (tmp_path / "hub" / "small" / "README.md").read_text()
    assert "| o | max | 3.00e-06 | 1.00e-05 | T=65 |" in card and "1.00e-07" not in card
    assert "in 2 comparisons of 2 calls (float32), on cpu with torch 2.13.0 and triton 3.7.1" in card


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"digest": "0" * 12}, "expected a report of small"),
        ({"ok": False}, "expected a report without failures"),
        ({"rows": None, "environment": None}, None),
    ],
)
def test_a_report_of_something_else_or_of_a_failure_is_refused(call, small, tmp_path, changes, said) -> None:
    document = report_of(small, **changes)
    if said is None:
        document, said = {"ok": True}, "expected what nsa-gen verify small --json prints"
    (tmp_path / "report.json").write_text(json.dumps(document))
    answer = call("export", "hub", small, "--report", "report.json")
    assert answer.returncode == 1 and said in answer.stderr
    assert not (tmp_path / "hub").exists()


def test_what_it_did_not_write_is_left_alone(call, small: str, tmp_path) -> None:
    home = tmp_path / "hub" / "small"
    home.mkdir(parents=True)
    (home / "README.md").write_text("mine")
    answer = call("export", "hub", small)
    assert answer.returncode == 1 and "not written by nsa_gen" in answer.stderr
    assert (home / "README.md").read_text() == "mine" and not (home / "build").exists()


def test_tables_that_are_none_are_refused(call, small: str, tmp_path) -> None:
    assert "expected a folder of tuned tables" in call("export", "hub", small, "--tuned", "nowhere").stderr
    (tmp_path / "empty").mkdir()
    assert "expected tuned tables (*.json), got none" in call("export", "hub", small, "--tuned", "empty").stderr
    (tmp_path / "empty" / "x.json").write_text("{")
    assert "x.json: expected JSON" in call("export", "hub", small, "--tuned", "empty").stderr


LOADING = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel

first, second = (get_local_kernel(Path(each), backend="cpu") for each in sys.argv[1:])
assert first.__name__ != second.__name__
q, k = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 1, 16)
gates = torch.zeros(1, 5, 2, 1)
o, again = first.nsa_attention(q, k, k, gates), second.nsa_attention(q, k, k, gates)
assert torch.equal(o, again) and o.abs().max() > 0
print(first.ops.ATTENTION.name, hasattr(torch.ops, first.__name__), hasattr(torch.ops, second.__name__))
"""


@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="needs the kernels library")
def test_the_library_loads_two_versions_from_folders_into_one_process(call, exported: Path, small: str, tmp_path):
    text = Path(small).read_text().replace("name: small", "name: small\ndescription: again")
    Path(small).write_text(text)
    assert call("export", "hub", small, "-o", "later").returncode == 0
    later = tmp_path / "later" / "small"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", LOADING, str(exported), str(later)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["attention", "True", "True"]
