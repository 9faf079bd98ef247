"""`nsa-gen doctor`: each fault it looks for is found, named with a mend, and makes the exit code 1."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nsa_gen.cli import doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checks(call, monkeypatch, tmp_path) -> Callable[[], dict[str, dict[str, str]]]:
    """Run the command and return its checks by name; the exit code must agree with them."""
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))

    def run() -> dict[str, dict[str, str]]:
        answer = call("doctor", "--json")
        result = json.loads(answer.stdout)
        faults = [check for check in result["checks"] if check["status"] == "fault"]
        assert result["ok"] == (not faults) and answer.returncode == (1 if faults else 0)
        for check in result["checks"]:
            assert check["status"] in ("ok", "note", "fault")
            assert bool(check["mend"]) == (check["status"] != "ok"), check
        return {check["name"]: check for check in result["checks"]}

    return run


def fake_torch(**cuda: object) -> SimpleNamespace:
    """A torch that sees what it is told to."""
    version = SimpleNamespace(cuda=cuda.pop("built_for", "13.0"), hip=cuda.pop("hip", None))
    facts = {"is_available": lambda: False, "device_count": lambda: 0, **cuda}
    return SimpleNamespace(cuda=SimpleNamespace(**facts), version=version, __version__="2.13.0", ones=lambda *a, **k: 1)


def test_a_machine_that_runs_the_tests_has_no_fault(checks, tmp_path):
    found = checks()
    assert {name: check for name, check in found.items() if check["status"] == "fault"} == {}
    for name in ("python", "system", "torch", "triton", "ptxas", "cache", "triton's cache", "templates", "specs"):
        assert found[name]["status"] == "ok", name
    assert list(tmp_path.rglob("*")) == []  # nothing is made, and nothing left behind


def test_the_versions_it_asks_for_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = {name: ".".join(map(str, version)) for name, version in doctor.NEEDS.items()}
    assert project["requires-python"] == f">={needs['python']}"
    for name in ("torch", "triton"):
        assert f"{name}>={needs[name]}" in project["dependencies"]
    for extra, (packages, _) in doctor.EXTRAS.items():
        for package in packages:
            assert [line for line in project["optional-dependencies"][extra] if line.startswith(package)], package


@pytest.mark.parametrize(
    ("torch", "driver", "status", "words"),
    [
        (None, "580.1", "note", "without a working torch"),
        (fake_torch(), None, "note", "interpreter"),
        (fake_torch(built_for=None), "580.1", "fault", "built for the CPU"),
        (fake_torch(), "580.1", "fault", "sees no device"),
    ],
)
def test_what_torch_sees_is_held_against_the_driver(monkeypatch, torch, driver, status, words):
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: driver)
    (check,) = doctor._gpu(torch)
    assert check.status == status and words in check.found and check.mend


def test_gpus_are_named_with_their_architecture_and_asked_to_compute(monkeypatch):
    boards = [SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 * 2**30),
              SimpleNamespace(name="New", major=99, minor=0, total_memory=2**30)]  # fmt: skip
    torch = fake_torch(is_available=lambda: True, device_count=lambda: 2, get_device_properties=boards.__getitem__)

    class Sum:
        def __add__(self, one: int) -> SimpleNamespace:
            return SimpleNamespace(item=lambda: 2.0)

    torch.ones = lambda *arguments, **options: Sum()
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "580.1")
    first, second, driver, computes = doctor._gpu(torch)
    assert (first.status, second.status, driver.status, computes.status) == ("ok", "note", "ok", "ok")
    assert "sm_90" in first.found and "sm_990" in second.found

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore")

    torch.ones = refuse
    last = doctor._gpu(torch)[-1]
    assert (last.status, last.found) == ("fault", "CUDA error: out of memory")


def test_the_interpreter_beside_a_gpu_is_noted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (check,) = doctor._interpreter(fake_torch(is_available=lambda: True))
    assert check.status == "note" and check.mend == "unset TRITON_INTERPRET"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    (check,) = doctor._interpreter(fake_torch())
    assert check.status == "note" and "TRITON_INTERPRET=1" in check.mend


def test_a_torch_that_is_missing_broken_or_old_is_a_fault(monkeypatch):
    assert doctor._package("torch", "not installed").status == "fault"
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.9.1+cu128")
    check = doctor._package("torch", "")
    assert check.status == "fault" and "older than 2.11" in check.found and "torch>=2.11" in check.mend
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.11.0rc1")
    assert doctor._package("torch", "").status == "ok"


def test_ptxas_that_is_missing_or_does_not_run_is_a_fault(checks, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "none"))
    assert checks()["ptxas"]["found"] == "not found"
    broken = tmp_path / "ptxas"
    broken.write_text("no program")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(broken))
    assert "does not run" in checks()["ptxas"]["found"]


def test_a_missing_c_compiler_is_a_fault_where_there_is_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._compilers(fake_torch())[-1].status == "note"
    assert doctor._compilers(fake_torch(is_available=lambda: True))[-1].status == "fault"


def test_a_cache_that_cannot_be_written_is_a_fault_with_the_variable_that_moves_it(checks, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(file))
    check = checks()["cache"]
    assert check["status"] == "fault" and str(file) in check["found"] and "NSA_GEN_CACHE_DIR" in check["mend"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_a_fault(tmp_path):
    tmp_path.chmod(0o500)
    assert doctor._writable("cache", tmp_path / "cache", "X").status == "fault"
    tmp_path.chmod(0o700)


def test_missing_extras_are_notes_that_say_what_they_are_for(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    notes = doctor._extras()
    assert [check.status for check in notes] == ["note"] * len(doctor.EXTRAS)
    assert "nsa-gen[bench]" in notes[0].mend and "figures" in notes[0].mend


def test_the_text_has_a_mend_under_each_note_and_ends_with_what_to_do_next(call, monkeypatch, tmp_path):
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "cache"))
    answer = call("doctor")
    lines = answer.stdout.splitlines()
    assert answer.returncode == 0 and lines[-1] == "nothing to fix; next: nsa-gen verify tiny --quick"
    for number, line in enumerate(lines):
        if line.startswith("note"):
            assert lines[number + 1].lstrip().startswith("-> ")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "none"))
    answer = call("doctor")
    assert answer.returncode == 1 and answer.stdout.splitlines()[-1] == "1 to fix: ptxas"
