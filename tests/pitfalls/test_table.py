"""The table in docs/pitfalls.md names tests that exist, and every file of tests here."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent


def test_every_test_and_file_that_the_table_names_exists_and_no_file_is_left_out(project_root: Path) -> None:
    table = (project_root / "docs" / "pitfalls.md").read_text()
    here = {path.name: path.read_text() for path in FOLDER.glob("test_*.py")}
    texts = here | {path.name: path.read_text() for path in (FOLDER.parent / "inference").glob("test_*.py")}
    defined = set(re.findall(r"def (test_\w+)", "".join(texts.values())))
    named = set(re.findall(r"`(test_\w+)`", table))
    assert named and named <= defined, named - defined
    files = set(re.findall(r"`(test_\w+\.py)`", table))
    assert here.keys() - {Path(__file__).name} <= files <= texts.keys()
