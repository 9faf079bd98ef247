"""nsa_gen: a compiler from a YAML spec of native sparse attention to a verified Triton package.

The public names are loaded on first use, so that importing nsa_gen costs nothing and needs neither torch nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_gen.loading import load
    from nsa_gen.lowering import lower
    from nsa_gen.rendering import generate
    from nsa_gen.spec import load_spec
    from nsa_gen.targets import compile_spec as compile
    from nsa_gen.tuning import tune
    from nsa_gen.verification import verify

__version__ = "0.1.0"

__all__ = ["__version__", "compile", "generate", "load", "load_spec", "lower", "tune", "verify"]

_HOMES: dict[str, tuple[str, str]] = {
    "load_spec": ("nsa_gen.spec", "load_spec"),
    "lower": ("nsa_gen.lowering", "lower"),
    "generate": ("nsa_gen.rendering", "generate"),
    "load": ("nsa_gen.loading", "load"),
    "compile": ("nsa_gen.targets", "compile_spec"),
    "tune": ("nsa_gen.tuning", "tune"),
    "verify": ("nsa_gen.verification", "verify"),
}
"""Public name -> (module that defines it, its name there)."""


def __getattr__(name: str) -> Any:
    """Import the room a public name lives in, the first time the name is asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nsa_gen' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
