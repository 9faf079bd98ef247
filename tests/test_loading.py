"""`nsa_gen.load`: a spec in, its package out, generated into the cache once."""

from __future__ import annotations

import errno
import multiprocessing
import pickle
import re
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

import nsa_gen


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def own_spec(tmp_path: Path) -> Path:
    """A spec no other test loads: tiny's, under a name from the test's folder."""
    from nsa_gen.spec import shipped_specs

    path = tmp_path / "own.yaml"
    name = "own_" + tmp_path.name.replace("-", "_")
    path.write_text(shipped_specs()["tiny"].read_text().replace("name: tiny", f"name: {name}"))
    return path


def test_it_returns_the_package_and_keeps_it_in_the_cache(cache, own_spec):
    package = nsa_gen.load(own_spec)
    assert callable(package.nsa_attention)
    assert Path(package.__file__).is_relative_to(cache / "packages")


def test_the_same_spec_gives_the_same_module(own_spec):
    assert nsa_gen.load(own_spec) is nsa_gen.load(str(own_spec)) is nsa_gen.load(nsa_gen.load_spec(own_spec))


def test_a_changed_spec_gives_another_module(own_spec):
    before = nsa_gen.load(own_spec)
    own_spec.write_text(own_spec.read_text().replace("size: 24", "size: 25"))
    after = nsa_gen.load(own_spec)
    assert after is not before
    assert after.__file__ != before.__file__


def test_an_invalid_spec_raises_its_problems(own_spec):
    from nsa_gen.spec import SpecError

    own_spec.write_text(own_spec.read_text().replace("size: 24", "size: 0"))
    with pytest.raises(SpecError, match="window"):
        nsa_gen.load(own_spec)


def test_a_generation_that_fails_leaves_nothing_in_the_cache(cache, own_spec, monkeypatch):
    import nsa_gen.rendering

    def fail(spec, folder):
        (folder / "half_written").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(nsa_gen.rendering, "generate", fail)
    with pytest.raises(KeyboardInterrupt):
        nsa_gen.load(own_spec)
    left = [path for path in (cache / "packages").iterdir() if path.suffix != ".lock"]
    assert left == []


def test_processes_that_load_at_once_all_get_the_package(own_spec):
    program = f"import nsa_gen; print(nsa_gen.load({str(own_spec)!r}).__file__)"
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    assert len({output for output, _ in answers}) == 1


def test_the_cache_is_the_user_s_unless_the_environment_says_otherwise(cache, monkeypatch):
    from nsa_gen._resources import cache_dir

    assert cache_dir() == cache
    monkeypatch.delenv("NSA_GEN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "xdg"))
    assert cache_dir() == cache / "xdg" / "nsa_gen"


def test_shipped_tables_come_along_and_are_kept_up_to_date(cache, own_spec, tmp_path, monkeypatch):
    from nsa_gen import loading

    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(loading, "tuned_dir", lambda name: shipped if name.startswith("own_") else None)
    table = shipped / "nvidia_h100.json"
    table.write_text("first")
    module = nsa_gen.load(own_spec)
    package = Path(module.__file__).parent
    assert (package / "tuned" / "nvidia_h100.json").read_text() == "first"
    table.write_text("second")
    del sys.modules[module.__name__]
    nsa_gen.load(own_spec)
    assert [path.name for path in (package / "tuned").iterdir()] == ["nvidia_h100.json"]
    assert (package / "tuned" / "nvidia_h100.json").read_text() == "second"


def test_threads_that_load_at_once_all_get_a_module_that_has_run(own_spec):
    spec = nsa_gen.load_spec(own_spec)
    ready = threading.Barrier(4)

    def load(_: int) -> tuple[ModuleType, bool]:
        ready.wait()
        module = nsa_gen.load(spec)
        return module, hasattr(module, "explain")

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(load, range(4)))
    assert {id(module) for module, _ in found} == {id(found[0][0])}
    assert all(whole for _, whole in found)


def test_a_package_that_was_partly_cleared_from_the_cache_is_generated_again(own_spec):
    module = nsa_gen.load(own_spec)
    (Path(module.__file__).parent / "kernels/banded.py").unlink()
    program = f"import nsa_gen; print(nsa_gen.load({str(own_spec)!r}).explain())"
    assert run(program).returncode == 0


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def pickled(own_spec, tmp_path) -> Path:
    """A layer of a package of `load`, as pickle and as torch.save keep it."""
    layer = nsa_gen.load(own_spec).NativeSparseAttention(8)
    (tmp_path / "layer.pickle").write_bytes(pickle.dumps(layer))
    torch.save(layer, tmp_path / "layer.pt")
    return tmp_path / "layer.pickle"


UNPICKLE = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))).__name__)"


def test_a_pickled_layer_is_loaded_by_a_process_that_has_imported_nothing(pickled):
    done = run(UNPICKLE, str(pickled))
    assert done.stdout.strip() == "NativeSparseAttention", done.stderr
    torch_load = "import sys, torch; print(type(torch.load(sys.argv[1], weights_only=False)).__name__)"
    done = run(torch_load, str(pickled.with_suffix(".pt")))
    assert done.stdout.strip() == "NativeSparseAttention", done.stderr


def test_a_layer_goes_to_a_spawned_process(own_spec):
    layer = nsa_gen.load(own_spec).NativeSparseAttention(8)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(type, layer).result(timeout=120) is type(layer)


def test_a_layer_whose_package_is_not_in_the_cache_says_what_to_call_first(cache, pickled, own_spec, monkeypatch):
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(cache / "another"))
    done = run(UNPICKLE, str(pickled))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: nsa_gen.loaded.own_") and str(cache / "another") in last
    assert "first call nsa_gen.load(spec)" in last
    done = run(f"import nsa_gen; nsa_gen.load({str(own_spec)!r}); {UNPICKLE}", str(pickled))
    assert done.stdout.strip() == "NativeSparseAttention", done.stderr


def test_a_layer_from_a_folder_is_loaded_once_the_folder_was_imported(tmp_path):
    from nsa_gen.rendering import generate, import_package

    folder = generate("tiny", tmp_path)
    kept = tmp_path / "layer.pickle"
    kept.write_bytes(pickle.dumps(import_package(folder).NativeSparseAttention(8)))
    done = run(UNPICKLE, str(kept))
    assert "import_package(folder)" in done.stderr.splitlines()[-1]
    first = f"from nsa_gen.rendering import import_package; import_package({str(folder)!r})"
    done = run(f"{first}; {UNPICKLE}", str(kept))
    assert done.stdout.strip() == "NativeSparseAttention", done.stderr


@pytest.mark.parametrize("way", ["a file", "a link to itself", "a link to nothing", "a name too long", "read-only"])
def test_a_cache_that_cannot_be_written_is_named_with_the_variable_that_moves_it(tmp_path, own_spec, monkeypatch, way):
    folder = tmp_path / "unusable"
    if way == "a file":
        folder.write_text("")
    elif way == "a link to itself":
        folder.symlink_to(folder)
    elif way == "a link to nothing":
        folder.symlink_to(tmp_path / "nothing" / "here")
    elif way == "a name too long":
        folder = tmp_path / ("long" * 100)
    else:
        refuse = PermissionError(errno.EACCES, "Permission denied", str(folder))
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(refuse))
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(folder))
    with pytest.raises(OSError, match=f"cache {re.escape(str(folder))} cannot be written .*NSA_GEN_CACHE_DIR") as found:
        nsa_gen.load(own_spec)
    assert found.value.errno
