"""`nsa-gen cache`: the tuned configurations kept on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsa_gen.cli.blocks import Heading, Text, show
from nsa_gen.cli.common import (
    JsonOption,
    SpecArgument,
    note,
    noted_warnings,
    number_option,
    print_json,
    read_spec,
    read_specs,
    refuse,
    require_output,
    require_pass,
    require_spec,
    stop,
)

if TYPE_CHECKING:
    from nsa_gen.spec import Spec
    from nsa_gen.tuning.cache import Verdict
    from nsa_gen.tuning.store import Device, Entry, Store

cache = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Show and move tuned configurations.\n\nEntries are in the user's cache, one file for each hash of kernels, "
    "GPU and bucket of calls.\n\n\b\nExample:\n  nsa-gen cache list\n  nsa-gen cache why llama3_8b --tokens 8192",
)
NamesArgument = Annotated[
    list[str], typer.Argument(metavar="NAME", help="Names of specs; all when left out.", show_default=False)
]


def _named(store: Store, names: Sequence[str]) -> list[tuple[Path, Entry]]:
    """The entries of specs of some names, or all, with their files."""
    return [(path, entry) for path, entry in store.all() if not names or entry.identity.spec in names]


@cache.command("list")
def list_(names: NamesArgument = [], as_json: JsonOption = False) -> None:
    """Show what is tuned.

    For shipped specs it also shows which entries a package refuses because their values are not legal.

    \b
    Example:
      nsa-gen cache list llama3_8b
    """
    from nsa_gen.cli.tables import entries_table
    from nsa_gen.spec import load_spec, shipped_specs
    from nsa_gen.tuning.cache import refusals
    from nsa_gen.tuning.store import Store

    store = Store()
    with noted_warnings():
        found = _named(store, names)
    entries = [entry for _, entry in found]
    tuned = {entry.identity.spec for entry in entries} & set(shipped_specs())
    refused = refusals(entries, {name: load_spec(name) for name in tuned})
    if as_json:
        rows = zip(found, refused, strict=True)
        listed = [{"path": str(path), **entry.to_json(), "refused": said or None} for (path, entry), said in rows]
        print_json({"ok": True, "entries": listed})
        return
    if not found:
        what = f"Nothing for {', '.join(names)}" if names else "Nothing"
        show(Text(f"{what} is tuned in {store.root}. To tune: nsa-gen tune SPEC"))
        return
    show(entries_table(entries), Text(f"In {store.root}."))
    for (path, _), said in zip(found, refused, strict=True):
        if said:
            note(f"nsa-gen: {path} is refused by the package: {said}")


@cache.command("why")
def why(
    spec: SpecArgument,
    tokens: Annotated[int, number_option("Key tokens of the call.")] = 8192,
    batch: Annotated[int, number_option("Sequences of the call.")] = 1,
    packed: Annotated[bool, typer.Option("--packed", help="The call has packed sequences.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="The call decodes; N is the cache's capacity.")] = False,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help='The GPU, such as "NVIDIA H100 80GB HBM3".', show_default="this machine's"),
    ] = None,
    package: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The generated package.", show_default="generated/NAME")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which entry serves a call, and why others do not.

    All other entries are compared field by field. Exits 1 if no entry serves the call, and the cost model's choice is
    used.

    \b
    Example:
      nsa-gen cache why llama3_8b --tokens 8192
    """
    loaded = read_spec(spec, as_json=as_json)
    require_pass(loaded, ["decode"] if decode else [], "--decode")
    from nsa_gen.tuning.cache import why as explain
    from nsa_gen.tuning.space import Bucket

    try:
        bucket = Bucket.of(tokens, batch, packed, decode)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    folder = (package if package is not None else Path("generated") / loaded.name) / "tuned"
    found = explain(loaded, _device(gpu), bucket, shipped=folder)
    wanted = found.wanted
    if as_json:
        answer = {"ok": found.chosen is not None, "wanted": asdict(wanted), "note": found.note}
        print_json({**answer, "entries": [each.to_json() for each in found.verdicts]})
    else:
        opening = Text(
            f"Wanted: {wanted.spec}, kernels {wanted.kernels}, space {wanted.space}, {wanted.dtype}, measurement "
            f"{wanted.measurement}, {wanted.gpu} ({wanted.multiprocessors} multiprocessors, {wanted.architecture}), "
            f"bucket {wanted.bucket.name}."
        )
        verdicts = [block for each in found.verdicts for block in (Heading(str(each.path), 3), *_verdict(each))]
        show(opening, *verdicts, *([Text(found.note)] if found.note else []))
    stop(found.chosen is not None)


