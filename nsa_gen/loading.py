"""From a spec to an imported package in one call: generated into the user's cache once, imported from there."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from nsa_gen import loaded
from nsa_gen._files import replacing
from nsa_gen._resources import CACHE_VARIABLE, cache_dir, tuned_dir

if TYPE_CHECKING:
    from nsa_gen.spec import Spec


def load(spec: Spec | str | os.PathLike[str]) -> ModuleType:
    """Import and return a spec's package, which is generated into the user's cache unless it is already there.

    The package's path in the cache and its module name contain a digest of the generated text, so a changed spec or a
    newer nsa_gen gets its own package. Within a process, the same text gives the same module object. Several processes
    and threads may call this at once: one generates, the others wait. Any process with the same cache can unpickle
    objects of the package, such as a layer. Tuned tables that are shipped for a spec of this name are copied too; the
    package uses those that were measured with its kernels.

    Args:
        spec: a Spec, the path of a spec's file, or the name of a shipped spec.

    Returns:
        the package, with `nsa_attention`, the single steps, `SPEC` and `explain()`.

    Raises:
        nsa_gen.spec.SpecError: the spec is invalid or its file does not exist.
        OSError: the cache cannot be written; set NSA_GEN_CACHE_DIR to a folder that can.
    """
    from nsa_gen.rendering import render
    from nsa_gen.spec import Spec, load_spec

    meant = spec if isinstance(spec, Spec) else load_spec(spec)
    files = render(meant)
    key = f"{meant.name}_{_digest(files)}"
    module_name = loaded.PREFIX + key
    if module_name not in sys.modules:
        package = loaded.cached_folder(key)
        with _errors_that_name_the_cache():
            if not _is_whole(package, files):
                _generate_into(package, meant, files)
            _bring_tuned(package)
    return importlib.import_module(module_name)


@contextmanager
def _errors_that_name_the_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"the cache {cache_dir()} cannot be written ({error}); set {CACHE_VARIABLE} to a folder that can be"
        raise (OSError(error.errno, problem) if error.errno else OSError(problem)) from error


def _is_whole(package: Path, files: Iterable[str]) -> bool:
    """Whether nothing is missing, as where somebody clears old files from the cache."""
    return all((package / name).is_file() for name in files)


def _digest(files: dict[str, str]) -> str:
    """Twelve hex digits that depend on every path and every byte of a package."""
    digest = hashlib.sha256()
    for path, text in sorted(files.items()):
        for part in (path.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()[:12]


def _bring_tuned(package: Path) -> None:
    """Lay the shipped tuned tables of the spec beside the package, as they are today."""
    shipped = tuned_dir(package.name)
    if shipped is None:
        return
    for table in sorted(shipped.glob("*.json")):
        target = package / "tuned" / table.name
        text = table.read_bytes()
        if target.is_file() and target.read_bytes() == text:
            continue
        with replacing(target) as scratch:  # in one step, as another process may be reading it
            scratch.write_bytes(text)


def _generate_into(package: Path, spec: Spec, files: Iterable[str]) -> None:
    """Generate `package` beside its final place and move it there whole, one process at a time."""
    from filelock import FileLock

    from nsa_gen.rendering import generate

    home = package.parent
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if _is_whole(package, files):
            return
        scratch = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
        try:
            generate(spec, scratch)
            scratch.chmod(0o755)
            shutil.rmtree(home, ignore_errors=True)
            scratch.replace(home)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
