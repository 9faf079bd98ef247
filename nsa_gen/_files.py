"""Writing files whole: no reader, no crash and no Ctrl-C ever leaves half of one, or some of several."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Replace a file by a text, in UTF-8 with newlines as they are, in one step; its bytes reach the disk first.

    Raises OSError as `write_all` does.
    """
    write_all({path: text})


def write_all(texts: Mapping[Path, str], *, remove: Iterable[Path] = (), modified: float | None = None) -> None:
    """Replace several files by texts, then remove others: all of it, or nothing if it is interrupted.

    Every text is on the disk, under a hidden name, before the first file is replaced; Ctrl-C waits while they are. The
    folders are created if need be; a file that is replaced keeps its mode. `modified` is the files' modification time,
    now if None.

    Raises:
        OSError: a file cannot be written. Nothing is replaced then, unless replacing itself has failed midway; each
            file is whole in any case.
    """
    with _staged(texts) as scratches:
        for path, scratch in scratches.items():
            with scratch.open("w", encoding="utf-8", newline="\n") as file:
                file.write(texts[path])
                file.flush()
                os.fsync(file.fileno())
            if modified is not None:
                os.utime(scratch, (modified, modified))
        with _uninterrupted():
            _put_in_place(scratches)
            for path in remove:
                path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON in UTF-8; `json.JSONDecodeError` where there is a place to name.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """What a JSON text says. Raises ValueError where it is none, or is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_text(value: Any, indent: str = "") -> str:
    """JSON with objects and lists that hold no others on a line each."""
    inner = indent + " "
    children = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
    if not any(isinstance(child, Mapping | list | tuple) for child in children):
        return json.dumps(value)
    if isinstance(value, Mapping):
        lines = (f"{inner}{json.dumps(str(name))}: {json_text(child, inner)}" for name, child in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + json_text(child, inner) for child in children) + f"\n{indent}]"


LOCKS = 64
"""Lock files of a user, at most."""


@contextmanager
def one_at_a_time(path: Path, timeout: float = 60.0) -> Iterator[None]:
    """Within the block no other process of this user is within its own for the same path, which need not exist.

    The lock lies among the temporary files, so that nothing is left beside the path; a process that dies gives it back.
    A few locks serve all paths, as their files stay: two paths may share one, so blocks must not be nested.

    Raises:
        OSError: another process has held it for `timeout` seconds, or there is no folder for temporary files.
    """
    from filelock import FileLock

    number = int(hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest(), 16) % LOCKS
    with FileLock(Path(tempfile.gettempdir()) / f"nsa_gen_{os.getuid()}_{number}.lock", timeout=timeout):
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of an empty file in the same folder, hidden, and put it in the place of `path` at the end.

    Whatever is raised within the block, KeyboardInterrupt included, leaves `path` as it was and no other file behind.
    """
    with _staged([path]) as scratches:
        yield scratches[path]
        with _uninterrupted():
            _put_in_place(scratches)


@contextmanager
def _staged(paths: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """An empty hidden file beside each path; after an error they are gone, and so are folders that were created."""
    scratches: dict[Path, Path] = {}
    folders: list[Path] = []
    try:
        for path in paths:
            with _uninterrupted():
                missing = [folder for folder in path.parents if not folder.exists()]
                folders += missing
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
                os.close(handle)
                scratches[path] = Path(name)
        yield scratches
    except BaseException:
        for scratch in scratches.values():
            with suppress(OSError):
                scratch.unlink()
        for folder in folders:  # the innermost first; those that hold something stay
            with suppress(OSError):
                folder.rmdir()
        raise


def _put_in_place(scratches: Mapping[Path, Path]) -> None:
    for path, scratch in scratches.items():
        scratch.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(scratch, path)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Within the block, the signals of Ctrl-C and of `kill` wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
