"""Read regular files, and write them atomically: no crash or Ctrl-C leaves half a file, or only some of several."""

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
    """Replace a file atomically by a text in UTF-8, with newlines unchanged. Its bytes are on disk before that.

    Raises OSError as `write_all` does.
    """
    write_all({path: text})


def write_all(texts: Mapping[Path, str], *, remove: Iterable[Path] = (), modified: float | None = None) -> None:
    """Replace several files by texts, then remove others. An interruption leaves all of this done, or nothing.

    Every text is on disk, under a hidden name, before the first file is replaced. Ctrl-C is deferred during the
    replacements. Missing folders are created. A file that is replaced keeps its mode. `modified` is the modification
    time of the files, or None for now.

    Raises:
        OSError: a file cannot be written, or is a folder, a pipe or a device. Then nothing has been replaced, unless
            a replacement itself failed. Every file is complete in any case.
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
"""The default limit on the size of a file that is read."""


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file. It does not wait for a pipe or read a device without end.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger than `most` bytes.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.ENOTSUP, "expected a regular file, got a pipe or a device", str(path))
        if found.st_size > most or len(text := file.read(most + 1)) > most:
            raise OSError(errno.EFBIG, f"expected at most {most} bytes", str(path))
    return text


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a regular file in UTF-8, read by `read_bytes`, without an initial byte order mark.

    Raises:
        OSError: as for `read_bytes`.
        ValueError: the file is not UTF-8, or begins with two byte order marks.
    """
    return without_mark(read_bytes(path, most).decode("utf-8"))


def without_mark(text: str) -> str:
    """A text without the initial byte order mark that some editors add. Raises ValueError if there are two."""
    text = text.removeprefix("\ufeff")
    if text.startswith("\ufeff"):
        raise ValueError("the byte order mark U+FEFF stands twice at the beginning; remove it")
    return text


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is too large.
        ValueError: the file is not JSON in UTF-8; a `json.JSONDecodeError` if the error has a position.
    """
    return parse_json(read_text(path))


def parse_json(text: str, *, finite: bool = True) -> Any:
    """The value of a JSON text. Raises ValueError if the text is not JSON or is nested too deeply.

    NaN, Infinity and numbers beyond the range of floats also raise ValueError, unless `finite` is false.
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
    """JSON text in which each innermost object or list, one that contains no others, is on one line."""
    inner = indent + " "
    children = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
    if not any(isinstance(child, Mapping | list | tuple) for child in children):
        return json.dumps(value)
    if isinstance(value, Mapping):
        lines = (f"{inner}{json.dumps(str(name))}: {json_text(child, inner)}" for name, child in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + json_text(child, inner) for child in children) + f"\n{indent}]"


LOCKS = 64
"""The most lock files of a user."""


@contextmanager
def one_at_a_time(path: Path, timeout: float = 60.0) -> Iterator[None]:
    """Allow only one process of this user at a time in a block for the same path. The path need not exist.

    The lock file is in the folder for temporary files, so nothing is left beside the path. If a process dies, its lock
    is released. Lock files are never removed, so a fixed number of locks serves all paths. Two paths may have the same
    lock, so blocks must not be nested.

    Raises:
        OSError: another process has held the lock for `timeout` seconds, or there is no folder for temporary files.
    """
    from filelock import FileLock

    number = int(hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest(), 16) % LOCKS
    with FileLock(Path(tempfile.gettempdir()) / f"nsa_gen_{os.getuid()}_{number}.lock", timeout=timeout):
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of an empty hidden file in the same folder, and replace `path` by that file at the end.

    If anything is raised within the block, even KeyboardInterrupt, `path` is unchanged and the hidden file is removed.
    """
    with _staged([path]) as scratches:
        yield scratches[path]
        with _uninterrupted():
            _put_in_place(scratches)


@contextmanager
def _staged(paths: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """Create an empty hidden file beside each path. After an error, remove them and the folders that were created."""
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
        # The innermost come first. Folders that are not empty stay.
        for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
            with suppress(OSError):
                folder.rmdir()
        raise


def require_replaceable(path: Path) -> None:
    """Raise OSError if the path exists but is no regular file. Replacing a device would remove it from the machine."""
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
    """Defer the signals of Ctrl-C and `kill` until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
