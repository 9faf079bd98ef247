"""Compile packages with other versions of Triton than the one installed.

    python tools/compile_versions.py [--specs tiny:batched,llama3_8b:packed] [--targets sm_90,gfx942] FOLDER...

After a spec stands the call whose launches are compiled, batched or packed; where none does, both are. Without
--targets they are compiled for all. FOLDER is where a version lies, as `pip install --no-deps --target FOLDER
triton==VERSION` leaves it. Exit status 0 when every kernel compiles and fits every target with every version, else 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from nsa_gen.hardware import TABLES, TARGETS  # noqa: E402
from nsa_gen.spec import shipped_specs  # noqa: E402
from nsa_gen.targets import VARIANTS, compile_spec  # noqa: E402


def main() -> int:
    """Compile what the command line asks for; return the exit status."""
    known = shipped_specs()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="where a version of Triton lies")
    parser.add_argument("--specs", default="tiny:batched,llama3_8b:packed", help=f"of {', '.join(known)}")
    parser.add_argument("--targets", default=",".join(TABLES), help="comma-separated (%(default)s)")
    options = parser.parse_args()
    targets = options.targets.split(",")
    if unknown := [name for name in targets if name not in TARGETS]:
        parser.error(f"--targets: expected names of {', '.join(TARGETS)}, got {', '.join(unknown)}")
    asked = [(name, call) for name, _, call in (text.partition(":") for text in options.specs.split(","))]
    if unknown := [name for name, _ in asked if name not in known]:
        parser.error(f"--specs: expected names of {', '.join(known)}, got {', '.join(unknown)}")
    if unknown := [call for _, call in asked if call and call not in VARIANTS]:
        parser.error(f"--specs: expected calls of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    if missing := [str(folder) for folder in options.folders if not (folder / "triton").is_dir()]:
        parser.error(f"FOLDER: expected a folder with a triton package in it, got {', '.join(missing)}")
    ok = True
    for folder in options.folders:
        for name, call in asked:
            package, path = PROJECT / "generated" / name, folder.resolve()
            report = compile_spec(package, targets, variants=[call] if call else VARIANTS, triton_path=path)
            failures = [row for row in report.rows if not row.ok]
            fit = f"{len(report.rows) - len(failures)} of {len(report.rows)} kernels fit"
            print(f"{folder.name}: {name} ({call or 'all calls'}): {fit}", flush=True)
            for row in failures:
                print(f"  {row.target} {row.kernel} ({', '.join(row.variants)}): {row.reason}")
            ok = ok and report.ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