def _verdict(verdict: Verdict) -> list[Text]:
    from nsa_gen.tuning.cache import LEVELS

    state = "used" if verdict.used else "not used"
    bucket = "" if verdict.entry is None else f", bucket {verdict.entry.identity.bucket.name}"
    lines = [f"{state} ({LEVELS[verdict.level]}{bucket}): {verdict.reason}"]
    lines += [f"  {'no' if each.fatal else 'ok'}  {each}" for each in verdict.differences]
    lines += [f"  warning: tuned with {each.field} {each.found}, now {each.wanted}" for each in verdict.drift]
    return [Text(line) for line in lines]


def _device(name: str | None) -> Device:
    """The GPU of a name, or this machine's."""
    from nsa_gen.hardware import UnknownGpuError, find_gpu, gpu_for_device, target_of
    from nsa_gen.tuning.store import Device

    if name is not None:
        try:
            gpu = gpu_for_device(name) or find_gpu(name)
        except UnknownGpuError as error:
            raise typer.BadParameter(f"--gpu: {error}") from None
        return Device(name, gpu.sm_count, gpu.target)
    import torch

    if not torch.cuda.is_available():
        raise typer.BadParameter("--gpu: torch sees no GPU here; name one, such as --gpu h100")
    import triton

    facts = torch.cuda.get_device_properties(0)
    architecture = target_of(facts, hip=bool(torch.version.hip))
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return Device(facts.name, facts.multi_processor_count, architecture, **versions)


@cache.command("export")
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", callback=require_output, help="The file to write.")],
    names: NamesArgument = [],
) -> None:
    """Write entries to one file, for another machine.

    That machine must have the same GPUs.

    \b
    Example:
      nsa-gen cache export tuned.json llama3_8b
    """
    from nsa_gen.tuning.cache import export as write
    from nsa_gen.tuning.store import Store

    with noted_warnings():
        try:
            count = write(Store(), file, names)
        except OSError as error:
            refuse(f"{file} cannot be written: {error}")
    note(f"{count} entries written to {file}" if count else "nothing to export")
    stop(count > 0)


@cache.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A file that export wrote.")
    ],
    specs: Annotated[
        list[str], typer.Argument(metavar="SPEC", help="Specs that are not shipped.", show_default=False)
    ] = [],
    as_json: JsonOption = False,
) -> None:
    """Add the entries of a file to the cache.

    Entries that were measured for other kernels than the current ones are refused, and so are illegal configurations.
    Exits 1 if one is refused.

    \b
    Example:
      nsa-gen cache import tuned.json my_operator.yaml
    """
    from nsa_gen.spec import load_spec, shipped_specs
    from nsa_gen.tuning.cache import import_entries
    from nsa_gen.tuning.store import Store, Unreadable

    known: dict[str, Spec] = {name: load_spec(name) for name in shipped_specs()}
    known |= {each.name: each for each in read_specs([require_spec(name) for name in specs], as_json=as_json)}
    try:
        found = import_entries(Store(), file, known)
    except (Unreadable, OSError) as error:
        refuse(str(error))
    if as_json:
        refused = [
            {**({} if entry is None else asdict(entry.identity)), "reason": reason} for entry, reason in found.refused
        ]
        print_json({"ok": not refused, "saved": [asdict(each.identity) for each in found.saved], "refused": refused})
    else:
        for entry in found.saved:
            print(f"saved {_name(entry)}")
        for entry, reason in found.refused:
            note(f"refused {_name(entry)}: {reason}")
    stop(not found.refused)


def _name(entry: Entry | None) -> str:
    if entry is None:
        return "an entry"
    return f"{entry.identity.spec} {entry.identity.bucket.name} on {entry.identity.gpu}"


@cache.command("clear")
def clear(
    names: NamesArgument = [],
    stale: Annotated[bool, typer.Option("--stale", help="Only entries that no package uses any more.")] = False,
) -> None:
    """Delete entries. Files set aside as .bad are kept.

    \b
    Example:
      nsa-gen cache clear --stale
    """
    from nsa_gen.tuning.cache import is_stale
    from nsa_gen.tuning.store import Store

    store = Store()
    with noted_warnings():
        paths = [path for path, entry in _named(store, names) if not stale or is_stale(entry)]
        try:
            count = store.remove(paths)
        except OSError as error:
            refuse(f"the cache cannot be written: {error}")
    note(f"{count} entries deleted from {store.root}")
