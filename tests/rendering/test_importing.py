"""Importing a generated package from the folder it lies in."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch

from nsa_gen.rendering import generate, import_package
from nsa_gen.spec import Spec, load_spec, parse_spec
from tests.support import DEVICE


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


@pytest.mark.parametrize("content", [None, "module.py", "a link to itself"])
def test_a_folder_that_is_no_package_is_an_import_error_that_names_it(tmp_path, content):
    folder = tmp_path / "plain"
    if content == "a link to itself":
        folder.symlink_to(folder)
    elif content:
        folder.mkdir()
        (folder / content).write_text("x = 1\n")
    with pytest.raises(ImportError, match=r"plain: expected a generated package, found no __init__\.py"):
        import_package(folder)


def test_a_package_that_fails_to_import_leaves_no_module_behind(package):
    before = set(sys.modules)
    (package / "steps.py").write_text("raise RuntimeError('broken on purpose')\n")
    with pytest.raises(RuntimeError, match="broken on purpose"):
        import_package(package)
    left = {name for name in set(sys.modules) - before if name.startswith("nsa_gen.loaded.") and name.count(".") == 2}
    assert left == set()
    (package / "steps.py").unlink()
    generate("tiny", package.parent)
    assert import_package(package).SPEC["name"] == "tiny"


TOKENS = 50


def window_spec(name: str, size: int) -> Spec:
    return parse_spec(
        f"version: 1\nname: {name}\nheads: {{query: 1, kv: 1}}\nhead_dim: 16\ndtype: float32\n"
        f"window: {{size: {size}}}\ncombine: {{gate: given}}\npasses: [forward, backward]\n"
    )


def window_of(function: Callable[..., torch.Tensor]) -> int:
    """The window that nsa_attention computes: the last query sees the mean of as many keys, v[j] being j."""
    keys = torch.zeros(1, TOKENS, 1, 16, device=DEVICE)
    values = torch.arange(float(TOKENS), device=DEVICE)[None, :, None, None].expand(1, TOKENS, 1, 16).contiguous()
    o = function(keys[:, :1], keys, values, torch.ones(1, 1, 1, 1, device=DEVICE))
    return round(2 * (TOKENS - 1 - o.mean().item()) + 1)


def purge(name: str) -> ModuleType:
    """Import a module again where it and those below it are forgotten."""
    for each in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
        del sys.modules[each]
    return importlib.import_module(name)


def purge_itself_alone(name: str) -> ModuleType:
    del sys.modules[name]
    return importlib.import_module(name)


def reload(name: str) -> ModuleType:
    return importlib.reload(sys.modules[name])


def reload_emptied(name: str) -> ModuleType:
    """As IPython's autoreload does: the module's names are gone before it runs again."""
    names = vars(sys.modules[name])
    kept = {name: names[name] for name in ("__name__", "__loader__")}
    names.clear()
    names.update(kept)
    return reload(name)


@pytest.mark.parametrize("again", [purge, purge_itself_alone, reload, reload_emptied])
def test_a_package_imported_again_runs_what_was_generated_last(tmp_path, monkeypatch, again):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    stopped = time.time()
    monkeypatch.setattr(time, "time", lambda: stopped)
    name = f"imported_{again.__name__}"
    functions: dict[int, Callable[..., torch.Tensor]] = {}
    for size in (24, 32, 16, 48):
        generate(window_spec(name, size), tmp_path)
        module = again(name) if functions else importlib.import_module(name)
        functions[size] = module.nsa_attention
        assert (window_of(module.nsa_attention), module.SPEC["window"]["size"]) == (size, size)
        namespace = name if len(functions) == 1 else f"{name}_{len(functions)}"
        assert hasattr(getattr(torch.ops, namespace), "attention")
    assert {size: window_of(function) for size, function in functions.items()} == {size: size for size in functions}


def test_a_later_process_runs_what_was_generated_last(tmp_path, monkeypatch):
    stopped = time.time()
    monkeypatch.setattr(time, "time", lambda: stopped)
    code = "import later; print(later.SPEC['window']['size'], later.spec.WINDOW.value)"
    for size in (24, 32):
        generate(window_spec("later", size), tmp_path)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(size), str(size)]


def test_a_package_generated_again_before_its_first_call_runs_what_was_imported(tmp_path):
    module = import_package(generate(window_spec("early", 24), tmp_path))
    generate(load_spec("tiny").replace(name="early"), tmp_path)  # other kernels, on other lines
    assert window_of(module.nsa_attention) == 24


def test_packages_whose_names_differ_by_a_dot_have_operators_of_their_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    generate(window_spec("inner", 24), tmp_path / "outer")
    generate(window_spec("outer_inner", 32), tmp_path)
    apart, together = importlib.import_module("outer.inner"), importlib.import_module("outer_inner")
    assert (window_of(apart.nsa_attention), window_of(together.nsa_attention)) == (24, 32)
    # What a process imported first does not decide what an exported program means.
    names = [module.registration.NAMESPACE for module in (apart, together)]
    assert names == ["outer__inner", "outer_inner"]


@pytest.mark.parametrize("part", ["registration", "ops"])
def test_a_module_of_operators_alone_is_not_imported_again(tmp_path, part):
    module = import_package(generate(window_spec(f"again_{part}", 24), tmp_path))
    with pytest.raises(ImportError, match=rf"registered once; .*importlib\.reload\({module.__name__}\)"):
        importlib.reload(sys.modules[f"{module.__name__}.{part}"])
    assert window_of(module.nsa_attention) == 24


def test_a_module_name_that_is_another_package_s_is_an_import_error(tmp_path):
    first = generate(window_spec("first_of_two", 24), tmp_path)
    second = generate(window_spec("second_of_two", 32), tmp_path)
    module = import_package(first, "one_name_for_two")
    with pytest.raises(ImportError, match=r"module_name: one_name_for_two is the package .*first_of_two"):
        import_package(second, "one_name_for_two")
    assert import_package(first, "one_name_for_two") is module
    generate(window_spec("first_of_two", 16), tmp_path)
    with pytest.raises(ImportError, match=r"not what .*first_of_two holds now"):
        import_package(first, "one_name_for_two")


def test_threads_that_import_at_once_all_get_a_module_that_has_run(tmp_path):
    package = generate(window_spec("for_threads", 24), tmp_path)
    # Time for the others to come, whatever the machine.
    (package / "steps.py").write_text("import time\ntime.sleep(0.5)\n" + (package / "steps.py").read_text())
    ready = threading.Barrier(8)

    def import_it(_: int) -> tuple[ModuleType, bool]:
        ready.wait()
        module = import_package(package)
        return module, hasattr(module, "explain")

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(import_it, range(8)))
    assert {id(module) for module, _ in found} == {id(found[0][0])}
    assert all(whole for _, whole in found)


def test_a_package_whose_folder_is_no_name_of_a_module_is_imported(tmp_path):
    package = generate(window_spec("plain", 24), tmp_path)
    folder = package.rename(tmp_path / "v1.2-beta")
    assert window_of(import_package(folder).nsa_attention) == 24
