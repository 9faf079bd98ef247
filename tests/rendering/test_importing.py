"""Importing a generated package from the folder it lies in."""

from __future__ import annotations

import shutil
import sys

import pytest

from nsa_gen.rendering import generate, import_package
from nsa_gen.spec import load_spec


@pytest.fixture
def package(tmp_path):
    return generate("tiny", tmp_path)


def test_the_same_folder_is_imported_once(package, monkeypatch):
    first = import_package(package)
    assert import_package(str(package)) is first
    monkeypatch.chdir(package.parent)
    assert import_package("tiny") is first
    assert first.SPEC["name"] == "tiny"


def test_a_package_with_other_contents_is_another_module_with_its_own_operators(package, tmp_path):
    first = import_package(package)
    generate(load_spec("tiny").replace(scale=0.37), tmp_path)
    second = import_package(package)
    assert second is not first
    assert second.__name__ != first.__name__
    assert (first.SPEC["scale"], second.SPEC["scale"]) == ("auto", 0.37)
    assert first.nsa_attention is not second.nsa_attention


def test_equal_packages_in_two_folders_are_two_modules(package, tmp_path):
    shutil.copytree(package, tmp_path / "copy" / "tiny")
    assert import_package(tmp_path / "copy" / "tiny") is not import_package(package)


def test_a_module_name_may_be_given(package):
    name = "a_name_that_a_test_chose"
    module = import_package(package, name)
    assert sys.modules[name] is module
    assert module.__name__ == name


@pytest.mark.parametrize("content", [None, "module.py"])
def test_a_folder_that_is_no_package_is_an_import_error_that_names_it(tmp_path, content):
    folder = tmp_path / "plain"
    if content:
        folder.mkdir()
        (folder / content).write_text("x = 1\n")
    with pytest.raises(ImportError, match=r"plain: expected a generated package, found no __init__\.py"):
        import_package(folder)


def test_a_package_that_fails_to_import_leaves_no_module_behind(package):
    before = set(sys.modules)
    (package / "api.py").write_text("raise RuntimeError('broken on purpose')\n")
    with pytest.raises(RuntimeError, match="broken on purpose"):
        import_package(package)
    left = {name for name in set(sys.modules) - before if name.startswith("tiny_") and "." not in name}
    assert left == set()
    (package / "api.py").unlink()
    generate("tiny", package.parent)
    assert import_package(package).SPEC["name"] == "tiny"
