"""What docs/results holds: small files, and where in the history the large ones are."""

from __future__ import annotations

import hashlib
import json
import subprocess

import pytest

from tests.conftest import PROJECT_ROOT

RESULTS = PROJECT_ROOT / "docs" / "results"
ARCHIVE = json.loads((RESULTS / "archive.json").read_text(encoding="utf-8"))
MOST_BYTES = 200_000


def test_no_file_is_larger_than_what_goes_into_the_archive() -> None:
    large = {path.name: path.stat().st_size for path in RESULTS.rglob("*") if path.stat().st_size > MOST_BYTES}
    assert large == {}


@pytest.mark.parametrize("entry", ARCHIVE, ids=lambda entry: entry["file"])
def test_a_file_of_the_archive_is_in_the_history_as_it_is_described(entry: dict[str, object]) -> None:
    assert not (RESULTS / str(entry["file"])).exists()
    assert isinstance(entry["bytes"], int) and entry["bytes"] > MOST_BYTES
    name = f"{entry['commit']}:docs/results/{entry['file']}"
    done = subprocess.run(["git", "show", name], cwd=PROJECT_ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("a copy without the history")
    assert (len(done.stdout), hashlib.sha256(done.stdout).hexdigest()) == (entry["bytes"], entry["sha256"])
