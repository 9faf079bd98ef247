"""Compile packages for every target with other versions of Triton than the one installed.

    python tools/compile_versions.py [--specs tiny,llama3_8b] FOLDER...

FOLDER is where a version lies, as `pip install --no-deps --target FOLDER triton==VERSION` leaves it. Exit status 0 when
every kernel compiles and fits every target with every version, else 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from nsa_gen.hardware import TARGETS  # noqa: E402
from nsa_gen.spec import shipped_specs  # noqa: E402
from nsa_gen.targets import compile_spec  # noqa: E402


def main() -> int:
    """Compile what the command line asks for; return the exit status."""
    known = shipped_specs()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="where a version of Triton lies")
    parser.add_argument("--specs", default="tiny,llama3_8b", help=f"of {', '.join(known)}")
    options = parser.parse_args()
    names = options.specs.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--specs: expected names of {', '.join(known)}, got {', '.join(unknown)}")
    if missing := [str(folder) for folder in options.folders if not (folder / "triton").is_dir()]:
        parser.error(f"FOLDER: expected a folder with a triton package in it, got {', '.join(missing)}")
    ok = True
    for folder in options.folders:
        for name in names:
            report = compile_spec(PROJECT / "generated" / name, TARGETS, triton_path=folder.resolve())
            failures = [row for row in report.rows if not row.ok]
            print(f"{folder.name}: {name}: {len(report.rows) - len(failures)} of {len(report.rows)} kernels fit")
            for row in failures:
                print(f"  {row.target} {row.kernel} ({', '.join(row.variants)}): {row.reason}")
            ok = ok and report.ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
