"""What tests ask of the machine: whether it has a GPU that torch can use, and whether a process runs."""

from __future__ import annotations

import shutil
from pathlib import Path


def _gpu_present() -> bool:
    """torch is imported only where a driver hints at a GPU."""
    if shutil.which("nvidia-smi") is None and not Path("/dev/kfd").exists():
        return False
    import torch

    return torch.cuda.is_available()


GPU = _gpu_present()


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and waits to be collected does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
