"""The record of what the generator emits tells equal from different."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import freeze

COMMAND = [sys.executable, str(Path(freeze.__file__))]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("freeze") / "record.json"
    done = run("record", str(file), "--specs", "tiny", "--targets", "sm_90", "--parts", "kernels", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    return file


def edited(file: Path, change: Any) -> Path:
    record = json.loads(file.read_text())
    change(record)
    copy = file.with_name("edited.json")
    copy.write_text(json.dumps(record))
    return copy


def test_a_record_of_the_same_sources_compares_equal(recorded: Path) -> None:
    done = run("compare", str(recorded), "--jobs", "1")  # bits were not recorded, so they are not compared
    assert (done.returncode, done.stdout) == (0, "nothing differs\n"), done.stderr


def test_a_kernel_that_differs_is_named_and_the_exit_status_says_so(recorded: Path) -> None:
    def change(record: Any) -> None:
        record["kernels"]["tiny"]["sm_90"]["window_forward_kernel batched 0"][0] = "0" * 12

    done = run("compare", str(edited(recorded, change)), "--parts", "kernels", "--jobs", "1")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1 and "window_forward_kernel batched 0" in done.stdout


def test_a_record_of_another_triton_is_refused(recorded: Path) -> None:
    file = edited(recorded, lambda record: record["environment"].update(triton="3.0.0"))
    done = run("compare", str(file))
    assert done.returncode == 2 and "3.0.0" in done.stderr


def test_digests_ignore_a_kernels_name_and_nothing_else() -> None:
    text = "tt.func public @{}(%arg0: i32) {{ %c = arith.constant {} : i32 }}"
    assert freeze.ttir_digest(text.format("a", 1)) == freeze.ttir_digest(text.format("b", 1))
    assert freeze.ttir_digest(text.format("a", 1)) != freeze.ttir_digest(text.format("a", 2))
    calls = [
        f"tt.call @nsa_gen.loaded.{module}.{name}__i32(%0)"
        for module, name in (("a_1.x", "f"), ("b.y", "f"), ("b.y", "g"))
    ]
    assert freeze.ttir_digest(calls[0]) == freeze.ttir_digest(calls[1]) != freeze.ttir_digest(calls[2])


def test_differences_name_what_is_gone_new_and_changed() -> None:
    before, after = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"x": 1, "y": 4}, "c": 5}
    assert freeze.differences(before, after) == ["a: y: 2 -> 4", "b: gone", "c: new: 5"]


def test_bits_tell_a_sign_of_zero_and_a_shape_apart() -> None:
    torch = pytest.importorskip("torch")
    zeros = torch.zeros(2, 2)
    found = freeze.bits({"plain": zeros, "negative": -zeros, "flat": zeros.flatten(), "same": zeros.clone()})
    assert found["plain"] == found["same"]
    assert len(set(found.values())) == 3
