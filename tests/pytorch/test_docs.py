"""What docs/pytorch.md shows is what happens."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.quick import quick_command

ROOT = Path(__file__).resolve().parents[2]


def test_the_blocks_of_the_page_run_in_order_and_print_what_they_say(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "pytorch.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        quick_command("-c", code), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.MULTILINE)


EXPORT = """
import sys
import torch
{first}


class Attention(torch.nn.Module):
    def forward(self, q, k, v, gates):
        return package.nsa_attention(q, k, v, gates)


example = [torch.ones(1, 12, heads, dim) for heads, dim in ((4, 16), (2, 16), (2, 16), (4, 3))]
tokens = torch.export.Dim("tokens", min=12, max=512)
program = torch.export.export(Attention(), tuple(example), dynamic_shapes=({{1: tokens}},) * 4)
torch.export.save(program, sys.argv[1])
"""
LOAD = """
import sys
import torch
{first}
program = torch.export.load(sys.argv[1])
example = [torch.ones(1, 13, heads, dim) for heads, dim in ((4, 16), (2, 16), (2, 16), (4, 3))]
assert program.module()(*example).shape == (1, 13, 4, 16)
"""


@pytest.mark.parametrize(
    "first", ["import generated.tiny as package", "import nsa_gen; package = nsa_gen.load('tiny')"]
)
def test_an_exported_program_is_loaded_once_its_package_was_imported(tmp_path: Path, first: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NSA_GEN_CACHE_DIR": str(tmp_path / "cache")}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = quick_command("-c", code, str(tmp_path / "attention.pt2"))
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    exported = run(EXPORT.format(first=first))
    assert exported.returncode == 0, exported.stderr[-3000:]
    loaded = run(LOAD.format(first=first))
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert "attention" in (failed := run(LOAD.format(first="")).stderr) and "deserializ" in failed
