"""`nsa-gen cache` as a user calls it, on caches that are empty, full, stale, foreign and broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nsa_gen.tuning import Bucket, Store
from nsa_gen.tuning.store import Device
from tests.machine import GPU
from tests.tuning.test_cache import entry

H100 = ("--gpu", "NVIDIA H100 80GB HBM3")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return Store()


def test_an_empty_cache_lists_nothing_and_says_how_to_fill_it(call, store: Store) -> None:
    answer = call("cache", "list")
    assert answer.returncode == 0 and "Nothing is tuned" in answer.stdout and "nsa-gen tune SPEC" in answer.stdout
    assert json.loads(call("cache", "list", "--json").stdout) == {"ok": True, "entries": []}
    assert not store.root.exists(), "looking makes no folder"


def test_entries_are_listed(call, store: Store) -> None:
    store.save(replace(entry(), result={"gain": 1.25}))
    store.save(entry(spec="another"))
    text = call("cache", "list").stdout
    assert "tiny" in text and "another" in text and "1.25x" in text and "NVIDIA H100 80GB HBM3" in text
    assert "another" not in call("cache", "list", "tiny").stdout
    assert len(json.loads(call("cache", "list", "--json").stdout)["entries"]) == 2


def test_an_entry_that_the_package_refuses_is_listed_with_the_reason(call, store: Store) -> None:
    good = entry()
    path = store.save(entry(65536, configs={"window_forward": {**good.configs["window_forward"], "KEY_BLOCK": 64}}))
    store.save(good)
    said = "window_forward.KEY_BLOCK: expected 16 or 32, got 64"
    assert f"{path} is refused by the package: {said}" in call("cache", "list").stderr
    listed = json.loads(call("cache", "list", "--json").stdout)["entries"]
    assert {each["identity"]["bucket"]["tokens"]: each["refused"] for each in listed} == {65536: said, 8192: None}


def test_a_broken_file_is_set_aside_with_a_warning_and_not_a_crash(call, store: Store) -> None:
    path = store.save(entry())
    path.write_text("{")
    store.save(entry(65536))
    answer = call("cache", "list")
    assert answer.returncode == 0 and "65536" in answer.stdout
    assert "set aside as t8192_b1.json.bad" in answer.stderr and not path.exists()


def test_why_names_the_entry_that_serves(call, store: Store) -> None:
    store.save(entry(16384))
    answer = call("cache", "why", "tiny", *H100, "--tokens", "9000")
    assert answer.returncode == 0
    assert "used (user's cache, bucket t16384_b1): exactly this call" in answer.stdout


def test_why_says_no_with_every_field_that_differs(call, store: Store) -> None:
    store.save(entry(kernels="0123", dtype="float16"))
    answer = call("cache", "why", "tiny", *H100)
    assert answer.returncode == 1
    text = " ".join(answer.stdout.split())
    assert "not used (user's cache, bucket t8192_b1)" in text and "no kernels: wanted" in text
    assert "no dtype: wanted float32, the entry has float16" in text
    assert "no entry serves: the cost model's choice is used" in text


def test_why_reads_what_a_package_ships(call, store: Store, tmp_path: Path) -> None:
    from nsa_gen.tuning.store import write_entries

    write_entries(tmp_path / "here" / "tuned" / "h100.json", [entry()], bundle=True)
    answer = call("cache", "why", "tiny", *H100, "--package", str(tmp_path / "here"), "--json")
    (verdict,) = json.loads(answer.stdout)["entries"]
    assert verdict["used"] and verdict["level"] == "shipped"


def test_why_needs_to_know_the_gpu(call, store: Store) -> None:
    if not GPU:
        answer = call("cache", "why", "tiny")
        assert answer.returncode == 2 and "name one, such as --gpu h100" in " ".join(answer.stderr.split())
    assert call("cache", "why", "tiny", "--gpu", "toaster").returncode == 2
    assert "nothing is tuned for tiny anywhere" in call("cache", "why", "tiny", "--gpu", "h100").stdout


def test_entries_travel_from_one_cache_to_another(
    call, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(entry())
    store.save(entry(65536))
    assert call("cache", "export", "all.json").returncode == 0
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "elsewhere"))
    answer = call("cache", "import", "all.json")
    assert answer.returncode == 0 and answer.stdout.count("saved tiny") == 2
    assert len(list(Store().all())) == 2


def test_importing_refuses_entries_of_other_kernels(call, store: Store, tmp_path: Path) -> None:
    store.save(entry(kernels="0123"))
    store.save(entry(65536))
    call("cache", "export", "all.json")
    answer = call("cache", "import", "all.json", "--json")
    document = json.loads(answer.stdout)
    assert answer.returncode == 1 and len(document["saved"]) == 1
    assert "the code of the kernels has changed since" in document["refused"][0]["reason"]
    Path("broken.json").write_text("[]")
    assert call("cache", "import", "broken.json").returncode == 1
    assert call("cache", "import", "nowhere.json").returncode == 2


def test_importing_takes_specs_that_are_not_shipped(call, store: Store, tmp_path: Path) -> None:
    from nsa_gen.lowering import lower
    from nsa_gen.rendering import render
    from nsa_gen.tuning import Entry
    from nsa_gen.tuning.store import Identity, kernels_of
    from tests.tuning.fakes import spec

    mine = spec()
    identity = Identity.of(lower(mine), kernels_of(render(mine)), Device("H100", 132, "sm_90"), Bucket(8192))
    store.save(Entry(identity, {}))
    call("cache", "export", "all.json")
    refused = call("cache", "import", "all.json")
    assert refused.returncode == 1 and "no spec named under_test is known" in refused.stderr
    Path("mine.yaml").write_text(mine.resolved_yaml())
    assert call("cache", "import", "all.json", "mine.yaml").returncode == 0


def test_exporting_nothing_says_so(call, store: Store) -> None:
    answer = call("cache", "export", "all.json")
    assert answer.returncode == 1 and "nothing to export" in answer.stderr and not Path("all.json").exists()


def test_clearing_deletes_what_is_named(call, store: Store) -> None:
    store.save(entry())
    store.save(entry(kernels="0123"))
    store.save(entry(spec="another"))
    assert "1 entries deleted" in call("cache", "clear", "--stale").stderr
    assert {each.identity.kernels == "0123" for _, each in store.all()} == {False}
    assert "1 entries deleted" in call("cache", "clear", "tiny").stderr
    assert [each.identity.spec for _, each in store.all()] == ["another"]
    assert "1 entries deleted" in call("cache", "clear").stderr and not list(store.all())
