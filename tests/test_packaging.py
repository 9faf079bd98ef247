"""The project as others install it: a wheel that carries its templates and specs, and works away from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nsa_gen


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built as `pip install .` builds it, with the build tools already installed."""
    root = Path(__file__).resolve().parent.parent
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(folder)]
    built = subprocess.run([*build, str(root)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder the wheel is installed into."""
    folder = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(folder), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def run_installed(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder` with the installed nsa_gen before any other."""
    environment = os.environ | {"PYTHONPATH": str(installed), "NSA_GEN_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_wheel_carries_every_template_and_every_spec(wheel, project_root):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("templates", "specs"):
        files = [path.relative_to(project_root) for path in (project_root / folder).rglob("*") if path.is_file()]
        assert files
        for file in files:
            assert f"nsa_gen/_data/{file.as_posix()}" in names


def test_the_wheel_carries_the_code_and_the_licence_and_no_tests(wheel, project_root):
    names = set(zipfile.ZipFile(wheel).namelist())
    for module in (project_root / "nsa_gen").rglob("*.py"):
        assert module.relative_to(project_root).as_posix() in names
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert not [name for name in names if name.startswith(("tests/", "generated/", "tools/"))]


def test_the_wheel_is_small_and_carries_no_generated_package_but_tuned_tables(wheel, project_root):
    names = zipfile.ZipFile(wheel).namelist()
    tables = {f"nsa_gen/_data/{path.relative_to(project_root).as_posix()}" for path in
              project_root.glob("generated/*/tuned/*.json")}  # fmt: skip
    assert {name for name in names if name.startswith("nsa_gen/_data/generated/")} == tables
    assert wheel.stat().st_size < 1_000_000


def test_a_tuned_table_of_a_spec_is_in_the_wheel(tmp_path, project_root):
    """Of a copy of the project, in which one spec has a table: where `tuned_dir` looks for it."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(project_root / name, tmp_path)
    for name in ("nsa_gen", "templates", "specs", "tools"):
        shutil.copytree(project_root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "generated" / "tiny" / "tuned").mkdir(parents=True)
    (tmp_path / "generated" / "tiny" / "tuned" / "board.json").write_text("{}")
    (tmp_path / "generated" / "tiny" / "operator.py").write_text("")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", "out", "."]
    built = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if "/generated/" in name]
    assert names == ["nsa_gen/_data/generated/tiny/tuned/board.json"]


def test_the_version_stands_in_one_place(project_root):
    import tomllib

    project = tomllib.loads((project_root / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "nsa_gen/__init__.py"
    assert "version:" not in re.sub(r"^cff-version:.*$", "", (project_root / "CITATION.cff").read_text(), flags=re.M)
    first = next(line for line in (project_root / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert first.split()[1] == nsa_gen.__version__


def test_the_wheel_s_version_is_the_package_s(wheel):
    assert wheel.name.split("-")[1] == nsa_gen.__version__


def test_an_installed_nsa_gen_checks_a_shipped_spec_from_any_folder(installed, tmp_path):
    answer = run_installed(installed, tmp_path, "-m", "nsa_gen", "check", "tiny")
    assert (answer.returncode, answer.stdout) == (0, "tiny: ok\n"), answer.stderr


def test_an_installed_nsa_gen_generates_what_the_checkout_generates(installed, tmp_path):
    from nsa_gen.rendering import render
    from nsa_gen.spec import load_spec

    answer = run_installed(installed, tmp_path, "-m", "nsa_gen", "generate", "tiny", "-o", "out")
    assert answer.returncode == 0, answer.stderr
    assert run_installed(installed, tmp_path, "-c", "import nsa_gen; print(nsa_gen.__file__)").stdout.startswith(
        str(installed)
    )
    out = tmp_path / "out" / "tiny"
    texts = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert texts == render(load_spec("tiny"))


def test_the_script_s_entry_point_is_the_command_line(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "nsa-gen = nsa_gen.cli:main" in archive.read(name).decode()


def test_every_public_name_is_found_in_its_room():
    for name in nsa_gen.__all__:
        assert getattr(nsa_gen, name) is not None
    with pytest.raises(AttributeError, match="conjure"):
        _ = nsa_gen.conjure
