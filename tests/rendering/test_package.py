"""Writing a package: the same bytes everywhere, all or nothing, and nobody else's files."""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from nsa_gen._files import LOCKS, one_at_a_time
from nsa_gen._resources import runtime_dir
from nsa_gen.rendering import RefusedOverwriteError, differences, generate, render
from nsa_gen.rendering.package import HEADER, SIGNATURE
from nsa_gen.spec import load_spec, shipped_specs

DIGESTS = """
import hashlib, sys
from nsa_gen.rendering import render
from nsa_gen.spec import load_spec
for name in sys.argv[1:]:
    text = "".join(f"{path}\\0{text}\\0" for path, text in render(load_spec(name)).items())
    print(name, hashlib.sha256(text.encode()).hexdigest())
"""


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def digests(cwd: Path, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", DIGESTS, "nsa_paper", "tiny", "llama3_8b"],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout


def test_the_bytes_depend_on_no_process_folder_locale_time_zone_or_hash_seed(tmp_path):
    plain = digests(tmp_path, PYTHONHASHSEED="0", LC_ALL="C", TZ="UTC")
    elsewhere = tmp_path / "some where"
    elsewhere.mkdir()
    assert plain == digests(elsewhere, PYTHONHASHSEED="4711", LC_ALL="tr_TR.UTF-8", PYTHONUTF8="0", TZ="Asia/Tokyo")
    assert len(plain.splitlines()) == 3


def test_text_beyond_ascii_is_written_in_utf8_whatever_the_locale(tmp_path):
    text = "version: 1\nname: letters\ndescription: Ünïcode λ 웙\nheads: {query: 2, kv: 1}\nhead_dim: 16\n"
    (tmp_path / "s.yaml").write_text(f"{text}dtype: float32\nwindow: {{size: 8}}\n", encoding="utf-8")
    code = "import sys; from nsa_gen.rendering import generate; generate(sys.argv[1], sys.argv[2])"
    for out, locale in (("a", "C"), ("b", "C.UTF-8")):
        environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        command = [sys.executable, "-c", code, str(tmp_path / "s.yaml"), str(tmp_path / out)]
        subprocess.run(command, env=environment, check=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert "Ünïcode λ 웙" in (tmp_path / "a" / "letters" / "spec.yaml").read_text(encoding="utf-8")


def test_a_package_regenerates_from_its_own_spec(tmp_path):
    package = generate(load_spec("nsa_paper"), tmp_path)
    assert generate(package / "spec.yaml", tmp_path) == package
    assert differences(package / "spec.yaml", tmp_path) == []


def test_generating_again_touches_no_file(tmp_path):
    package = generate("tiny", tmp_path)
    before = stamps(tmp_path)
    assert set(before) == {f"tiny/{name}" for name in render(load_spec("tiny"))}
    assert generate("tiny", tmp_path) == package
    assert stamps(tmp_path) == before


def test_an_edited_file_is_restored_and_its_neighbours_are_left(tmp_path):
    package = generate("tiny", tmp_path)
    right = contents(package)
    before = stamps(package)
    (package / "steps.py").write_text(f"{SIGNATURE} and edited\n")
    generate("tiny", tmp_path)
    assert contents(package) == right
    after = stamps(package)
    assert {name for name in after if after[name] != before[name]} == {"steps.py"}


def test_differences_name_what_was_edited_what_is_missing_and_what_is_stale(tmp_path):
    package = generate("tiny", tmp_path)
    assert differences("tiny", tmp_path) == []
    text = (package / "steps.py").read_text()
    (package / "steps.py").write_text(text.replace("import", "inport", 1))
    (package / "configs.py").unlink()
    (package / "old.py").write_text(f"{SIGNATURE} long ago\nx = 1\n")
    (package / "mine.py").write_text("y = 2\n")
    before = contents(tmp_path)
    found = differences("tiny", tmp_path)
    assert len(found) == 3
    joined = "".join(found)
    assert "inport" in joined
    assert "configs.py (generated)" in joined
    assert "-x = 1" in joined
    assert "mine.py" not in joined
    assert contents(tmp_path) == before
    generate("tiny", tmp_path)
    assert differences("tiny", tmp_path) == []


def test_everything_differs_where_nothing_was_generated(tmp_path):
    assert len(differences("tiny", tmp_path)) == len(render(load_spec("tiny")))
    assert list(tmp_path.iterdir()) == []


def test_stale_files_of_its_own_are_removed_and_foreign_ones_never(tmp_path):
    whole = load_spec("tiny")
    package = generate(whole, tmp_path)
    (package / "notes.txt").write_text("mine\n")
    (package / "tuned").mkdir()
    (package / "tuned" / "h100.json").write_text("{}")
    (package / "window_test.py").write_text("# Generated by another program\n")
    assert (package / "kernels/selection.py").exists()
    generate(whole.replace(selection=None), tmp_path)
    assert not (package / "kernels/selection.py").exists()
    assert (package / "notes.txt").read_text() == "mine\n"
    assert (package / "tuned" / "h100.json").read_text() == "{}"
    assert (package / "window_test.py").exists()


def test_what_another_process_is_writing_is_neither_removed_nor_called_stale(tmp_path):
    package = generate("tiny", tmp_path)
    scratch = package / ".steps.py.x1y2"
    scratch.write_text((package / "steps.py").read_text())
    assert differences("tiny", tmp_path) == []
    generate("tiny", tmp_path)
    assert scratch.exists()


def test_locks_do_not_pile_up_however_many_folders_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "locks"))
    (tmp_path / "locks").mkdir()
    for number in range(3 * LOCKS):
        with one_at_a_time(tmp_path / str(number)):
            pass
    assert 1 < len(list((tmp_path / "locks").iterdir())) <= LOCKS
    assert not list(tmp_path.glob("[0-9]*"))


