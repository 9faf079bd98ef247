"""Whether this machine has a GPU that torch can use: tests and their settings ask here, and nowhere else."""

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
