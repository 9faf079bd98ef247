"""Importing a generated package from wherever it lies."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


def import_package(path: str | os.PathLike[str], module_name: str | None = None) -> ModuleType:
    """Import the generated package in folder ``path`` and return it.

    Without a ``module_name`` the name is the folder's, made unique by a digest of its absolute path and contents: the
    same package is imported once, and a regenerated one anew, with operators of its own.

    Raises:
        ImportError: the folder is no package.
    """
    package = Path(path).resolve()
    source = package / "__init__.py"
    if not source.is_file():
        raise ImportError(f"{package}: expected a generated package, found no __init__.py")
    name = module_name or f"{package.name}_{_digest(package)}"
    if name in sys.modules:
        return sys.modules[name]
    definition = importlib.util.spec_from_file_location(name, source, submodule_search_locations=[str(package)])
    if definition is None or definition.loader is None:
        raise ImportError(f"{source}: cannot be imported")
    module = importlib.util.module_from_spec(definition)
    sys.modules[name] = module
    try:
        definition.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _digest(package: Path) -> str:
    digest = hashlib.sha256(str(package).encode())
    for path in sorted(package.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
