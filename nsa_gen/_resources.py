"""Paths of templates and specs (beside the package in a checkout, inside it in a wheel), and of the cache."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _resource_dir(name: str) -> Path:
    """Return the folder `name` of the wheel's data if it exists, else of the checkout.

    Raises FileNotFoundError, which names both places, if neither exists: the installation is broken.
    """
    installed = _PACKAGE / "_data" / name
    if installed.is_dir():
        return installed
    checkout = _PACKAGE.parent / name
    if checkout.is_dir():
        return checkout
    raise FileNotFoundError(
        f"nsa_gen's {name} are missing: expected {installed} (installed wheel) or {checkout} (checkout); "
        "reinstall nsa-gen, or restore the folder in the checkout"
    )


def templates_dir() -> Path:
    """Return the folder of Jinja templates."""
    return _resource_dir("templates")


def runtime_dir() -> Path:
    """Return the folder of modules that are copied into packages unchanged."""
    return _PACKAGE / "runtime"


def specs_dir() -> Path:
    """Return the folder of shipped specs (`*.yaml` and the JSON Schema)."""
    return _resource_dir("specs")


def tuned_dir(name: str) -> Path | None:
    """The folder of tuned tables that are shipped for a spec, or None if there are none."""
    for root in (_PACKAGE / "_data" / "generated", _PACKAGE.parent / "generated"):
        folder = root / name / "tuned"
        if folder.is_dir():
            return folder
    return None


CACHE_VARIABLE = "NSA_GEN_CACHE_DIR"
"""Environment variable with the path of a cache folder to use instead of the user's."""


def cache_dir() -> Path:
    """The folder for files that nsa_gen can recreate: `$NSA_GEN_CACHE_DIR`, else the platform's user cache."""
    override = os.environ.get(CACHE_VARIABLE, "").strip()
    if override:
        return Path(os.path.expanduser(override)).absolute()  # leaves `~name` of an unknown user
    from platformdirs import user_cache_path

    return user_cache_path("nsa_gen", appauthor=False)
