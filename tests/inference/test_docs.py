"""What docs/inference.md, docs/serving.md and examples/ show is what happens."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.quick import quick_command

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(quick_command(*command), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_first_example_of_the_page_on_inference_runs_and_prints_what_it_says() -> None:
    text = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
    block = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)[0]
    assert run("-c", block).strip() == re.findall(r"print\(cache.tokens\)  # (.*)", block)[0]


def test_the_engine_of_the_page_on_serving_gets_what_one_call_gives() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert run("-c", block).strip() == "True"


def test_the_generation_loop_gives_the_same_tokens_with_and_without_pages_and_chunks() -> None:
    common = ("examples/generate.py", "--prompt", "21", "--new", "3", "--layers", "1")
    whole = run(*common).splitlines()[0]
    assert re.fullmatch(r"generated: \[\[\d+, \d+, \d+\]\]", whole)
    assert run(*common, "--chunk", "9", "--page-size", "16").splitlines()[0] == whole
