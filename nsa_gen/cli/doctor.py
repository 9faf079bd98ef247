"""`nsa-gen doctor`: what works on this machine, and how to mend what does not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from nsa_gen.cli.common import JsonOption, print_json, stop
from nsa_gen.cli.env import is_interpreting, nvidia_driver, triton_cache

Status = Literal["ok", "note", "fault"]

NEEDS = {"python": (3, 11), "torch": (2, 11), "triton": (3, 6)}
"""The oldest versions that are supported, as pyproject.toml has them."""

EXTRAS = {
    "bench": ({"matplotlib": "matplotlib"}, "figures of bench, report and explain --plot"),
    "docs": ({"mkdocs-material": "material", "mkdocstrings": "mkdocstrings"}, "the documentation's site"),
    "test": ({"pytest": "pytest", "hypothesis": "hypothesis"}, "the tests, and drawn examples in your own"),
}
"""Extra of the project -> its packages with the modules they bring, and what it is for."""


@dataclass(frozen=True)
class Check:
    """One line of the answer.

    Attributes:
        name: what was looked at.
        status: ok; note, where something is absent that only some commands need; fault, where nsa_gen does not work.
        found: what there is.
        mend: what to do about a note or a fault; empty where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    mend: str = ""


def doctor(as_json: JsonOption = False) -> None:
    """Show what works on this machine, and how to fix the rest.

    Checks Python, torch, triton, GPU and driver, the interpreter, compilers, caches and optional packages. Exits 1 if
    something is wrong that nsa-gen or a generated package needs. Problems that affect only some commands are notes.

    \b
    Example:
      nsa-gen doctor
      nsa-gen doctor --json
    """
    checks = examine()
    ok = all(check.status != "fault" for check in checks)
    if as_json:
        print_json({"ok": ok, "checks": [asdict(check) for check in checks]})
    else:
        width = max(len(check.name) for check in checks) + 2
        for check in checks:
            print(f"{check.status:<7}{check.name:<{width}}{check.found}")
            if check.mend:
                print(f"{'':<{7 + width}}-> {check.mend}")
        print(_summary(checks))
    stop(ok)


def examine() -> list[Check]:
    """Every check, in the order of the answer."""
    torch, problem = _import_torch()
    return [
        _python(),
        _system(),
        _package("torch", problem),
        _package("triton", "" if importlib.util.find_spec("triton") else "not installed"),
        *_gpu(torch),
        *_interpreter(torch),
        *_compilers(torch),
        *_folders(),
        *_extras(),
    ]


def _summary(checks: Iterable[Check]) -> str:
    faults = [check.name for check in checks if check.status == "fault"]
    if faults:
        return f"{len(faults)} to fix: {', '.join(faults)}"
    return "nothing to fix; next: nsa-gen verify tiny --quick"


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if _version(platform.python_version()) >= NEEDS["python"]:
        return Check("python", "ok", found)
    return Check("python", "fault", found, f"install Python {_dotted(NEEDS['python'])} or newer")


def _system() -> Check:
    found = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if platform.system() == "Linux":
        return Check("system", "ok", found)
    return Check("system", "fault", found, "triton has packages only for Linux: use Linux, a container, or WSL 2")


def _import_torch() -> tuple[Any, str]:
    """The module torch, or None and why not."""
    if importlib.util.find_spec("torch") is None:
        return None, "not installed"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that torch wants is missing
        return None, f"cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return torch, ""


def _package(name: str, problem: str) -> Check:
    """torch or triton: installed, importable and new enough."""
    oldest = _dotted(NEEDS[name])
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        found = ""
    mend = f"pip install '{name}>={oldest}'"
    if name == "torch":
        mend += " (without a GPU: --index-url https://download.pytorch.org/whl/cpu)"
    if problem or not found:
        return Check(name, "fault", problem or "not installed", mend)
    if _version(found) < NEEDS[name]:
        return Check(name, "fault", f"{found}, older than {oldest}", mend)
    return Check(name, "ok", found)


def _gpu(torch: Any) -> list[Check]:
    """GPUs as torch sees them, and the driver as the machine has it."""
    driver = nvidia_driver()
    if torch is None:
        return [Check("gpu", "note", "unknown without a working torch", "fix torch first")]
    if not torch.cuda.is_available():
        if driver is None:
            return [
                Check(
                    "gpu", "note", "none: kernels run under Triton's interpreter, slowly, in float32 and float16",
                    "nothing to do without a GPU; if there is one, install its driver (tune and bench need it)",
                )
            ]  # fmt: skip
        if torch.version.cuda is None and torch.version.hip is None:
            return [
                Check("gpu", "fault", f"driver {driver}, but torch {torch.__version__} is built for the CPU",
                      "pip install --force-reinstall torch, from PyPI or PyTorch's index for your CUDA version")
            ]  # fmt: skip
        return [
            Check("gpu", "fault", f"driver {driver}, but torch sees no device",
                  "check CUDA_VISIBLE_DEVICES, and that the driver is new enough for CUDA "
                  f"{torch.version.cuda}: nvidia-smi shows both")
        ]  # fmt: skip
    found = [_device(torch, index) for index in range(torch.cuda.device_count())]
    return [*found, Check("driver", "ok", driver or "(not NVIDIA's, or nvidia-smi is absent)"), _answer(torch)]