def test_generations_into_one_folder_at_once_wait_for_each_other_and_leave_one_of_them_whole(tmp_path):
    whole = load_spec("tiny")
    variants = [whole, whole.replace(selection=None), whole.replace(dtype="float16")]
    with ThreadPoolExecutor(len(variants)) as pool:
        for _ in range(3):
            list(pool.map(lambda spec: generate(spec, tmp_path), variants))
            assert sum(differences(spec, tmp_path) == [] for spec in variants) == 1
    assert not [path for path in (tmp_path / "tiny").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["steps.py", "spec.yaml", "__init__.py"])
def test_a_foreign_file_in_the_way_is_refused_before_anything_is_written(tmp_path, name):
    package = tmp_path / "tiny"
    package.mkdir()
    (package / name).write_text("# by hand\n")
    with pytest.raises(RefusedOverwriteError, match=name):
        generate("tiny", tmp_path)
    assert contents(tmp_path) == {f"tiny/{name}": b"# by hand\n"}


def test_a_folder_in_the_way_of_a_file_is_refused(tmp_path):
    (tmp_path / "tiny" / "steps.py").mkdir(parents=True)
    with pytest.raises(RefusedOverwriteError, match=r"steps\.py"):
        generate("tiny", tmp_path)
    assert contents(tmp_path) == {}


def test_a_replacement_that_fails_leaves_whole_files_and_nothing_temporary(tmp_path, monkeypatch):
    package = generate("tiny", tmp_path)
    old = contents(package)
    changed = load_spec("tiny").replace(scale=0.37)
    new = {name: text.encode() for name, text in render(changed).items()}
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left"):
        generate(changed, tmp_path)
    monkeypatch.undo()
    found = contents(package)
    assert set(found) == set(old)
    assert sum(found[name] != old[name] for name in found) == 3
    assert all(found[name] in (old[name], new[name]) for name in found)
    generate(changed, tmp_path)
    assert contents(package) == new


def test_a_first_generation_that_fails_leaves_nothing_half_written(tmp_path, monkeypatch):
    def failing(source, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        generate("tiny", tmp_path)
    assert contents(tmp_path) == {}


def test_the_folder_is_given_or_generated_in_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate("tiny").resolve() == tmp_path / "generated" / "tiny"
    assert generate("tiny", "other/place").resolve() == tmp_path / "other" / "place" / "tiny"


def test_files_are_readable_by_others_and_keep_their_mode(tmp_path):
    package = generate("tiny", tmp_path)
    assert {path.stat().st_mode & 0o777 for path in package.rglob("*.*")} == {0o644}
    (package / "steps.py").chmod(0o640)
    (package / "steps.py").write_text(f"{SIGNATURE} and edited\n")
    generate("tiny", tmp_path)
    assert (package / "steps.py").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", shipped_specs())
def test_what_is_committed_is_what_is_generated(name, project_root):
    assert differences(name, project_root / "generated") == []


@pytest.mark.parametrize("name", shipped_specs())
def test_a_committed_packages_runtime_is_the_generators_own_below_the_header(name, project_root):
    runtime = project_root / "generated" / name / "runtime"
    carried = {path.name for path in runtime.glob("*.py")}
    assert {"__init__.py", "launch.py", "registration.py", "step_operators.py", "tiles.py"} <= carried
    assert ("cache.py" in carried) is ("decode" in load_spec(name).passes)
    for module in carried:
        text = (runtime / module).read_text(encoding="utf-8")
        assert text.removeprefix(f"{HEADER}\n") == (runtime_dir() / module).read_text(encoding="utf-8"), module


def test_a_letter_more_in_a_module_is_a_difference(tmp_path):
    module = generate("mha_16", tmp_path) / "operator.py"
    module.write_text(f"{module.read_text(encoding='utf-8')}#", encoding="utf-8")
    assert [line for diff in differences("mha_16", tmp_path) for line in diff.splitlines() if line == "-#"]


def runs_what_is_written(package: Path) -> bool:
    """Whether every module, loaded as Python's import does, is the code of its source; bytecode is kept as usual."""
    for source in sorted(package.glob("*.py")):
        loaded = SourceFileLoader(source.stem, str(source)).get_code(source.stem)
        if loaded != compile(source.read_bytes(), str(source), "exec", dont_inherit=True):
            return False
    return True


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("removable", [True, False])
def test_bytecode_of_an_earlier_generation_is_never_run(tmp_path, monkeypatch, elsewhere, removable):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "bytecode") if elsewhere else None)
    if not removable:
        monkeypatch.setattr("nsa_gen.rendering.package._remove_bytecode", lambda sources: None)
    stopped = time.time()
    monkeypatch.setattr(time, "time", lambda: stopped)
    tiny, without_decode = load_spec("tiny"), ("forward", "backward")
    for number, size in enumerate((24, 32, 16, 48, 24)):
        spec = tiny.replace(window={"size": size}, passes=without_decode if number % 2 else tiny.passes)
        package = generate(spec, tmp_path / "out")
        assert runs_what_is_written(package), size
    assert list((tmp_path / "bytecode" if elsewhere else package).rglob("*.pyc")), "no bytecode was kept at all"


def test_bytecode_that_python_never_checks_goes_with_its_source(tmp_path):
    package = generate("tiny", tmp_path)
    for source in package.glob("*.py"):
        py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert runs_what_is_written(package)
    generate(load_spec("tiny").replace(window={"size": 32}), tmp_path)
    assert runs_what_is_written(package)


def test_a_folder_that_is_a_link_to_itself_is_an_error_of_the_system_s(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        generate("tiny", tmp_path / "loop")
