"""`nsa-gen env`: the versions, devices and folders that decide what this machine can do; for bug reports too."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from nsa_gen import __version__
from nsa_gen.cli.common import JsonOption, print_json


def env(as_json: JsonOption = False) -> None:
    """Show versions, devices and folders.

    Shows Python, torch, triton, GPUs, their driver, the state of the interpreter and the caches.

    \b
    Example:
      nsa-gen env --json
    """
    facts = environment()
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        for index, line in enumerate(_lines(value)):
            print(f"{'' if index else name.replace('_', ' '):<{width}}{line}")


def environment() -> dict[str, Any]:
    """Everything `nsa-gen env` shows, ready for JSON; a value is None where the thing is absent."""
    from nsa_gen._resources import cache_dir, specs_dir, templates_dir

    return {
        "nsa_gen": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "torch": _installed_version("torch"),
        "triton": _installed_version("triton"),
        **_accelerators(),
        "driver": nvidia_driver(),
        "interpreter": "on (TRITON_INTERPRET)" if is_interpreting() else "off",
        "templates": str(templates_dir()),
        "specs": str(specs_dir()),
        "cache": str(cache_dir()),
        "triton_cache": str(triton_cache()),
    }


def is_interpreting() -> bool:
    """Whether TRITON_INTERPRET has kernels run on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def triton_cache() -> Path:
    """The folder triton keeps machine code in, as triton itself decides it."""
    home = Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"))
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _accelerators() -> dict[str, Any]:
    """What torch sees: the CUDA or ROCm version it was built for, and each device."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that torch wants is missing
        return {"cuda": None, "rocm": None, "gpus": [], "torch_import_error": str(error)}
    gpus = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "memory_gib": round(facts.total_memory / 2**30, 1),
                "multiprocessors": facts.multi_processor_count,
            }
        )
    return {"cuda": torch.version.cuda, "rocm": torch.version.hip, "gpus": gpus}


def nvidia_driver() -> str | None:
    """The NVIDIA driver's version, or None where nvidia-smi is absent or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    versions = answer.stdout.split()
    return versions[0] if versions else None


def _lines(value: Any) -> list[str]:
    """A fact as the lines of its cell."""
    if value is None or value == []:
        return ["none"]
    if isinstance(value, list):
        return [
            f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors"
            for gpu in value
        ]
    return [str(value)]
