"""`nsa-gen cache`: the tuned configurations kept on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsa_gen.cli.common import (
    JsonOption,
    SpecArgument,
    note,
    noted_warnings,
    print_json,
    read_spec,
    require_output,
    show,
    stop,
    whole,
)

if TYPE_CHECKING:
    from nsa_gen.spec import Spec
    from nsa_gen.tuning.cache import Explanation, Verdict
    from nsa_gen.tuning.identity import Device
    from nsa_gen.tuning.store import Entry

cache = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Show and move tuned configurations.\n\nEntries lie in the user's cache, a file for each kernels' hash, GPU "
    "and bucket of calls.\n\n\b\nExample:\n  nsa-gen cache list\n  nsa-gen cache why llama3_8b --tokens 8192",
)
NamesArgument = Annotated[
    list[str], typer.Argument(metavar="NAME", help="Names of specs; all when left out.", show_default=False)
]


@cache.command("list")
def list_(names: NamesArgument = [], as_json: JsonOption = False) -> None:  # noqa: B006  typer copies it
    """Show what is tuned.

    Of specs that are shipped it also says which entries a package refuses, because their values are not legal.

    \b
    Example:
      nsa-gen cache list llama3_8b
    """
    from nsa_gen.spec import load_spec, shipped_specs
    from nsa_gen.tuning.cache import refusals
    from nsa_gen.tuning.store import Store

    with noted_warnings():
        found = [(path, entry) for path, entry in Store().all() if not names or entry.identity.spec in names]
    tuned = {entry.identity.spec for _, entry in found} & set(shipped_specs())
    refused = refusals([entry for _, entry in found], {name: load_spec(name) for name in tuned})
    if as_json:
        rows = zip(found, refused, strict=True)
        entries = [{"path": str(path), **entry.to_json(), "refused": said or None} for (path, entry), said in rows]
        print_json({"ok": True, "entries": entries})
        return
    from nsa_gen.cli.blocks import Text
    from nsa_gen.cli.tune_report import entries_table

    if not found:
        what = f"Nothing of {', '.join(names)}" if names else "Nothing"
        show(Text(f"{what} is tuned in {Store().root}. To tune: nsa-gen tune SPEC"))
        return
    show(entries_table(entry for _, entry in found), Text(f"In {Store().root}."))
    for (path, _), said in zip(found, refused, strict=True):
        if said:
            note(f"nsa-gen: {path} is refused by the package: {said}")


@cache.command("why")
def why(
    spec: SpecArgument,
    tokens: Annotated[int, typer.Option(metavar="N", parser=whole(), help="Key tokens of the call.")] = 8192,
    batch: Annotated[int, typer.Option(metavar="N", parser=whole(), help="Sequences of the call.")] = 1,
    packed: Annotated[bool, typer.Option("--packed", help="The call is of packed sequences.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="The call decodes; N is the cache's capacity.")] = False,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help='The GPU, such as "NVIDIA H100 80GB HBM3".', show_default="this machine's"),
    ] = None,
    package: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The generated package.", show_default="generated/NAME"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say which entry serves a call, and why others do not.

    Each other entry is compared field by field. Exits 1 when the cost model's choice is used.

    \b
    Example:
      nsa-gen cache why llama3_8b --tokens 8192
    """
    loaded = read_spec(spec, as_json=as_json)
    if decode and "decode" not in loaded.passes:
        raise typer.BadParameter(f"--decode: the spec has no decode pass; it has {', '.join(loaded.passes)}")
    from nsa_gen.tuning.cache import why as explain
    from nsa_gen.tuning.space import Bucket

    try:
        bucket = Bucket.of(tokens, batch, packed, decode)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    folder = (package if package is not None else Path("generated") / loaded.name) / "tuned"
    found = explain(loaded, _device(gpu), bucket, shipped=folder)
    if as_json:
        verdicts = [each.to_json() for each in found.verdicts]
        answer = {"ok": found.chosen is not None, "wanted": found.wanted.to_json(), "note": found.note}
        print_json({**answer, "entries": verdicts})
    else:
        _show_explanation(found)
    stop(found.chosen is not None)


def _show_explanation(found: Explanation) -> None:
    from nsa_gen.cli.blocks import Heading, Text

    wanted = found.wanted
    show(
        Text(
            f"Wanted: {wanted.spec}, kernels {wanted.kernels}, space {wanted.space}, {wanted.dtype}, measurement "
            f"{wanted.measurement}, {wanted.gpu} ({wanted.multiprocessors} multiprocessors, {wanted.architecture}), "
            f"bucket {wanted.bucket.name}."
        )
    )
    for verdict in found.verdicts:
        show(Heading(str(verdict.path), 3), *(Text(line) for line in _lines(verdict)))
    if found.note:
        show(Text(found.note))


