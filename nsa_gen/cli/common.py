"""What the commands share: arguments and options, their checks, and reading a spec or refusing it.

What a person writes as an argument is refused here, before any work: exit code 2, with what was expected and what came.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from nsa_gen.cli import ANSWER_IS_NO

if TYPE_CHECKING:
    from nsa_gen.spec import Problem, Spec

MOST_TOKENS = 2**31 - 1
"""Positions are 32-bit numbers in the kernels."""
MOST_SEED = 2**62
"""Seeds are counted on from, and torch takes 64 bits."""
MOST_JOBS, MOST_EXAMPLES = 1024, 10**6
PASSES = ("forward", "backward", "decode")


# Output


def print_json(result: Any) -> None:
    """Print a result for a machine: indented JSON on stdout. Non-finite numbers are refused, since JSON has none."""
    print(json.dumps(result, indent=2, allow_nan=False))


def note(message: str) -> None:
    """Print a line of progress or of error on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def noted_warnings() -> Iterator[None]:
    """Within the block, each warning is a line on stderr at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest, **more: note(f"nsa-gen: {message}")
        yield


def stop(yes: bool) -> None:
    """End the command with exit code 1 unless its answer is yes."""
    if not yes:
        raise typer.Exit(ANSWER_IS_NO)


def refuse(reason: str, result: dict[str, Any] | None = None) -> NoReturn:
    """End the command with exit code 1 and a line on stderr; print `result` as JSON where one was asked for."""
    if result is not None:
        print_json({"ok": False, **result})
    note(f"nsa-gen: {reason}")
    raise typer.Exit(ANSWER_IS_NO)


def command_line(arguments: Sequence[str]) -> str:
    """A command of nsa-gen as one would type it."""
    import shlex

    return shlex.join(["nsa-gen", *arguments])


# Specs


def read_spec(argument: str, *, as_json: bool) -> Spec:
    """Load a spec, or print every problem with it and end with exit code 1.

    Args:
        argument: a path or a shipped spec's name, already through `require_spec`.
        as_json: print the problems as JSON on stdout rather than as lines on stderr.
    """
    return read_specs([argument], as_json=as_json)[0]


def read_specs(arguments: Sequence[str], *, as_json: bool) -> list[Spec]:
    """Load several specs, or print the problems of all of them and end with exit code 1."""
    found = [try_spec(argument) for argument in arguments]
    if problems := [problem for _, mistakes in found for problem in mistakes]:
        refuse_problems(problems, as_json=as_json)
    return [spec for spec, _ in found if spec is not None]


def try_spec(argument: str) -> tuple[Spec | None, tuple[Problem, ...]]:
    """Load a spec: the spec and no problems, or None and all of its problems."""
    from nsa_gen.spec import SpecError, load_spec

    try:
        return load_spec(argument), ()
    except SpecError as error:
        return None, error.problems


def refuse_problems(problems: Sequence[Problem], *, as_json: bool) -> NoReturn:
    """Print problems, as JSON on stdout or as lines on stderr, and end with exit code 1."""
    if as_json:
        print_json({"ok": False, "problems": [problem_as_dict(problem) for problem in problems]})
    else:
        note("\n".join(map(str, problems)))
    raise typer.Exit(ANSWER_IS_NO)


def problem_as_dict(problem: Problem) -> dict[str, Any]:
    """A problem with its position, for `--json`."""
    return {**asdict(problem), "file": str(problem.file)}


def require_spec(argument: str) -> str:
    """Refuse a SPEC that is neither an existing file nor the name of a shipped spec, with a suggestion."""
    if os.path.isfile(argument):  # False, too, for what can be no path
        if not os.access(argument, os.R_OK):
            raise typer.BadParameter(f"{argument} cannot be read: permission denied")
        return argument
    from nsa_gen.spec import shipped_specs

    shipped = shipped_specs()
    if argument in shipped:
        return argument
    if os.path.exists(argument):
        kind = "a folder" if os.path.isdir(argument) else "no regular file"
        raise typer.BadParameter(f"{argument} is {kind}; expected a spec's file, or one of {', '.join(shipped)}")
    from difflib import get_close_matches

    close = get_close_matches(Path(argument).stem, shipped, n=1)
    hint = f"did you mean {close[0]}?" if close else f"shipped specs: {', '.join(shipped)}"
    raise typer.BadParameter(f"no file {argument}, and no shipped spec of that name; {hint}")


def require_pass(spec: Spec, wanted: Sequence[str], option: str = "--passes") -> None:
    """Refuse a pass that a spec does not have."""
    if missing := [name for name in wanted if name not in spec.passes]:
        raise typer.BadParameter(f"{option}: the spec has no {missing[0]} pass; it has {', '.join(spec.passes)}")


# Values


def shortened(text: str, most: int = 40) -> str:
    """A text for an error message: its beginning, where it is long."""
    return text if len(text) <= most else f"{text[:most]}..."


def split_list(values: Sequence[str]) -> list[str]:
    """The items of an option that may be repeated and may hold commas, each once: `--target a,b --target c,a`.

    An empty item is refused: `--target ""` is no way to leave the option out.
    """
    items = [item.strip() for value in values for item in value.split(",")]
    if "" in items:
        raise typer.BadParameter(f"expected items separated by commas, got {shortened(','.join(values))!r}")
    return list(dict.fromkeys(items))


def some_of(known: Sequence[str]) -> Callable[[list[str]], list[str]]:
    """The callback of an option that takes some of several names: refuses others, and keeps the order given."""

    def require(values: list[str]) -> list[str]:
        items = split_list(values)
        for item in items:
            if item not in known:
                raise typer.BadParameter(f"expected some of {', '.join(known)}, got {shortened(item)!r}")
        return items

    return require


def require_passes(values: list[str]) -> list[str]:
    """Split `forward,backward`, refuse what is no pass, and a backward alone."""
    found = some_of(PASSES)(values)
    if found == ["backward"]:
        raise typer.BadParameter("a backward needs its forward: expected forward or forward,backward")
    return [name for name in PASSES if name in found]


def parse_whole(text: str, least: int = 1, most: int = MOST_TOKENS) -> int:
    """A whole number written in the digits 0 to 9, within bounds."""
    digits = text.strip()
    number = digits.lstrip("0") or "0"
    right = digits.isascii() and digits.isdigit() and len(number) <= len(str(most))
    if not right or not least <= int(number) <= most:
        raise typer.BadParameter(f"expected a number of at least {least} and at most {most}, got {shortened(text)!r}")
    return int(number)


def require_lengths(values: list[str]) -> list[int]:
    """Split `63,65`, refuse what is no positive number or too great a one; an empty list when none is given."""
    return list(dict.fromkeys(map(parse_whole, split_list(values))))


_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(value: str | float) -> float:
    """A duration of at least a second, such as 90s, 5m, 1.5h or 300, in seconds."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh]?)", value.strip())
    duration = float(found[1]) * _UNITS[found[2] or "s"] if found else 0.0
    if duration < 1:
        raise typer.BadParameter(f"expected a duration such as 90s, 5m or 1h, got {shortened(value)!r}")
    return duration


