"""`cache why`, export and import: every reason for which an entry serves, or does not."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsa_gen.lowering import lower
from nsa_gen.rendering import render
from nsa_gen.spec import load_spec
from nsa_gen.tuning import Bucket, Entry, Store
from nsa_gen.tuning.cache import Explanation, export, import_entries, why
from nsa_gen.tuning.store import Device, Identity, Provenance, Unreadable, kernels_of, write_entries

SPEC = load_spec("tiny")
PROGRAM, KERNELS = lower(SPEC), kernels_of(render(SPEC))
H100 = Device("NVIDIA H100 80GB HBM3", 132, "sm_90", "570.1", "2.11.0", "3.6.0")
TABLE = PROGRAM.defaults["sm_90"]["window_forward"].mapping()


def entry(tokens: int = 8192, device: Device = H100, configs: Any = None, **changes: Any) -> Entry:
    identity = Identity.of(PROGRAM, KERNELS, device, Bucket(tokens))
    provenance = Provenance("570.1", "2.11.0", "3.6.0", "0.1.0", "2026-11-23")
    return Entry(replace(identity, **changes), {"window_forward": TABLE} if configs is None else configs, provenance)


def explained(cache: Path, tokens: int = 8192, **more: Any) -> Explanation:
    more.setdefault("environment", {})
    return why(SPEC, more.pop("device", H100), Bucket.of(tokens), store=Store(cache), **more)


def reason(cache: Path, saved: Entry, **more: Any) -> tuple[bool, str]:
    """What is said of the only entry there is."""
    Store(cache).save(saved)
    found = explained(cache, **more)
    (verdict,) = found.verdicts
    assert verdict.used == (found.chosen is not None) == (not found.note)
    return verdict.used, verdict.reason


def test_an_empty_cache_says_that_nothing_is_tuned(cache: Path) -> None:
    found = explained(cache)
    assert found.verdicts == () and found.chosen is None and found.note == "nothing is tuned for tiny anywhere"


def test_an_entry_of_exactly_the_call_is_used(cache: Path) -> None:
    assert reason(cache, entry()) == (True, "exactly this call")


def test_the_nearest_bucket_is_used_and_named(cache: Path) -> None:
    used, said = reason(cache, entry(16384))
    assert used and said == "nothing nearer: bucket: wanted t8192_b1, the entry has t16384_b1"


def test_another_gpu_of_the_architecture_is_used_where_there_is_nothing_better(cache: Path) -> None:
    used, said = reason(cache, entry(device=Device("NVIDIA H100 PCIe", 114, "sm_90")))
    assert used and said.startswith("nothing nearer: gpu: wanted NVIDIA H100 80GB HBM3, the entry has NVIDIA H100 PCIe")
    assert "multiprocessors: wanted 132, the entry has 114" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kernels": "0123"}, f"kernels: wanted {KERNELS}, the entry has 0123 (the code of the kernels has changed"),
        ({"space": "0123"}, "the entry has 0123 (the tunables or their constraints have changed since)"),
        ({"dtype": "float16"}, "dtype: wanted float32, the entry has float16 (tuned for tensors of another type)"),
        ({"measurement": "0"}, "measurement: wanted interleaved-2, the entry has 0 (times were taken in another way)"),
        ({"architecture": "sm_80"}, "architecture: wanted sm_90, the entry has sm_80 (another architecture"),
        ({"bucket": Bucket(65536)}, "bucket: wanted t8192_b1, the entry has t65536_b1 (too far from the call"),
        ({"bucket": Bucket(8192, 64)}, "bucket: wanted t8192_b1, the entry has t8192_b64 (too far from the call"),
    ],
)
def test_a_field_that_differs_is_named_with_both_values_and_what_it_means(
    cache: Path, changes: dict[str, Any], said: str
) -> None:
    used, found = reason(cache, entry(**changes))
    assert not used and said in found


def test_all_fields_that_differ_are_named_at_once(cache: Path) -> None:
    _, found = reason(cache, entry(kernels="1", space="2", dtype="float16"))
    assert all(f"{name}: wanted" in found for name in ("kernels", "space", "dtype"))


def test_an_entry_that_names_other_kernels_or_tunables_is_not_used(cache: Path) -> None:
    used, said = reason(cache, entry(configs={"gone": {"X": 1}}))
    assert not used and said.startswith("refused: kernel: expected one of ") and said.endswith("got 'gone'")
    said = "refused: window_forward: expected QUERY_BLOCK, KEY_BLOCK, num_warps, num_stages, got num_warps"
    assert reason(cache, entry(configs={"window_forward": {"num_warps": 4}})) == (False, said)


def test_one_that_would_serve_says_which_comes_first(cache: Path, tmp_path: Path) -> None:
    Store(cache).save(entry(16384))
    shipped = tmp_path / "tuned"
    write_entries(shipped / "h100.json", [entry()], bundle=True)
    near, exact = explained(cache, shipped=shipped).verdicts
    assert not near.used and near.reason == "would serve, but h100.json comes first"
    assert exact.used and exact.level == 2


def test_versions_that_differ_are_a_warning_and_no_reason(cache: Path) -> None:
    Store(cache).save(entry())
    (verdict,) = explained(cache, device=replace(H100, triton="3.9.0", driver="600.0")).verdicts
    assert verdict.used and [each.field for each in verdict.drift] == ["driver", "triton"]
    assert verdict.to_json()["drift"][1] == {"field": "triton", "wanted": "3.9.0", "found": "3.6.0", "fatal": False}


def test_a_file_that_cannot_be_understood_is_listed_and_left_where_it_is(cache: Path) -> None:
    path = Store(cache).save(entry())
    path.write_text("{")
    (verdict,) = explained(cache).verdicts
    assert not verdict.used and verdict.entry is None and "cannot be understood" in verdict.reason
    assert path.exists()


def test_the_environment_comes_first(cache: Path, tmp_path: Path) -> None:
    Store(cache).save(entry())
    off = explained(cache, environment={"NSA_GEN_TUNED": "off"})
    assert off.chosen is None and off.note.startswith("NSA_GEN_TUNED=off")
    mine = tmp_path / "mine.json"
    write_entries(mine, [entry(16384)], bundle=False)
    found = explained(cache, environment={"NSA_GEN_TUNED": str(mine)})
    assert found.chosen is not None and found.chosen.path == mine
    gone = explained(cache, environment={"NSA_GEN_TUNED": str(tmp_path / "gone.json")})
    assert "cannot be understood" in gone.verdicts[0].reason and gone.chosen is not None


def test_what_is_said_is_what_a_package_does(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rule in two places: the same entry serves, for every call."""
    import torch

    from tests.support import operator_of_spec

    op = operator_of_spec(SPEC)
    others = [Device("NVIDIA H100 PCIe", 114, "sm_90"), H100, Device("NVIDIA A100", 108, "sm_80")]
    tiles = itertools.product((16, 32), (16, 32), (1, 2, 3))  # by which one sees whose they are
    for (tokens, device), (rows, keys, stages) in zip(itertools.product((1024, 8192, 65536), others), tiles):  # noqa: B905
        values = {"QUERY_BLOCK": rows, "KEY_BLOCK": keys, "num_stages": stages}
        Store(cache).save(entry(tokens, device, {"window_forward": {**TABLE, **values}}))
    for gpu in others[:2]:
        monkeypatch.setattr(op.configs.TILES, "gpu_of", lambda _, gpu=gpu: op.configs.lookup.Gpu(*vars_of(gpu)))
        op.configs.forget()
        for tokens in (300, 2048, 4096, 16384, 100_000, 300_000, 10**6):
            chosen = explained(cache, tokens, device=gpu).chosen
            bucket = op.configs.lookup.bucket_of(tokens, 1, False)
            found = op.configs.get("window_forward", torch.device("cpu"), bucket)
            expected = TABLE if chosen is None else chosen.entry.configs["window_forward"]
            assert found == expected, (gpu, tokens)
    op.configs.forget()
    op.configs.forget()


