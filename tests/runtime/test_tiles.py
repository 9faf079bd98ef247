"""Which configuration a kernel is launched with."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nsa_gen.runtime.lookup import Bucket, Gpu
from nsa_gen.runtime.tiles import Tiles

CPU, META = torch.device("cpu"), torch.device("meta")
BUCKET = Bucket(512, 1, packed=False)


@pytest.fixture
def tiles(tmp_path: Path) -> Tiles:
    tables = {"interpreter": 16, "sm_90": 32, "sm_100": 64}
    identity = {"name": "t", "dtype": "float32", "schema": 1, "measurement": "m", "kernels": "k", "space": "s"}
    document = {
        "identity": identity,
        "schedules": ["selected_attention"],
        "shared_tables": {"sm_103": "sm_100"},
        "shared_memory": {"sm_90": 227_000, "sm_100": 227_001},
        "multiprocessors": {"sm_90": 132},
        "values": {"attend": {"KEY_BLOCK": [16, 32, 64], "num_warps": [4, 8]}},
        "rules": {"attend": ["KEY_BLOCK <= 8 * num_warps"]},
        "tiles": {name: {"attend": {"KEY_BLOCK": size, "num_warps": 8}} for name, size in tables.items()},
    }
    (tmp_path / "tiles.json").write_text(json.dumps(document), encoding="utf-8")
    return Tiles(tmp_path)


def key_block(tiles: Tiles, device: torch.device = CPU, bucket: Bucket | None = BUCKET) -> int:
    return tiles.get("attend", device, bucket)["KEY_BLOCK"]


def test_a_cpu_has_the_interpreters_table_and_a_target_in_force_its_own(tiles: Tiles) -> None:
    assert (tiles.architecture(CPU), key_block(tiles)) == ("interpreter", 16)
    with tiles.use_target("sm_103"):
        assert (key_block(tiles), tiles.target_of(META)) == (64, "sm_100")
        with tiles.use_target("sm_90"):
            assert (key_block(tiles), tiles.multiprocessors(META)) == (32, 132)
        assert key_block(tiles) == 64
    assert (key_block(tiles), tiles.target_of(META)) == (16, None)
    with pytest.raises(ValueError, match="expected one of interpreter, sm_90, sm_100, sm_103, got 'sm_1'"):
        tiles.use_target("sm_1").__enter__()


def test_an_override_replaces_some_values_within_its_block_and_must_suit_the_others(tiles: Tiles) -> None:
    with tiles.override("attend", KEY_BLOCK=64):
        assert tiles.get("attend", CPU, BUCKET) == {"KEY_BLOCK": 64, "num_warps": 8}
        with tiles.override("attend", num_warps=4), pytest.raises(ValueError, match=r"override: attend: expected KEY_"):
            tiles.get("attend", CPU, BUCKET)
    assert key_block(tiles) == 16
    with pytest.raises(ValueError, match=r"attend\.KEY_BLOCK: expected 16 or 32 or 64, got 128"):
        tiles.override("attend", KEY_BLOCK=128).__enter__()


def test_what_is_made_of_configurations_is_made_once_unless_an_override_or_a_target_is_in_force(tiles: Tiles) -> None:
    asked: list[int] = []

    def half(config_of: Callable[[str], dict[str, int]]) -> int:
        asked.append(config_of("attend")["KEY_BLOCK"])
        return asked[-1] // 2

    assert [tiles.derived(half, CPU, *BUCKET) for _ in range(3)] == [8, 8, 8] and asked == [16]
    with tiles.override("attend", KEY_BLOCK=64):
        assert tiles.derived(half, CPU, *BUCKET) == 32
    with tiles.use_target("sm_90"):
        assert tiles.derived(half, CPU, *BUCKET) == 16
    assert tiles.derived(half, CPU, *BUCKET) == 8 and asked == [16, 64, 32]
    tiles.forget()
    assert tiles.derived(half, CPU, *BUCKET) == 8 and asked == [16, 64, 32, 16]


def test_the_table_that_serves_a_call_is_its_threads_alone(tiles: Tiles) -> None:
    other = {"attend": {"KEY_BLOCK": 32}}
    tiles._tables[CPU, BUCKET] = other
    seen = []
    with tiles.serving(CPU, BUCKET):
        assert key_block(tiles, bucket=None) == 32
        thread = threading.Thread(target=lambda: seen.append(key_block(tiles, bucket=None)))
        thread.start()
        thread.join()
    assert seen == [16] and key_block(tiles, bucket=None) == 16


def test_what_is_tuned_comes_before_the_cost_models_choice_until_it_is_forgotten(
    tiles: Tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"attend": {"KEY_BLOCK": 64, "num_warps": 8}}
    monkeypatch.setattr(tiles, "gpu_of", lambda device: Gpu("H100", 132, "sm_90"))
    monkeypatch.setattr(tiles._tuned, "find", lambda gpu, bucket: found)
    assert tiles.chosen("attend", "KEY_BLOCK", META, 512, 1, False) == 64
    found = {}
    assert tiles.chosen("attend", "KEY_BLOCK", META, 512, 1, False) == 64
    tiles.forget()
    assert tiles.chosen("attend", "KEY_BLOCK", META, 512, 1, False) == 32
