"""rendering: Plan -> package. Fills in templates and makes no decisions."""

from nsa_gen.rendering.importing import import_package
from nsa_gen.rendering.package import DEFAULT_OUTPUT, RefusedOverwriteError, differences, generate, render

__all__ = ["DEFAULT_OUTPUT", "RefusedOverwriteError", "differences", "generate", "import_package", "render"]