def _device(torch: Any, index: int) -> Check:
    from nsa_gen.hardware import TARGETS, target_of

    facts = torch.cuda.get_device_properties(index)
    target = target_of(facts, hip=bool(torch.version.hip))
    found = f"{facts.name}, {target}, {facts.total_memory / 2**30:.0f} GiB"
    if target in TARGETS:
        return Check(f"gpu {index}", "ok", found)
    return Check(
        f"gpu {index}", "note", f"{found}: not in the hardware table ({', '.join(TARGETS)})",
        "kernels use the tiles of a GPU with as much shared memory; check with: nsa-gen verify SPEC --device cuda",
    )  # fmt: skip


def _answer(torch: Any) -> Check:
    """Whether the GPU computes."""
    try:
        two = (torch.ones(1, device="cuda") + 1).item()
    except RuntimeError as error:
        mend = "stop the processes that use the GPU: nvidia-smi lists them"
        return Check("gpu computes", "fault", str(error).splitlines()[0], mend)
    return Check("gpu computes", "ok" if two == 2 else "fault", f"1 + 1 = {two:g}")


def _interpreter(torch: Any) -> list[Check]:
    """TRITON_INTERPRET beside what there is."""
    on, has_gpu = is_interpreting(), torch is not None and torch.cuda.is_available()
    found = [Check("interpreter", "ok", "on, by TRITON_INTERPRET" if on else "off")]
    if on and has_gpu:
        found = [
            Check(
                "interpreter",
                "note",
                f"on: TRITON_INTERPRET={os.environ['TRITON_INTERPRET']}, so kernels run on the CPU",
                "unset TRITON_INTERPRET",
            )
        ]
    elif not on and not has_gpu:
        mend = "for your own scripts, export TRITON_INTERPRET=1; nsa-gen verify sets it itself"
        found = [Check("interpreter", "note", "off, and there is no GPU", mend)]
    if importlib.util.find_spec("numpy") is None:
        found.append(Check("numpy", "fault", "not installed; Triton's interpreter needs it", "pip install numpy"))
    return found


def _compilers(torch: Any) -> list[Check]:
    """ptxas, with which Triton makes machine code, and a C compiler, with which it makes launchers on a GPU."""
    found = []
    path = _ptxas()
    if path is None and importlib.util.find_spec("triton") is None:
        found.append(Check("ptxas", "note", "none", "install triton, which brings it"))
    elif path is None:
        found.append(
            Check("ptxas", "fault", "not found", "reinstall triton, which brings it, or set TRITON_PTXAS_PATH to one")
        )
    else:
        version = _output(path, "--version").strip().splitlines()[-1:] or [""]
        if version[0]:
            found.append(Check("ptxas", "ok", f"{version[0]} ({path})"))
        else:
            found.append(
                Check("ptxas", "fault", f"{path} does not run", f"check that it is executable: {path} --version")
            )
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler:
        found.append(Check("C compiler", "ok", compiler))
    elif torch is not None and torch.cuda.is_available():
        mend = "apt-get install gcc, or set CC: Triton compiles a launcher for each kernel"
        found.append(Check("C compiler", "fault", "none", mend))
    else:
        found.append(Check("C compiler", "note", "none", "nothing to do: Triton needs one only on a GPU"))
    return found


def _ptxas() -> str | None:
    """The ptxas that Triton uses: TRITON_PTXAS_PATH's, or the one in its package; without importing triton."""
    named = os.environ.get("TRITON_PTXAS_PATH")
    if named:
        return named if os.path.isfile(named) else None
    spec = importlib.util.find_spec("triton")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root) / "backends" / "nvidia" / "bin" / "ptxas"
        if path.is_file():
            return str(path)
    return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _folders() -> list[Check]:
    """Folders that are written to, and those that nsa-gen reads its templates and specs from."""
    from nsa_gen._resources import CACHE_VARIABLE, cache_dir, specs_dir, templates_dir

    found = [
        _writable("cache", cache_dir(), CACHE_VARIABLE),
        _writable("triton's cache", triton_cache(), "TRITON_CACHE_DIR"),
    ]
    for name, where in (("templates", templates_dir), ("specs", specs_dir)):
        found.append(_there(name, where))
    return found


def _there(name: str, where: Callable[[], Path]) -> Check:
    try:
        return Check(name, "ok", str(where()))
    except FileNotFoundError as error:
        return Check(name, "fault", str(error), "pip install --force-reinstall nsa-gen")


def _writable(name: str, folder: Path, variable: str) -> Check:
    """Whether files can be written into a folder, or into the one that it would be made in. Leaves nothing behind."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".nsa_gen_doctor_") as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        mend = f"set {variable} to a folder that can be written to"
        return Check(name, "fault", f"{folder} cannot be written to: {error.strerror or error}", mend)
    free = shutil.disk_usage(place).free / 2**30
    if free < 1:
        return Check(name, "note", f"{folder}, {free:.1f} GiB free", f"free some space, or set {variable} elsewhere")
    return Check(name, "ok", f"{folder}, {free:.0f} GiB free")


def _extras() -> list[Check]:
    found = []
    for extra, (packages, purpose) in EXTRAS.items():
        missing = [name for name, module in packages.items() if importlib.util.find_spec(module) is None]
        if missing:
            mend = f"for {purpose}: pip install 'nsa-gen[{extra}]'"
            found.append(Check(f"[{extra}]", "note", f"without {', '.join(missing)}", mend))
        else:
            found.append(Check(f"[{extra}]", "ok", ", ".join(packages)))
    return found
