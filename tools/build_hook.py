"""Build hook: of generated/, a wheel gets only the tuned tables. `nsa_gen.load` generates the packages themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class TunedTables(BuildHookInterface):
    """Put each spec's tuned tables where `nsa_gen._resources.tuned_dir` looks for them."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add generated/<spec>/tuned to a wheel. An editable install reads the checkout instead."""
        if version == "editable":
            return
        root = Path(self.root)
        for folder in sorted(root.glob("generated/*/tuned")):
            build_data["force_include"][str(folder)] = f"nsa_gen/_data/{folder.relative_to(root).as_posix()}"