def require_output(path: Path | None) -> Path | None:
    """Refuse a file to write that is a pipe, a device or a folder."""
    from nsa_gen._files import require_replaceable

    if path is not None:
        try:
            require_replaceable(path)
        except OSError as error:
            raise typer.BadParameter(f"{path}: {error.strerror}") from None
    return path


def require_folder(path: Path | None) -> Path | None:
    """Refuse a folder to write into that is something else, or can never be one."""
    if path is None or os.path.isdir(path):
        return path
    broken = [str(one) for one in (path, *path.parents) if os.path.islink(one) and not os.path.exists(one)]
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise typer.BadParameter(f"{shortened(str(path))} cannot be a folder: {error.strerror}") from None
        if broken:
            raise typer.BadParameter(f"{broken[-1]} is a broken link; expected a folder") from None
        return path
    raise typer.BadParameter(f"{path}: expected a folder or a new one, got a file, a pipe or a device")


def require_gpu_name(name: str) -> str:
    """Refuse a GPU that the hardware table does not know; its key there, for its key or architecture."""
    from nsa_gen.hardware import UnknownGpuError, find_gpu

    try:
        return find_gpu(name).key
    except UnknownGpuError as error:
        raise typer.BadParameter(str(error)) from None


# Arguments and options


def number_option(
    help: str, least: int = 1, most: int = MOST_TOKENS, default: str | bool = True, names: Sequence[str] = ()
) -> Any:
    """An option that takes one whole number; a default passes through its parser, too."""

    def parse(value: str | int) -> int:
        return parse_whole(value, least, most) if isinstance(value, str) else value

    return typer.Option(*names, metavar="N", parser=parse, help=help, show_default=default)


def lengths_option(help: str, default: str) -> Any:
    """An option that takes several positive numbers."""
    return typer.Option(metavar="N[,N]", callback=require_lengths, help=help, show_default=default)


def names_option(help: str, callback: Callable[[list[str]], list[str]], default: str | bool) -> Any:
    """An option that takes several names."""
    return typer.Option(metavar="NAME[,NAME]", callback=callback, help=help, show_default=default)


def output_option(help: str, callback: Callable[[Path | None], Path | None], default: str | bool = True) -> Any:
    """--output: a file or a folder to be written."""
    metavar = "DIR" if callback is require_folder else "FILE"
    return typer.Option("--output", "-o", metavar=metavar, callback=callback, help=help, show_default=default)


def _require_specs(arguments: list[str]) -> list[str]:
    return [require_spec(argument) for argument in arguments]


SpecArgument = Annotated[
    str,
    typer.Argument(
        metavar="SPEC", callback=require_spec, help="Path of a spec, or name of a shipped spec.", show_default=False
    ),
]
SpecsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC", callback=_require_specs, help="Paths of specs, or names of shipped specs.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SeedOption = Annotated[int, number_option("Seed of the random inputs.", 0, MOST_SEED)]
JobsOption = Annotated[
    int, number_option("Kernels compiled at the same time.", 1, MOST_JOBS, "number of cores", ("--jobs", "-j"))
]
CORES = os.cpu_count() or 1
BudgetOption = Annotated[
    float | None,
    typer.Option(
        metavar="TIME", parser=seconds, help="Start nothing new after this time: 90s, 5m, 1h.", show_default="no limit"
    ),
]
