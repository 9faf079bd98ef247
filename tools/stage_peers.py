"""Lay the public packages of native sparse attention out in a folder for PYTHONPATH, for a machine without a network.

    python tools/stage_peers.py DEST --repository fla=GIT_DIR --repository sfnsa=GIT_DIR \\
        --repository nsa-triton=GIT_DIR --repository fsa=GIT_DIR [--wheel FILE ...]

GIT_DIR is the git directory of a clone; its HEAD is taken, and DEST/SOURCES.txt names the commits. A wheel is unpacked
beside the packages. All of it is Python and Triton: nothing is compiled.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """What is taken of one repository.

    Attributes:
        repository: where it is public.
        paths: what to take, and into which place.
        without: folders below that are left out.
        mends: by file, a text that must occur once, and what takes its place.
    """

    repository: str
    paths: tuple[str, ...]
    without: tuple[str, ...] = ()
    mends: Mapping[str, tuple[str, str]] = field(default_factory=dict)


SOURCES: Mapping[str, Source] = {
    # Without its layers and models, which import transformers; the package itself treats them as optional.
    "fla": Source("fla-org/flash-linear-attention", ("fla",), ("fla/layers", "fla/models")),
    "sfnsa": Source("mdy666/Scalable-Flash-Native-Sparse-Attention", ("flash_nsa",)),
    "nsa-triton": Source("XunhaoLai/native-sparse-attention-triton", ("native_sparse_attention",)),
    "fsa": Source(
        "Relaxed-System-Lab/Flash-Sparse-Attention",
        ("fsa", "nsa_ref"),
        # A stray comma makes a tuple of a pointer, which Triton 3.6 refuses to load from.
        mends={
            "fsa/ops/FSA_topk_sparse_attention.py": (
                "lse_ptrs = (lse_ptr + pid_q_j * stride_lse_n,)",
                "lse_ptrs = lse_ptr + pid_q_j * stride_lse_n",
            )
        },
    ),
}


def stage(dest: Path, repositories: Mapping[str, Path], wheels: Sequence[Path]) -> None:
    """Lay the packages out in `dest`, replacing what is there of them.

    Raises:
        subprocess.CalledProcessError: git cannot read a repository.
        ValueError: a text to be mended does not occur exactly once.
    """
    dest.mkdir(parents=True, exist_ok=True)
    commits = []
    for name, git_dir in repositories.items():
        source = SOURCES[name]
        for path in source.paths:
            shutil.rmtree(dest / path, ignore_errors=True)
        archive = _git(git_dir, "archive", "--format=tar", "HEAD", *source.paths)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(dest, filter="data")
        for path in source.without:
            shutil.rmtree(dest / path)
        for path, (old, new) in source.mends.items():
            text = (dest / path).read_text(encoding="utf-8")
            if text.count(old) != 1:
                raise ValueError(f"{name}: {path}: expected {old!r} once, found it {text.count(old)} times")
            (dest / path).write_text(text.replace(old, new), encoding="utf-8")
        commit = _git(git_dir, "rev-parse", "HEAD").decode().strip()
        commits.append(f"{name}: {source.repository} {commit}")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as file:
            file.extractall(dest)
        commits.append(f"wheel: {wheel.name}")
    (dest / "SOURCES.txt").write_text("\n".join(commits) + "\n", encoding="utf-8")


def _git(git_dir: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "--git-dir", str(git_dir), *arguments], check=True, stdout=subprocess.PIPE).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Stage what the command line names; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dest", type=Path, metavar="DEST")
    names = ", ".join(SOURCES)
    parser.add_argument("--repository", action="append", default=[], metavar="NAME=GIT_DIR", help=f"names: {names}")
    parser.add_argument("--wheel", type=Path, nargs="+", default=[], metavar="FILE")
    options = parser.parse_args(arguments)
    repositories = {}
    for item in options.repository:
        name, _, git_dir = item.partition("=")
        if name not in SOURCES or not Path(git_dir).is_dir():
            parser.error(f"--repository: expected NAME=GIT_DIR with a name of {names} and a folder, got {item!r}")
        repositories[name] = Path(git_dir)
    stage(options.dest, repositories, options.wheel)
    print((options.dest / "SOURCES.txt").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
