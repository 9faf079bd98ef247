"""The machine and the versions with which times were taken. Does not import torch."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nsa_gen

PACKAGES = ("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")
"""Packages whose versions a time depends on: those that we need, and other packages that are timed."""


def machine() -> dict[str, Any]:
    """GPU, driver, versions, date and the commit of the checkout (None if unknown)."""
    gpu = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
    name, driver, memory = gpu.splitlines()[0].split(", ") if gpu else (None, None, None)
    project = str(Path(nsa_gen.__file__).resolve().parents[1])
    return {
        "gpu": name,
        "driver": driver,
        "gpu_memory_mib": None if memory is None else float(memory),
        "python": platform.python_version(),
        "nsa_gen": nsa_gen.__version__,
        **{package: _version(package) for package in PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", project, "rev-parse", "HEAD") or None,
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
