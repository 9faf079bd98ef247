"""Import a generated package from any folder."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType

from nsa_gen import loaded


def import_package(path: str | os.PathLike[str], module_name: str | None = None) -> ModuleType:
    """Import the generated package in folder ``path`` and return it.

    Without a ``module_name`` the name is `nsa_gen.loaded.` plus the folder's name and a digest of its absolute path and
    contents. So the same package is imported once, and a regenerated one is imported again, with its own operators.
    Pickled objects of the package can be loaded in a process that has called this for the same folder and contents.

    Raises:
        ImportError: the folder is not a package, ``module_name`` belongs to another package, or its parent module does
            not exist.
    """
    package = Path(os.path.realpath(path))
    if not (package / "__init__.py").is_file():
        raise ImportError(f"{package}: expected a generated package, found no __init__.py")
    origin = loaded.Origin(package, _digest(package))
    name = module_name or loaded.PREFIX + re.sub(r"\W", "_", package.name) + f"_{origin.digest}"
    known = loaded.origins.setdefault(name, origin)
    if known != origin:
        if name in sys.modules:
            raise ImportError(
                f"module_name: {name} is the package that was imported from {known.folder}, and not what {package} "
                "holds now; choose another name, or none"
            )
        loaded.origins[name] = origin
    return importlib.import_module(name)


def _digest(package: Path) -> str:
    digest = hashlib.sha256(str(package).encode())
    for path in sorted((*package.rglob("*.py"), *package.glob("*.json"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
