"""The store: atomic, locked, and never in the way of anybody, whatever lies in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nsa_gen._files import json_text
from nsa_gen._resources import cache_dir
from nsa_gen.tuning.cache import differences, drifted
from nsa_gen.tuning.space import Bucket
from nsa_gen.tuning.store import (
    CacheWarning,
    Device,
    Entry,
    Identity,
    Provenance,
    Store,
    Unreadable,
    merge_into_bundle,
    read_entries,
    write_entries,
)

IDENTITY = Identity(
    "llama", "aaaa", "bbbb", "bfloat16", "interleaved-2", "NVIDIA H100 80GB HBM3", 132, "sm_90", Bucket(8192)
)
ENTRY = Entry(
    IDENTITY,
    {"window_forward": {"QUERY_BLOCK": 64, "num_warps": 4}},
    Provenance("570.1", "2.11.0", "3.6.0", "0.1.0", "2026-11-23T00:00:00+00:00"),
    {"gain": 1.25},
)


@pytest.fixture
def store(cache: Path) -> Store:
    return Store(cache)


def test_an_entry_comes_back_as_it_was_saved(store: Store) -> None:
    path = store.save(ENTRY)
    assert path.relative_to(store.root).as_posix() == "llama-bfloat16-aaaa/nvidia_h100_80gb_hbm3/t8192_b1.json"
    assert store.load(IDENTITY) == ENTRY
    assert store.load(replace(IDENTITY, space="cccc")) is None
    assert [entry for _, entry in store.all()] == [ENTRY]


def test_a_file_is_readable_by_people(store: Store) -> None:
    text = store.save(ENTRY).read_text()
    assert '  "window_forward": {"QUERY_BLOCK": 64, "num_warps": 4}' in text.splitlines()
    assert json.loads(text)["schema"] == 1


BROKEN = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no JSON": lambda text: "hello",
    "a list": lambda text: "[]",
    "of an older schema": lambda text: text.replace('"schema": 1', '"schema": 0'),
    "of a newer schema": lambda text: text.replace('"schema": 1', '"schema": 2'),
    "without identity": lambda text: text.replace('"identity"', '"something"'),
    "with a field missing": lambda text: text.replace('"kernels"', '"kernel"'),
    "with words for numbers": lambda text: text.replace('"num_warps": 4', '"num_warps": "four"'),
    "with a broken bucket": lambda text: text.replace('"batch": 1', '"batch": null'),
    "with an endless bucket": lambda text: text.replace('"batch": 1', '"batch": Infinity'),
    "with versions that are a list": lambda text: json.dumps({**json.loads(text), "provenance": []}),
    "with a gain in words": lambda text: json.dumps({**json.loads(text), "result": {"gain": "much"}}),
    "with times of no pass": lambda text: json.dumps({**json.loads(text), "result": {"ms": {"independent": 1.0}}}),
    "with too many brackets": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_cannot_be_understood_is_set_aside_with_a_warning(store: Store, what: str) -> None:
    path = store.save(ENTRY)
    other = store.save(replace(ENTRY, identity=replace(IDENTITY, bucket=Bucket(65536))))
    path.write_text(BROKEN[what](path.read_text()))
    with pytest.warns(CacheWarning, match=r"t8192_b1\.json.*set aside as t8192_b1\.json\.bad"):
        found = list(store.all())
    assert [where for where, _ in found] == [other], "the others are intact"
    assert not path.exists() and path.with_name("t8192_b1.json.bad").exists()
    assert store.save(ENTRY) == path and store.load(IDENTITY) == ENTRY


def test_files_set_aside_earlier_are_kept(store: Store) -> None:
    for _ in range(2):
        store.save(ENTRY).write_text("broken")
        with pytest.warns(CacheWarning):
            assert store.load(IDENTITY) is None
    assert {path.name for path in store.path(IDENTITY).parent.iterdir()} == {
        "t8192_b1.json.bad",
        "t8192_b1.json.bad1",
    }


def test_a_save_that_fails_leaves_the_old_file_and_no_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.save(ENTRY)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.save(replace(ENTRY, configs={}))
    assert store.load(IDENTITY) == ENTRY
    assert [each.name for each in path.parent.iterdir()] == [path.name]


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from tests.tuning.test_store import ENTRY
from nsa_gen.tuning.store import Store, merge_into_bundle
from nsa_gen.tuning.space import Bucket
store, number = Store(Path(sys.argv[1])), int(sys.argv[2])
for turn in range(15):
    entry = replace(ENTRY, configs={"window_forward": {"num_warps": number}})
    store.save(entry)
    merge_into_bundle(Path(sys.argv[1]) / "bundle.json",
                      replace(entry, identity=replace(ENTRY.identity, bucket=Bucket(512 << number))))
"""


