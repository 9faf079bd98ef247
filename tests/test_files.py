"""Reading and writing files of every kind: a pipe is not waited for, a device neither read for ever nor replaced."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from nsa_gen._files import parse_json, read_bytes, read_json, read_text, replacing, write_all, write_whole


def test_a_pipe_a_device_and_a_folder_are_refused_by_readers_and_writers(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/full")):
        for act in (read_bytes, read_text, read_json, lambda path: write_whole(path, "x")):
            with pytest.raises(OSError, match="expected a regular file"):
                act(path)
        with pytest.raises(OSError, match="expected a regular file"), replacing(path):
            pass
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, "x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode) and os.listdir(tmp_path) == ["pipe"]
    assert not [name for name in os.listdir("/dev") if name.startswith(".full")]


def test_of_several_files_none_is_written_where_one_is_a_device(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="expected a regular file"):
        write_all({tmp_path / "a": "x", Path("/dev/full"): "x"})
    assert not list(tmp_path.iterdir())


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(OSError, match="at most 4 bytes") as error:
        read_bytes(path, 4)
    assert error.value.errno == errno.EFBIG


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, "before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_one_byte_order_mark_is_left_out_and_two_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("\ufeff[1]", encoding="utf-8")
    assert read_json(path) == [1]
    path.write_text("\ufeff\ufeff[1]", encoding="utf-8")
    with pytest.raises(ValueError, match="stands twice"):
        read_json(path)


@pytest.mark.parametrize("text", ["NaN", "[1, -Infinity]", '{"a": Infinity}', "1e999", "-1e999"])
def test_numbers_that_are_no_json_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected finite numbers"):
        parse_json(text)
    assert parse_json(text, finite=False) is not None
    assert parse_json("[1e300, -0.5, 7]") == [1e300, -0.5, 7]
