"""Every test of the tuner has a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, which this process and those it starts use."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(folder))
    for name in ("NSA_GEN_TUNED", "NSA_GEN_AUTOTUNE"):
        monkeypatch.delenv(name, raising=False)
    return folder
