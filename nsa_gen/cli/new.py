"""`nsa-gen new`: a commented spec to start from, like a shipped one or in the shape of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsa_gen.cli.common import (
    JsonOption,
    note,
    output_option,
    print_json,
    read_spec,
    refuse,
    refuse_problems,
    require_output,
    require_spec,
)

if TYPE_CHECKING:
    from nsa_gen.spec.huggingface import ModelShape


def _require_name(name: str) -> str:
    """Refuse what cannot be the name of a package."""
    from pydantic_core import PydanticCustomError

    from nsa_gen.spec.fields import PACKAGE_NAME

    try:
        return PACKAGE_NAME.check(name)
    except PydanticCustomError as error:
        raise typer.BadParameter(error.message()) from None


def _require_file(path: Path | None) -> Path | None:
    """Refuse what cannot be the file to write; a folder is answered where the name that it lacks is known."""
    return path if path is not None and path.is_dir() else require_output(path)


def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", callback=_require_name, help="Name of the spec and of its package.")
    ],
    like: Annotated[
        str,
        typer.Option(
            metavar="SPEC", callback=require_spec, help="The spec to copy: a path, or the name of a shipped spec."
        ),
    ] = "llama3_8b",
    config: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FILE", exists=True, help="A model's config.json (Hugging Face): heads, dims, dtype."
        ),
    ] = None,
    output: Annotated[Path | None, output_option("The file to write.", _require_file, "NAME.yaml")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a commented spec to start from.

    The spec is a copy of another one. A comment on each field says what it means and which values it may have. With
    --from, heads, head dims, dtype and scale come from a model of a known type, and properties of the model that a spec
    cannot express are noted. The JSON Schema that editors use for completion is written next to the spec, unless it
    exists.

    \b
    Example:
      nsa-gen new my_attention --like llama3_8b
      nsa-gen new my_attention --from path/to/model/config.json -o specs/my_attention.yaml
    """
    path = output if output is not None else Path(f"{name}.yaml")
    if path.is_dir():
        raise typer.BadParameter(f"--output: {path} is a folder; expected a file such as {path / name}.yaml")
    base = read_spec(like, as_json=as_json)
    if path.exists() and not force:
        reason = f"{path} exists and is not replaced; choose another --output, or pass --force"
        refuse(reason, {"problem": reason} if as_json else None)
    from nsa_gen.spec import SpecError
    from nsa_gen.spec.huggingface import read_config
    from nsa_gen.spec.starter import starter_text

    changes: dict[str, Any] = {"name": name, "description": f"Native sparse attention like {base.name}"}
    notes: tuple[str, ...] = ()
    if config is not None:
        try:
            shape = read_config(config)
        except SpecError as error:
            refuse_problems(error.problems, as_json=as_json)
        notes = shape.notes
        changes |= _of_model(shape)
    spec = base.replace(**changes)
    text = starter_text(spec, [f"Change it, then: nsa-gen check {path.name}", *notes])
    written = _write(path, text, force=force, as_json=as_json)
    if as_json:
        print_json({"ok": True, "name": name, "path": str(path), "written": written, "notes": list(notes)})
        return
    for line in notes:
        note(f"note: {line}")
    print(path)


def _of_model(shape: ModelShape) -> dict[str, Any]:
    """The fields of a spec that a model decides."""
    description = f"Native sparse attention in the head layout of {shape.model or 'the model'}"
    same = {name: getattr(shape, name) for name in ("heads", "head_dim", "dtype", "scale")}
    return {"description": description, "fp32_precision": "ieee", **same}


def _write(path: Path, text: str, *, force: bool, as_json: bool) -> list[str]:
    """Write the spec and, unless it is there, the schema beside it, both or neither; return what was written."""
    from nsa_gen._files import write_all
    from nsa_gen._resources import specs_dir
    from nsa_gen.spec.schema import SCHEMA_FILE

    schema = (specs_dir() / SCHEMA_FILE).read_text(encoding="utf-8")
    beside = path.parent / SCHEMA_FILE
    files = {path: text} if beside.exists() and not force else {beside: schema, path: text}
    try:
        write_all(files)
    except OSError as error:
        reason = f"{path} cannot be written: {error}"
        refuse(reason, {"problem": reason} if as_json else None)
    return [str(each) for each in files]