def vars_of(device: Device) -> tuple[str, int, str]:
    return device.name, device.multiprocessors, device.architecture


# Travel


def test_what_is_exported_is_imported_elsewhere(cache: Path, tmp_path: Path) -> None:
    store, other, file = Store(cache), Store(tmp_path / "other"), tmp_path / "all.json"
    store.save(entry())
    store.save(entry(65536))
    store.save(entry(1024, spec="another"))
    assert export(store, file, ["tiny"]) == 2 and export(store, tmp_path / "none.json", ["nobody"]) == 0
    found = import_entries(other, file, {"tiny": SPEC})
    assert found.refused == () and len(found.saved) == 2
    assert {each.identity.bucket.tokens for _, each in other.all()} == {8192, 65536}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kernels": "0123"}, "the code of the kernels has changed since"),
        ({"space": "0123"}, "the tunables or their constraints have changed since"),
        ({"measurement": "0"}, "times were taken in another way"),
        ({"dtype": "float16"}, "tuned for tensors of another type"),
        ({"spec": "unheard_of"}, "no spec named unheard_of is known"),
        ({"architecture": "sm_75"}, "sm_75 is not in the hardware table"),
        ({"configs": {"window_forward": {**TABLE, "KEY_BLOCK": 48}}}, "KEY_BLOCK: expected 16 or 32, got 48"),
        ({"configs": {"window_forward": {**TABLE, "num_stages": 50}}}, "num_stages: expected 1 or 2 or 3, got 50"),
        ({"configs": {"selected_attention": {"KEY_MAJOR_FORWARD": 2}}}, "selected_attention: expected KEY_MAJOR_FORW"),
    ],
)
def test_an_entry_for_other_kernels_or_with_illegal_values_is_refused(
    cache: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    file = tmp_path / "all.json"
    write_entries(file, [entry(**changes), entry(65536)], bundle=True)
    found = import_entries(Store(cache), file, {"tiny": SPEC})
    ((_, reason),) = found.refused
    assert said in reason
    assert [each.identity.bucket.tokens for each in found.saved] == [65536]


def test_a_file_that_is_no_export_is_refused_and_left_alone(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    file.write_text("[]")
    with pytest.raises(Unreadable, match="schema"):
        import_entries(Store(cache), file, {})
    assert file.exists()
