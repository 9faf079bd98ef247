"""The command line: one module a command, each of which parses its arguments, calls the room that decides, and prints.

Results go to stdout, progress and errors to stderr. Exit codes:

    0    fine
    1    the answer is no: a spec is invalid, a file is out of date, a kernel does not fit, a result is wrong, a file
         cannot be written
    2    the call is wrong: an unknown option, a file that does not exist
    70   a fault of nsa_gen's own; the traceback is shown
    130  interrupted by Ctrl-C
    141  the reader of the output went away

Command modules import nothing heavy at the top, so that `nsa-gen --help` needs neither torch nor pydantic nor rich.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence

ANSWER_IS_NO = 1
INTERNAL_FAULT = 70
INTERRUPTED = 130
BROKEN_PIPE = 141
_OF_THE_MACHINE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.ENXIO, errno.ENOTSUP),
)
"""Errors of files that no program is to blame for: no permission, no space, a file where a folder should be, a pipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: what follows the program's name; `sys.argv[1:]` when None.
    """
    _prepare_streams()
    try:
        code = _run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        # What is still in Python's buffer has no reader: without another descriptor, Python complains at exit.
        _send_to_nowhere(sys.stdout)
        code = BROKEN_PIPE
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            code = _fault()
        else:
            print(f"nsa-gen: {error}", file=sys.stderr)
            code = ANSWER_IS_NO
    except Exception:
        code = _fault()
    if code == INTERRUPTED:
        print("nsa-gen: interrupted", file=sys.stderr)
    return code


def _fault() -> int:
    """Show the traceback of the error at hand."""
    traceback.print_exc()
    print("nsa-gen: this is a fault of nsa_gen itself; please report it with the lines above", file=sys.stderr)
    return INTERNAL_FAULT


def _run(arguments: Sequence[str] | None) -> int:
    """Run the typer application and turn its SystemExit into a code."""
    from nsa_gen.cli.app import app

    try:
        app(args=None if arguments is None else list(arguments), prog_name="nsa-gen")
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        return 0 if end.code is None else ANSWER_IS_NO
    return 0


def _prepare_streams() -> None:
    """Make standard streams that take any text: a closed one is nowhere, and a narrow encoding gets replacements."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _send_to_nowhere(stream: object) -> None:
    """Replace a standard stream's descriptor by /dev/null."""
    descriptor = getattr(stream, "fileno", lambda: None)()
    if descriptor is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
