"""The script that draws the documentation's figures, as a module."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

PATH = Path(__file__).resolve().parent.parent / "docs" / "figures" / "draw.py"


@cache
def script() -> ModuleType:
    """docs/figures/draw.py, imported."""
    spec = importlib.util.spec_from_file_location("docs_figures_draw", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def speed_ups(run: str) -> list[dict[str, Any]]:
    """Ratios over dense attention from a committed run; see `speed_ups` of the script."""
    return script().speed_ups(run)
