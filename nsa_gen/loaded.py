"""Packages imported from a folder or from the cache are the modules `nsa_gen.loaded.<name>_<digest>`.

They are imported as any other module is, by Python's import: other threads wait until a module has run, and what is
pickled finds its module in another process, because the name begins with that of nsa_gen. There, a package of
`nsa_gen.load` is found in the cache, and one of `import_package` once that was called in that process too.
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
"""Python imports modules below a module that has a path; none of these lies in a folder of it."""


class Origin(NamedTuple):
    """A package's folder, and a digest of its modules."""

    folder: Path
    digest: str


origins: dict[str, Origin] = {}
"""Packages that `import_package` was asked for, by module name."""


def cached_folder(key: str) -> Path:
    """Where the cache has the package of a key, `<name>_<digest>`, if it has it."""
    return cache_dir() / "packages" / key / key.rpartition("_")[0]


class _Finder:
    """Finds packages by the names above, and those that `import_package` was given a name for."""

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
