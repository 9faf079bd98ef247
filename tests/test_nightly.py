"""What a whole run leaves to the nightly one, and that nothing is lost between the two."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import nightly
from tests.conftest import PROJECT_ROOT, runs_everything


@pytest.mark.parametrize("file", nightly.KEPT)
def test_every_test_of_the_table_exists(file: str) -> None:
    tree = ast.parse(Path(PROJECT_ROOT, file).read_text(encoding="utf-8"))
    assert set(nightly.KEPT[file]) <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("count", "kept"), [(1, 0), (1, 1), (7, 0), (7, 3), (202, 40), (5, 5), (3, 8)])
def test_the_cases_that_stay_are_spread_over_all(count: int, kept: int) -> None:
    found = [number for number in range(count) if nightly.is_kept(number, count, kept)]
    assert len(found) == min(count, kept)
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("arguments", "keyword", "markers", "everything"),
    [
        (["tests"], "", "", True),
        ([str(PROJECT_ROOT / "tests")], "", "", True),
        (["tests/tools"], "", "", False),
        (["tests/tools/test_freeze.py::test_x"], "", "", False),
        (["tests"], "window", "", False),
        (["tests"], "", "nightly", False),
    ],
)
def test_only_a_run_of_everything_leaves_tests_out(
    arguments: list[str], keyword: str, markers: str, everything: bool
) -> None:
    config = SimpleNamespace(args=arguments, option=SimpleNamespace(keyword=keyword, markexpr=markers))
    assert runs_everything(config) == everything  # type: ignore[arg-type]


def test_a_run_of_the_nightly_tests_of_a_folder_finds_those_of_the_table() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "nightly"]
    done = subprocess.run(
        [*command, "tests/tools/test_freeze.py"], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120
    )
    file = "tests/tools/test_freeze.py"
    found = {line for line in done.stdout.splitlines() if line.startswith("tests/")}
    assert found == {f"{file}::{name}" for name in nightly.KEPT[file]}, done.stdout + done.stderr
