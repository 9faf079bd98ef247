"""`nsa-gen generate`: write the package of a spec, or say how it differs from what would be written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsa_gen.cli.common import (
    JsonOption,
    SpecsArgument,
    note,
    output_option,
    print_json,
    read_specs,
    refuse,
    require_folder,
    stop,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsa_gen.spec import Spec


def generate(
    specs: SpecsArgument,
    out_dir: Annotated[Path, output_option("Folder of the packages.", require_folder)] = Path("generated"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 and list the files that are out of date.")
    ] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Write nothing; exit 1 and show what would change in each file.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the packages of specs.

    Each package goes into DIR/<name of the spec>. Files that nsa-gen did not write are left unchanged.

    \b
    Example:
      nsa-gen generate specs/llama3_8b.yaml -o generated
      nsa-gen generate llama3_8b --check
    """
    loaded = read_specs(specs, as_json=as_json)
    _refuse_equal_names(loaded)
    if check or diff:
        _compare(loaded, out_dir, show=diff, as_json=as_json)
    else:
        _write(loaded, out_dir, as_json=as_json)


def _write(specs: Sequence[Spec], out_dir: Path, *, as_json: bool) -> None:
    """Write every package and name the folders."""
    from nsa_gen.rendering import RefusedOverwriteError
    from nsa_gen.rendering import generate as generate_package

    packages: list[dict[str, str]] = []
    for spec in specs:
        try:
            package = generate_package(spec, out_dir)
        except RefusedOverwriteError as error:
            refuse(str(error), {"packages": packages, "refused": str(error)} if as_json else None)
        except OSError as error:
            result = {"packages": packages, "problem": str(error)}
            refuse(f"{out_dir} cannot be written: {error}", result if as_json else None)
        packages.append({"name": spec.name, "digest": spec.digest(), "path": str(package)})
        if not as_json:
            print(package)
    if as_json:
        print_json({"ok": True, "packages": packages})


def _compare(specs: Sequence[Spec], out_dir: Path, *, show: bool, as_json: bool) -> None:
    """Compare every package with what would be written; end with exit code 1 if one differs."""
    from nsa_gen.rendering import differences

    packages = []
    for spec in specs:
        diffs = differences(spec, out_dir)
        # The first line of a unified diff is `--- FILE (on disk)`.
        files = [text.splitlines()[0].removeprefix("--- ").removesuffix(" (on disk)") for text in diffs]
        package = {"name": spec.name, "ok": not diffs, "out_of_date": files}
        packages.append({**package, "diffs": list(diffs)} if show else package)
        if not as_json:
            for text, file in zip(diffs, files, strict=True):
                print(text if show else file)
    current = all(package["ok"] for package in packages)
    if as_json:
        print_json({"ok": current, "packages": packages})
    elif not current:
        names = [str(package["name"]) for package in packages if not package["ok"]]
        target = "" if out_dir == Path("generated") else f" -o {out_dir}"
        note(f"out of date: {', '.join(names)}; to update them: nsa-gen generate SPEC{target}")
    stop(current)


def _refuse_equal_names(specs: Sequence[Spec]) -> None:
    """Two specs of one name would write into one folder, and the second would win."""
    repeated = [name for name, times in Counter(spec.name for spec in specs).items() if times > 1]
    if repeated:
        raise typer.BadParameter(
            f"several specs are named {', '.join(repeated)} and would be written into the same folder; "
            "rename one, or generate them into different folders with -o"
        )