def _lines(verdict: Verdict) -> list[str]:
    from nsa_gen.tuning.cache import LEVELS

    state = "used" if verdict.used else "not used"
    bucket = "" if verdict.entry is None else f", bucket {verdict.entry.identity.bucket.name}"
    lines = [f"{state} ({LEVELS[verdict.level]}{bucket}): {verdict.reason}"]
    lines += [f"  {'no' if each.fatal else 'ok'}  {each}" for each in verdict.differences]
    return lines + [f"  warning: tuned with {each.field} {each.found}, now {each.wanted}" for each in verdict.drift]


def _device(name: str | None) -> Device:
    """The GPU of a name, or this machine's."""
    from nsa_gen.hardware import UnknownGpuError, find_gpu, gpu_for_device
    from nsa_gen.tuning.identity import Device

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
    hip = torch.version.hip is not None
    architecture = facts.gcnArchName.split(":")[0] if hip else f"sm_{facts.major}{facts.minor}"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return Device(facts.name, facts.multi_processor_count, architecture, **versions)


@cache.command("export")
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", callback=require_output, help="The file to write.")],
    names: NamesArgument = [],  # noqa: B006
) -> None:
    """Write entries to one file, for another machine like this.

    They serve there on the same GPUs.

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
            note(f"nsa-gen: {file} cannot be written: {error}")
            stop(False)
    note(f"{count} entries written to {file}" if count else "nothing to export")
    stop(count > 0)


@cache.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="What export wrote.")],
    specs: Annotated[
        list[str], typer.Argument(metavar="SPEC", help="Specs that are not shipped.", show_default=False)
    ] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Take entries of a file into the cache.

    Entries that were measured for other kernels than today's are refused, and so are illegal configurations. Exits 1
    when one is refused.

    \b
    Example:
      nsa-gen cache import tuned.json my_operator.yaml
    """
    from nsa_gen.cli.common import read_specs, require_spec
    from nsa_gen.spec import load_spec, shipped_specs
    from nsa_gen.tuning.cache import import_entries
    from nsa_gen.tuning.store import Store, Unreadable

    known: dict[str, Spec] = {name: load_spec(name) for name in shipped_specs()}
    known |= {each.name: each for each in read_specs([require_spec(name) for name in specs], as_json=as_json)}
    try:
        found = import_entries(Store(), file, known)
    except (Unreadable, OSError) as error:
        note(f"nsa-gen: {error}")
        raise typer.Exit(1) from None
    if as_json:
        refused = [
            {**({} if entry is None else entry.identity.to_json()), "reason": reason} for entry, reason in found.refused
        ]
        saved = [entry.identity.to_json() for entry in found.saved]
        print_json({"ok": not refused, "saved": saved, "refused": refused})
    else:
        for entry in found.saved:
            print(f"saved {_name(entry)}")
        for entry, reason in found.refused:
            note(f"refused {'an entry' if entry is None else _name(entry)}: {reason}")
    stop(not found.refused)


def _name(entry: Entry) -> str:
    return f"{entry.identity.spec} {entry.identity.bucket.name} on {entry.identity.gpu}"


@cache.command("clear")
def clear(
    names: NamesArgument = [],  # noqa: B006
    stale: Annotated[bool, typer.Option("--stale", help="Only entries that no package uses any more.")] = False,
) -> None:
    """Delete entries. Those set aside as .bad stay.

    \b
    Example:
      nsa-gen cache clear --stale
    """
    from nsa_gen.tuning.store import Store

    store = Store()
    with noted_warnings():
        found = [(path, entry) for path, entry in store.all() if not names or entry.identity.spec in names]
        if stale:
            found = [(path, entry) for path, entry in found if _is_stale(entry)]
        try:
            count = store.remove(path for path, _ in found)
        except OSError as error:
            note(f"nsa-gen: the cache cannot be written: {error}")
            raise typer.Exit(1) from None
    note(f"{count} entries deleted from {store.root}")


def _is_stale(entry: Entry) -> bool:
    """Whether a shipped spec's kernels are no longer those of an entry; specs that are not shipped are not judged."""
    from nsa_gen.rendering import render
    from nsa_gen.spec import load_spec, shipped_specs
    from nsa_gen.tuning.identity import kernels_of

    name, decode = entry.identity.spec, entry.identity.bucket.decode
    if name not in shipped_specs():
        return False
    spec = load_spec(name)
    if decode and "decode" not in spec.passes:
        return True
    return kernels_of(render(spec), decode=decode) != entry.identity.kernels
