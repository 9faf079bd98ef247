"""rendering: Plan -> package. Templates are filled in; no decision is taken here."""

from nsa_gen.rendering.importing import import_package
from nsa_gen.rendering.package import DEFAULT_OUTPUT, RefusedOverwriteError, differences, generate, render

__all__ = ["DEFAULT_OUTPUT", "RefusedOverwriteError", "differences", "generate", "import_package", "render"]
