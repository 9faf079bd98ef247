"""Generated packages in the eyes of a type checker, where pyright is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_gen.rendering import generate
from tests.support import small_spec

USE = """
import torch
from under_test import nsa_attention, NativeSparseAttention

def attend(q: torch.Tensor) -> torch.Tensor:
    o = nsa_attention(q, q, q, q, recompute=("cmp",))
    with_aux, aux = nsa_attention(q, q, q, q, return_aux=True)
    return NativeSparseAttention(64)(o.sum() + with_aux.sum() + aux.o_cmp)
"""
MISUSE = "from under_test import nsa_attention\n\nnsa_attention(1, 2, 3).nothing\n"


def complaints(folder: Path) -> list[dict]:
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "basic"}), encoding="utf-8")
    command = [pyright, "--project", str(folder), "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=170, check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] > 20
    return found["generalDiagnostics"]


def test_pyright_has_nothing_to_say_in_basic_mode_of_a_package_and_its_use(tmp_path: Path) -> None:
    generate(small_spec(phi="mlp", passes=("forward", "backward", "decode")), tmp_path)
    (tmp_path / "use.py").write_text(USE, encoding="utf-8")
    (tmp_path / "misuse.py").write_text(MISUSE, encoding="utf-8")
    found = complaints(tmp_path)
    assert [each["message"] for each in found if not each["file"].endswith("/misuse.py")] == []
    assert len(found) >= 2, "arguments of other types and an attribute that is not there"
