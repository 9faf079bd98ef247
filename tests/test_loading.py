"""`nsa_gen.load`: a spec in, its package out, generated into the cache once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
    package = Path(nsa_gen.load(own_spec).__file__).parent
    assert (package / "tuned" / "nvidia_h100.json").read_text() == "first"
    table.write_text("second")
    sys.modules.pop(next(name for name in sys.modules if own_spec.parent.name.replace("-", "_") in name))
    nsa_gen.load(own_spec)
    assert [path.name for path in (package / "tuned").iterdir()] == ["nvidia_h100.json"]
    assert (package / "tuned" / "nvidia_h100.json").read_text() == "second"
