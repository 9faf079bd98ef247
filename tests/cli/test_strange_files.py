"""Files that are none, or hold junk, wherever a command reads or writes one: a plain answer, at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nsa_gen.tuning import Store
from tests.tuning.test_cache import entry

READERS = {
    "import": ("cache", "import", "FILE"),
    "report": ("report", "FILE"),
    "report of a journal": ("report", "FILE.jsonl"),
    "measured": ("explain", "tiny", "--measured", "FILE"),
    "from": ("new", "mine", "--from", "FILE"),
    "check": ("check", "FILE"),
    "like": ("new", "mine", "--like", "FILE"),
}
WRITERS = {
    "new": ("new", "mine", "--force", "-o", "FILE"),
    "report": ("report", "all.json", "-o", "FILE"),
    "export": ("cache", "export", "FILE"),
    "bench": ("bench", "tiny", "-o", "FILE"),
    "plot": ("bench", "tiny", "--plot", "FILE"),
    "tune": ("tune", "tiny", "--dry-run", "--out", "FILE"),
    "generate": ("generate", "tiny", "-o", "FILE"),
    "demo": ("demo", "tiny", "-o", "FILE"),
}


def make(kind: str, path: Path) -> None:
    """Lay something strange at a path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        junk = {
            "empty": b"",
            "binary": bytes(range(256)),
            "deep": b"[" * 100_000,
            "NaN": b'{"schema": 1, "entries": [{"x": NaN}]}',
            "huge number": b'{"schema": 1, "identity": ' + b"9" * 5000 + b"}",
            "two marks": "\ufeff\ufeff{}".encode(),
        }
        path.write_bytes(junk[kind])


@pytest.mark.parametrize(
    "kind",
    ["pipe", "folder", "huge", "device", "empty", "binary", "deep", "NaN", "huge number", "two marks"],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_strange_file_is_refused_by_every_command_that_reads_one(call, tmp_path, reader, kind):
    arguments = [word.replace("FILE", "strange") for word in READERS[reader]]
    make(kind, tmp_path / next(word for word in arguments if word.startswith("strange")))
    answer = call(*arguments)
    assert answer.returncode in (1, 2)
    assert "strange" in answer.stderr + answer.stdout
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("target", ["pipe", "/dev/full", "/dev/null"])
@pytest.mark.parametrize("writer", WRITERS)
def test_no_command_writes_into_a_pipe_or_in_place_of_a_device(call, tmp_path, monkeypatch, writer, target):
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "cache"))
    Store().save(entry())
    os.mkfifo(tmp_path / "pipe")
    assert call("cache", "export", "all.json").returncode == 0
    before = os.stat(target)
    answer = call(*(target if word == "FILE" else word for word in WRITERS[writer]))
    assert answer.returncode in (1, 2) and target in answer.stderr and "Traceback" not in answer.stderr
    after = os.stat(target)
    assert (before.st_mode, before.st_rdev, before.st_ino) == (after.st_mode, after.st_rdev, after.st_ino)


def test_an_entry_with_a_number_that_json_has_not_is_set_aside(call, tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "cache"))
    path = Store().save(entry())
    path.write_text(path.read_text().replace('"result": {}', '"result": {"note": [1, NaN, Infinity]}'))
    assert "NaN" in path.read_text()
    answer = call("cache", "list", "--json")
    assert answer.returncode == 0 and '"entries": []' in answer.stdout
    assert "expected finite numbers" in answer.stderr and "set aside" in answer.stderr


@pytest.mark.parametrize("kind", ["pipe", "folder", "huge", "device"])
@pytest.mark.parametrize("command", ["list", "list --json", "why tiny --gpu h100", "clear", "export all.json"])
def test_what_lies_in_the_cache_in_place_of_an_entry_holds_no_command_up(call, tmp_path, monkeypatch, kind, command):
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "cache"))
    path = Store().path(entry().identity)
    path.parent.mkdir(parents=True)
    make(kind, path)
    answer = call("cache", *command.split())
    assert answer.returncode in (0, 1) and "Traceback" not in answer.stderr
    said = "".join((answer.stderr + answer.stdout).split())  # lines are broken where a terminal's end
    assert str(path) in said and path.exists()


@pytest.mark.parametrize("folder", ["", " ", "relative", "/dev/null", "~nobody_of_that_name", "/proc/none", "x" * 300])
@pytest.mark.parametrize("command", ["list", "list --json", "why tiny --gpu h100", "clear", "export all.json"])
def test_a_strange_cache_folder_is_no_fault_of_ours(call, tmp_path, monkeypatch, folder, command):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", folder)
    answer = call("cache", *command.split())
    assert answer.returncode in (0, 1) and "Traceback" not in answer.stderr
    assert not (tmp_path / " ").exists()


@pytest.mark.parametrize("command", ["check tiny", "cache list --json", "--help"])
def test_a_disk_without_space_for_the_output_is_an_error(nsa_gen, command, tmp_path):
    import shlex
    import subprocess
    import sys

    line = f"{shlex.quote(sys.executable)} -m nsa_gen {command} > /dev/full"
    ended = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert ended.returncode == 1 and ended.stderr == "nsa-gen: [Errno 28] No space left on device\n"
