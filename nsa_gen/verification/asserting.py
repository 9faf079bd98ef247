"""One assertion for the tests of a project that uses a generated package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nsa_gen.spec import Spec, load_spec
from nsa_gen.verification.report import VerifyReport
from nsa_gen.verification.verify import verify


def assert_verified(package_or_spec: Any, **options: Any) -> VerifyReport:
    """Verify a spec or a generated package; AssertionError with every failure where something is wrong.

    Takes a `Spec`, a spec's file or shipped name, the folder of a generated package, or the imported package itself
    (both have their spec.yaml). `options` are those of `verify`. Returns the report.
    """
    spec, package = _meaning(package_or_spec)
    report = verify(spec, package=package, **options)
    if not report.ok:
        lines = [f"{report.name} ({report.digest}), seed {report.seed}, on {report.environment.device}:"]
        lines += [
            f"  {row.case}: {row.quantity}: "
            + (row.problem or f"{row.measure} error {row.error:.3e}, at most {row.bound:.3e} allowed")
            for row in report.failures
        ]
        raise AssertionError("\n".join([*lines, *(f"note: {note}" for note in report.notes)]))
    return report


def _meaning(given: Any) -> tuple[Spec, Any]:
    if isinstance(given, Spec):
        return given, None
    if isinstance(given, str | os.PathLike):
        folder = Path(given)
        if folder.is_dir():
            return load_spec(folder / "spec.yaml"), folder
        return load_spec(given), None
    file = getattr(given, "__file__", None)
    if file is None or not hasattr(given, "nsa_attention"):
        raise TypeError(
            "package_or_spec: expected a Spec, a spec's file or name, or a generated package (a folder or a module), "
            f"got {type(given).__name__}"
        )
    return load_spec(Path(file).parent / "spec.yaml"), given
