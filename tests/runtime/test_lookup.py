"""Which tuned entry serves a call: buckets, the order of places, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsa_gen.runtime.lookup import FAR, Bucket, Gpu, Identity, Tuned, bucket_of, decode_bucket
from nsa_gen.runtime.space import Space

H100, H200, A100 = Gpu("H100", 132, "sm_90"), Gpu("H200", 132, "sm_90"), Gpu("A100", 108, "sm_80")
OURS = Identity("tiny", "float32", 1, "method", "kernels", "space")
SPACE = Space({"attend": {"KEY_BLOCK": [16, 32, 64]}}, {})


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tuned:
    """The entries of a package in tmp_path / "package"; the user's cache is tmp_path / "cache"."""
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NSA_GEN_TUNED", raising=False)
    return Tuned(tmp_path / "package", OURS, SPACE)


def entry(gpu: Gpu = H100, tokens: int = 1024, key_block: int = 16, **changed: Any) -> dict[str, Any]:
    bucket = {"tokens": tokens, "batch": 1, "packed": False, "decode": False}
    made_for = {"gpu": gpu.name, "multiprocessors": gpu.multiprocessors, "architecture": gpu.architecture}
    ours = {"kernels": "kernels", "space": "space", "dtype": "float32", "measurement": "method", "bucket": bucket}
    return {"schema": 1, "identity": {**made_for, **ours, **changed}, "configs": {"attend": {"KEY_BLOCK": key_block}}}


def write(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def key_block(tuned: Tuned, gpu: Gpu, tokens: int) -> int | None:
    found = tuned.find(gpu, Bucket(tokens, 1, packed=False))
    return found["attend"]["KEY_BLOCK"] if found else None


def test_buckets_round_up_by_twos_and_fours_and_end_at_the_largest() -> None:
    assert bucket_of(1, 1, False) == (512, 1, False, False)
    assert bucket_of(513, 5, True) == (1024, 16, True, False)
    assert bucket_of(2**40, 2**40, False)[:2] == (2**21, 4**6)
    assert decode_bucket(600, 5) == (1024, 8, False, True)


def test_buckets_are_apart_by_doublings_and_decode_by_more_than_any() -> None:
    one = Bucket(1024, 1, False)
    assert one.steps(Bucket(4096, 4, True)) == 2 + 1 + 1
    assert one.steps(Bucket(1024, 1, False, decode=True)) == FAR
    assert Bucket(1024, 1, False, True).steps(Bucket(1024, 4, False, True)) == 2


def test_this_gpus_entry_comes_before_its_architectures_and_the_nearest_before_others(
    tuned: Tuned, tmp_path: Path
) -> None:
    shipped = [entry(H200, 1024, 64), entry(H100, 4096, 32), entry(A100, 1024, 16)]
    write(tmp_path / "package" / "tuned" / "a.json", {"schema": 1, "entries": shipped})
    assert key_block(tuned, H100, 2048) == 32
    assert key_block(tuned, H200, 1024) == 64
    assert key_block(tuned, H100, 512) == 64, "its own is three steps away"
    assert key_block(tuned, H100, 2**17) is None


def test_the_users_cache_comes_before_what_is_shipped_and_a_file_that_is_named_before_both(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "package" / "tuned" / "a.json", entry(key_block=16))
    assert key_block(tuned, H100, 1024) == 16
    write(tmp_path / "cache" / "tuned" / "tiny-float32-kernels" / "h100" / "b.json", entry(key_block=32))
    assert key_block(tuned, H100, 1024) == 16, "files are read once"
    tuned.forget()
    assert key_block(tuned, H100, 1024) == 32
    monkeypatch.setenv("NSA_GEN_TUNED", str(write(tmp_path / "named.json", entry(H200, 2048, 64))))
    assert key_block(tuned, H100, 1024) == 64
    monkeypatch.setenv("NSA_GEN_TUNED", "off")
    assert key_block(tuned, H100, 1024) is None


@pytest.mark.parametrize("changed", ["kernels", "space", "dtype", "measurement"])
def test_an_entry_of_other_kernels_or_another_method_serves_nothing(tuned: Tuned, tmp_path: Path, changed: str) -> None:
    write(tmp_path / "package" / "tuned" / "a.json", entry(**{changed: "another"}))
    assert key_block(tuned, H100, 1024) is None


def test_an_illegal_value_is_refused_with_a_warning_and_what_is_no_entry_passed_over(
    tuned: Tuned, tmp_path: Path
) -> None:
    folder = tmp_path / "package" / "tuned"
    write(folder / "a.json", [1, 2])
    write(folder / "b.json", {"schema": 2, "entries": [entry()]})
    write(folder / "c.json", entry(key_block=17))
    with pytest.warns(UserWarning, match=r"c\.json.* is refused: attend\.KEY_BLOCK: expected 16 or 32 or 64, got 17"):
        assert key_block(tuned, H100, 1024) is None
