"""Reading regular files, and writing them whole: no crash and no Ctrl-C leaves half of one, or some of several."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn


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
        OSError: a file cannot be written, or is a folder, a pipe or a device. Nothing is replaced then, unless
            replacing itself has failed midway; each file is whole in any case.
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


MOST_BYTES = 2**28
"""Size of a file that is read, at most, unless its reader says otherwise."""


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file. A pipe is not waited for, and a device is not read for ever.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than `most` bytes.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.ENOTSUP, "expected a regular file, got a pipe or a device", str(path))
        if found.st_size > most or len(text := file.read(most + 1)) > most:
            raise OSError(errno.EFBIG, f"expected at most {most} bytes", str(path))
    return text


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a regular file in UTF-8, as `read_bytes` reads it; one byte order mark before it is left out.

    Raises:
        OSError: as by `read_bytes`.
        ValueError: it is not UTF-8, or its byte order mark stands twice.
    """
    return without_mark(read_bytes(path, most).decode("utf-8"))


def without_mark(text: str) -> str:
    """A text without the byte order mark that some editors begin it with. Raises ValueError where there are two."""
    text = text.removeprefix("\ufeff")
    if text.startswith("\ufeff"):
        raise ValueError("the byte order mark U+FEFF stands twice at the beginning; remove it")
    return text


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read, is no regular file, or is too large.
        ValueError: it is no JSON in UTF-8; `json.JSONDecodeError` where there is a place to name.
    """
    return parse_json(read_text(path))


def parse_json(text: str, *, finite: bool = True) -> Any:
    """What a JSON text says. Raises ValueError where it is none, or is nested too deeply to be read.

    NaN and Infinity are no JSON, nor is a number beyond all floats taken for one, unless `finite` is false.
    """
    hooks: dict[str, Any] = {"parse_constant": _refuse_number, "parse_float": _finite_number} if finite else {}
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {text:.40}, which is no JSON")


def _finite_number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


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
            require_replaceable(path)
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
        # The innermost first; those that hold something stay.
        for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
            with suppress(OSError):
                folder.rmdir()
        raise


def require_replaceable(path: Path) -> None:
    """Raise OSError for what is there but is no regular file: to replace a device would remove it from the machine."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder", str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.ENOTSUP, "expected a regular file or a new one, got a pipe or a device", str(path))


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
