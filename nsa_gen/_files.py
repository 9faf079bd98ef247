"""Writing files whole: no reader, no crash and no Ctrl-C ever leaves half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of an empty file in the same folder, hidden, and put it in the place of `path` at the end.

    Whatever is raised within the block, KeyboardInterrupt included, leaves `path` as it was and no other file behind.
    The folder is created if need be; a file that is replaced keeps its mode.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise


def write_whole(path: Path, text: str) -> None:
    """Replace a file by a text, in UTF-8 with newlines as they are, in one step; its bytes reach the disk first."""
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
