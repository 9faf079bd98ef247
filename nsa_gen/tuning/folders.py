"""Where a tuning works: a folder of the cache that a later run finds again, and files that no other tuner writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_gen._resources import cache_dir
from nsa_gen.rendering import generate

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

Say = Callable[[str], None]


@contextmanager
def work_folder(spec: Spec, kernels: str, say: Say) -> Iterator[tuple[Path, Path]]:
    """A folder of the cache, with the package in it; a temporary one where the cache is read-only."""
    folder = cache_dir() / "tuning" / f"{spec.name}-{spec.digest()}-{kernels}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # which a read-only folder refuses
            package = generate(spec, folder / "package")
    except OSError as error:
        say(f"the cache cannot be written ({error}); working in a temporary folder, so this run cannot be resumed")
        with tempfile.TemporaryDirectory(prefix="nsa_gen_tune_") as temporary:
            yield Path(temporary), generate(spec, Path(temporary) / "package")
        return
    yield folder, package


@contextmanager
def own_file(path: Path, say: Say) -> Iterator[Path]:
    """A file that no other tuner writes: this one, or, while another has it, one named after this process."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another tuner writes {path.name}; this one keeps a journal of its own")
        yield path.with_name(path.name.replace(".journal", f".{os.getpid()}.journal"))
        return
    except OSError:  # a folder that has become read-only: the journal will say so
        yield path
        return
    try:
        yield path
    finally:
        lock.release()
