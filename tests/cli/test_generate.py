"""`nsa-gen generate`."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest


@pytest.fixture
def generated(call, tmp_path):
    """The folder of tiny's package."""
    answer = call("generate", "tiny", "-o", "out")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "out/tiny"
    return tmp_path / "out" / "tiny"


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_it_writes_a_package_and_check_then_finds_nothing_to_do(call, generated):
    assert (generated / "__init__.py").is_file()
    assert (generated / "spec.yaml").is_file()
    answer = call("generate", "tiny", "-o", "out", "--check")
    assert (answer.returncode, answer.stdout) == (0, "")


def test_packages_go_to_generated_unless_told_otherwise(call, tmp_path):
    assert call("generate", "tiny").returncode == 0
    assert (tmp_path / "generated" / "tiny" / "__init__.py").is_file()


def test_check_lists_the_changed_file_alone_and_writes_nothing(call, generated):
    ops = generated / "ops.py"
    ops.write_text(ops.read_text() + "# edited by hand\n")
    before = snapshot(generated)
    answer = call("generate", "tiny", "-o", "out", "--check")
    assert answer.returncode == 1
    (line,) = answer.stdout.splitlines()
    assert line.endswith("tiny/ops.py")
    assert "-o out" in answer.stderr
    assert snapshot(generated) == before


def test_check_lists_a_missing_file(call, generated):
    (generated / "ops.py").unlink()
    answer = call("generate", "tiny", "-o", "out", "--check")
    assert answer.returncode == 1
    assert [line for line in answer.stdout.splitlines() if line.endswith("ops.py")]
    assert not (generated / "ops.py").exists()


def test_diff_shows_the_changed_line_and_writes_nothing(call, generated):
    ops = generated / "ops.py"
    ops.write_text(ops.read_text() + "# edited by hand\n")
    before = snapshot(generated)
    answer = call("generate", "tiny", "-o", "out", "--diff")
    assert answer.returncode == 1
    assert "-# edited by hand" in answer.stdout.splitlines()
    assert snapshot(generated) == before


def test_generating_again_mends_what_was_edited(call, generated):
    ops = generated / "ops.py"
    original = ops.read_bytes()
    ops.write_text(ops.read_text() + "# edited by hand\n")
    assert call("generate", "tiny", "-o", "out").returncode == 0
    assert ops.read_bytes() == original


def test_a_file_in_the_way_that_nsa_gen_did_not_write_is_a_no_and_stays(call, generated):
    ops = generated / "ops.py"
    ops.write_text("mine = True\n")
    for arguments in (["generate", "tiny", "-o", "out"], ["generate", "tiny", "-o", "out", "--json"]):
        answer = call(*arguments)
        assert answer.returncode == 1
        assert "ops.py" in answer.stderr
        assert "Traceback" not in answer.stderr
    assert json.loads(answer.stdout)["ok"] is False
    assert ops.read_text() == "mine = True\n"


def test_a_file_of_somebody_else_s_is_left_alone(call, generated):
    note = generated / "notes.txt"
    note.write_text("mine")
    assert call("generate", "tiny", "-o", "out").returncode == 0
    assert note.read_text() == "mine"


def test_json_names_each_package_and_each_file_out_of_date(call, generated):
    written = json.loads(call("generate", "tiny", "-o", "out", "--json").stdout)
    assert written["ok"] is True
    assert [package["name"] for package in written["packages"]] == ["tiny"]
    (generated / "ops.py").write_text("broken")
    answer = call("generate", "tiny", "mha_16", "-o", "out", "--check", "--json")
    assert answer.returncode == 1
    result = json.loads(answer.stdout)
    tiny, mha_16 = result["packages"]
    assert result["ok"] is tiny["ok"] is mha_16["ok"] is False
    assert len(tiny["out_of_date"]) == 1
    assert len(mha_16["out_of_date"]) > 5  # never written


def test_a_folder_that_is_a_file_is_a_wrong_call(call, tmp_path):
    (tmp_path / "file").write_text("")
    assert call("generate", "tiny", "-o", "file").returncode == 2


def test_a_file_that_is_no_text_any_more_is_out_of_date_and_not_a_crash(call, generated):
    (generated / "ops.py").write_bytes(b"\xff\xfe")
    answer = call("generate", "tiny", "-o", "out", "--check")
    assert answer.returncode == 1 and answer.stdout.splitlines() == ["out/tiny/ops.py"]
    assert "-\ufffd" in call("generate", "tiny", "-o", "out", "--diff").stdout


@pytest.mark.parametrize("mode", [[], ["--check"], ["--diff"], ["--json"]])
@pytest.mark.parametrize("way", ["loop", "loop/below", "dangling", "dangling/below", "file/below", "long" * 100])
def test_an_output_that_can_be_no_folder_is_a_wrong_call(call, tmp_path, way, mode):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing/here")
    (tmp_path / "file").write_text("")
    answer = call("generate", "tiny", "-o", way, *mode)
    assert answer.returncode == 2, answer.stderr
    assert "--output" in answer.stderr and way.split("/")[0][:20] in answer.stderr and "Traceback" not in answer.stderr
    assert not (tmp_path / "nothing").exists()


def test_an_output_that_may_not_be_written_is_a_no(call, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def refuse(self, *arguments, **options):
        if self.name == "tiny":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    answer = call("generate", "tiny", "-o", "locked")
    assert answer.returncode == 1
    assert "nsa-gen: locked cannot be written: [Errno 13] Permission denied: 'locked/tiny'" in answer.stderr


def test_a_spec_whose_name_is_too_long_for_a_file_is_a_wrong_call(call):
    answer = call("generate", "long" * 100)
    assert answer.returncode == 2 and "no shipped spec of that name" in answer.stderr
