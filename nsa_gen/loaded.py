"""Packages imported from a folder or from the cache are the modules `nsa_gen.loaded.<name>_<digest>`.

Python's import imports them like any other module. Other threads therefore wait until a module has run. Pickled objects
find their module in another process, because its name begins with nsa_gen. There, a package of `nsa_gen.load` is found
in the cache, and a package of `import_package` if that was called in this process too.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from nsa_gen._resources import cache_dir

PREFIX = f"{__name__}."
__path__: list[str] = []
"""A module needs a path to have submodules. None of the packages lies in a folder of this path."""


class Origin(NamedTuple):
    """A package's folder, and a digest of its modules."""

    folder: Path
    digest: str


origins: dict[str, Origin] = {}
"""Packages that were given to `import_package`, by module name."""


def cached_folder(key: str) -> Path:
    """The folder in the cache of the package with a key, `<name>_<digest>`, if it is there."""
    return cache_dir() / "packages" / key / key.rpartition("_")[0]


class _Finder:
    """Finds packages by the names above, and packages that `import_package` was given a name for."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        parent, _, key = name.rpartition(".")
        if name in origins:
            folder = origins[name].folder
        elif parent == __name__:
            folder = cached_folder(key)
            if not (folder / "__init__.py").is_file():
                raise ModuleNotFoundError(
                    f"{name} is neither in the cache, {folder.parent.parent}, nor was it imported from a folder; first "
                    "call nsa_gen.load(spec), or nsa_gen.rendering.import_package(folder), as where it comes from",
                    name=name,
                )
        else:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


sys.meta_path.insert(0, _Finder)
