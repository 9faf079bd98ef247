"""How the tests of the command line call it: in a fresh process, as a user does, or in this one if that is enough."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nsa_gen.cli import main

Answer = subprocess.CompletedProcess


@pytest.fixture
def nsa_gen(tmp_path: Path) -> Callable[..., Answer[str]]:
    """Run `nsa-gen ARGUMENTS` in a process of its own, in an empty folder, with an empty cache."""

    def run(*arguments: str, cwd: Path | None = None, timeout: float = 300) -> Answer[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"NSA_GEN_CACHE_DIR": str(tmp_path / "cache"), "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "nsa_gen", *arguments],
            cwd=cwd or tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A spec's path: few kernels, as what each costs a command is seen elsewhere."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "version: 1\nname: small\nheads: {query: 2, kv: 1}\nhead_dim: 16\ndtype: float32\n"
        "window: {size: 24}\npasses: [forward]\n"
    )
    return str(path)


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer[str]]:
    """Run `nsa-gen ARGUMENTS` in this process, in an empty folder: quicker, for commands that only parse and print."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Answer[str]:
        capsys.readouterr()
        environment = dict(os.environ)
        try:
            code = main(arguments)
        finally:
            os.environ.clear()
            os.environ.update(environment)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, captured.out, captured.err)

    return run


@pytest.fixture
def invalid_spec(tmp_path: Path) -> Path:
    """A spec with three mistakes, one of them on line 4."""
    path = tmp_path / "invalid.yaml"
    path.write_text(
        "version: 1\nname: invalid\ndtype: float32\nheads: {query: 6, kv: 4}\nhead_dim: 63\nwindow: {size: 0}\n"
    )
    return path