def test_many_processes_may_write_at_once(store: Store, cache: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(cache)]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    while any(writer.poll() is None for writer in writers):
        for path in cache.glob("tuned/*/*/*.json"):
            read_entries(path)  # whole at every moment
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len(read_entries(cache / "bundle.json")) == 3, "none has overwritten another's entry"
    assert next(iter(store.all()))[1].configs["window_forward"]["num_warps"] in (0, 1, 2)


def test_a_bundle_keeps_other_buckets_and_drops_other_kernels(tmp_path: Path) -> None:
    path = tmp_path / "tuned" / "nvidia_h100.json"
    long = replace(ENTRY, identity=replace(IDENTITY, bucket=Bucket(65536)))
    stale = replace(ENTRY, identity=replace(IDENTITY, kernels="old", bucket=Bucket(1024)))
    write_entries(path, [long, stale], bundle=True)
    merge_into_bundle(path, ENTRY)
    assert [each.identity for each in read_entries(path)] == [IDENTITY, long.identity]
    merge_into_bundle(path, replace(ENTRY, configs={}))
    assert [each.configs for each in read_entries(path)] == [{}, ENTRY.configs]
    assert [each.name for each in path.parent.iterdir()] == [path.name], "no lock beside what is shipped"


def test_reading_a_file_that_is_none_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(Unreadable, match=r"x\.json: schema: expected 1, got 0"):
        read_entries(path)


def test_removing_deletes_files_and_empty_folders(store: Store) -> None:
    path = store.save(ENTRY)
    assert store.remove([path, path]) == 1
    assert not path.parent.parent.exists() and store.root.is_dir()


def test_the_layout_is_json(tmp_path: Path) -> None:
    value = {"a": [{"b": 1}, {"c": []}], "d": {}, "e": [1, 2], "f": {"g": {"h": "i"}}}
    assert json.loads(json_text(value)) == value


def test_the_cache_of_a_package_is_the_one_of_nsa_gen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.support import operator_of

    lookup = operator_of("win", gate="none").configs.lookup
    places = (("NSA_GEN_CACHE_DIR", "~/x"), ("NSA_GEN_CACHE_DIR", "~nobody_of_that_name/x"), ("NSA_GEN_CACHE_DIR", ""))
    for variable, value in (*places, ("XDG_CACHE_HOME", str(tmp_path))):
        monkeypatch.setenv(variable, value)
        assert lookup.cache_folder() == cache_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert lookup.cache_folder() == cache_dir()


# Identities


def test_every_field_of_an_identity_that_must_match_is_named_when_it_does_not() -> None:
    assert differences(IDENTITY, IDENTITY) == []
    other = Identity("llama", "k", "s", "float16", "m", "H100 PCIe", 114, "sm_80", Bucket(1024, 1, True))
    found = differences(IDENTITY, other)
    assert [each.field for each in found if each.fatal] == [
        "kernels",
        "space",
        "dtype",
        "measurement",
        "architecture",
        "bucket",
    ]
    assert [each.field for each in found if not each.fatal] == ["gpu", "multiprocessors"]
    assert str(found[0]) == "kernels: wanted aaaa, the entry has k"


def test_versions_that_are_not_known_do_not_count_as_other_ones() -> None:
    now = Device("H100", 132, "sm_90", driver="570.1", torch="2.12.0", triton="")
    assert [each.field for each in drifted(now, ENTRY.provenance)] == ["torch"]


# Buckets


def test_buckets_round_up() -> None:
    assert Bucket.of(1) == Bucket(512) and Bucket.of(8192) == Bucket(8192) and Bucket.of(8193) == Bucket(16384)
    assert Bucket.of(600, batch=5) == Bucket(1024, 16) and Bucket.of(10**9).tokens == 2**21
    with pytest.raises(ValueError, match="expected positive numbers, got tokens=0"):
        Bucket.of(0)


def test_a_package_has_the_same_buckets_and_the_same_steps() -> None:
    from tests.support import operator_of

    lookup = operator_of("win", gate="none").configs.lookup
    calls = [
        (tokens, batch, packed)
        for tokens in (1, 512, 513, 9000, 2**22)
        for batch in (1, 2, 4, 5, 10**5)
        for packed in (False, True)
    ]
    theirs = [lookup.bucket_of(*call) for call in calls]
    ours = [
        Bucket.of(tokens, batch) if not packed else replace(Bucket.of(tokens, batch), packed=True)
        for tokens, batch, packed in calls
    ]
    assert [tuple(each) for each in theirs] == [tuple(vars(each).values()) for each in ours]
    for place in range(len(calls) - 7):
        assert theirs[place].steps(theirs[place + 7]) == ours[place].steps(ours[place + 7])


def test_a_bucket_has_a_name_to_be_found_by() -> None:
    buckets = (Bucket(8192), Bucket(512, 16), Bucket(65536, 1, True), Bucket(512, 2, decode=True))
    assert [each.name for each in buckets] == ["t8192_b1", "t512_b16", "t65536_b1_packed", "t512_b2_decode"]
    assert sum(Bucket(65536, 1, True).lengths) == 65536
