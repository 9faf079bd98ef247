"""`nsa-gen env`."""

from __future__ import annotations

import json
import platform
from importlib import metadata


def test_json_tells_versions_devices_and_folders(call, monkeypatch, tmp_path):
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    answer = call("env", "--json")
    assert answer.returncode == 0
    facts = json.loads(answer.stdout)
    assert facts["python"].startswith(platform.python_version())
    assert facts["torch"] == metadata.version("torch")
    assert facts["triton"] == metadata.version("triton")
    assert facts["cache"] == str(tmp_path / "elsewhere")
    assert facts["triton_cache"] == str(tmp_path / "kernels")
    assert isinstance(facts["gpus"], list)


def test_the_interpreter_s_state_follows_the_environment(call, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert json.loads(call("env", "--json").stdout)["interpreter"].startswith("on")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert json.loads(call("env", "--json").stdout)["interpreter"] == "off"


def test_the_table_has_a_line_a_fact(call):
    facts = json.loads(call("env", "--json").stdout)
    lines = call("env").stdout.splitlines()
    assert [line for line in lines if line.startswith("torch ")]
    assert len(lines) >= len(facts)


def test_a_home_that_is_not_there_is_no_fault(call, monkeypatch):
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", "~no_such_user/cache")
    assert json.loads(call("env", "--json").stdout)["cache"].endswith("/~no_such_user/cache")
