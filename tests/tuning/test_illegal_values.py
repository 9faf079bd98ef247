"""Tuned files and overrides with values outside the space: refused wherever they are read, and said why."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_gen.lowering import Plan, lower, space
from nsa_gen.rendering import render
from nsa_gen.rendering.legality import check_of
from nsa_gen.spec import load_spec, shipped_specs
from nsa_gen.tuning import Bucket, Store
from nsa_gen.tuning.cache import import_entries, why
from nsa_gen.tuning.store import (
    CacheWarning,
    Device,
    Entry,
    Identity,
    kernels_of,
    merge_into_bundle,
    merged,
    read_entries,
)
from tests.support import Operator, assert_matches_oracle, operator_of_spec

SPEC = load_spec("tiny")
PROGRAM, FILES = lower(SPEC), render(SPEC)
H100 = Device("NVIDIA H100 80GB HBM3", 132, "sm_90")
CPU = torch.device("cpu")
BUCKETS = {"ATTENTION": Bucket(512), "DECODE": Bucket(512, decode=True)}
ADVERSARIAL = sorted((Path(__file__).parent / "adversarial").glob("*.json"))
every_file = pytest.mark.parametrize("file", ADVERSARIAL, ids=lambda path: path.stem)


def identity(name: str) -> Identity:
    bucket = BUCKETS[name]
    return Identity.of(PROGRAM, kernels_of(FILES, decode=bucket.decode), H100, bucket)


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Operator]:
    """The package of `tiny`, which takes the CPU for an H100 and has the interpreter's tiles."""
    found = operator_of_spec(SPEC)
    configs = found.configs
    monkeypatch.setattr(configs.TILES, "gpu_of", lambda device: configs.lookup.Gpu(H100.name, 132, "sm_90"))
    monkeypatch.setattr(configs.TILES, "architecture", lambda device: "interpreter")
    for once in (configs.lookup._say_once, configs.lookup._warn_once):
        once.cache_clear()
    configs.forget()
    yield found
    configs.forget()


def laid(file: Path, folder: Path) -> tuple[Path, dict[str, Any], str, str]:
    """An adversarial file for the kernels of today: its path, bad entry, the name of its identity, what is said of it.

    Its second entry is good, and has nothing but the cost model's choice.
    """
    document = json.loads(file.read_text())
    said, (bad, good) = document.pop("said"), document["entries"]
    name = bad["identity"]
    bad["identity"] = good["identity"] = asdict(identity(name))
    good["result"] = {"gain": 1.5}
    path = folder / file.name
    path.write_text(json.dumps(document))
    return path, bad, name, said


@every_file
def test_a_package_refuses_the_entry_with_one_warning_and_takes_the_one_beside_it(
    op: Operator, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, name, said = laid(file, tmp_path)
    monkeypatch.setenv("NSA_GEN_TUNED", str(path))
    lookup, bucket = op.configs.lookup, BUCKETS[name]
    with pytest.warns(UserWarning, match="is refused") as caught:
        for _ in range(2):
            op.configs.forget()
            table = op.configs.table_for(CPU, lookup.Bucket(*vars(bucket).values()))
    (warning,) = caught
    assert str(path) in str(warning.message) and said in str(warning.message)
    assert table == op.configs.DEFAULTS["interpreter"]
    (kept,) = (entry for _, entry in op.configs.TILES._tuned.entries(str(path)))
    assert kept["result"] == {"gain": 1.5}


@every_file
def test_why_and_import_refuse_the_entry_and_take_the_one_beside_it(file: Path, tmp_path: Path, cache: Path) -> None:
    path, bad, name, said = laid(file, tmp_path)
    values = next(iter(bad["configs"].values())).values()
    if not all(type(value) is int and value >= 0 for value in values):
        said = "finite numbers" if "nan" in file.stem else "expected whole numbers by name"
    found = why(SPEC, H100, BUCKETS[name], store=Store(cache), environment={"NSA_GEN_TUNED": str(path)})
    refused, used = found.verdicts
    assert used.used and found.chosen is used and not refused.used
    assert said in refused.reason
    imported = import_entries(Store(cache), path, {"tiny": SPEC})
    ((_, reason),) = imported.refused
    assert said in reason
    assert [each.result for each in imported.saved] == [{"gain": 1.5}]


def test_a_call_is_right_whatever_a_tuned_file_says(op: Operator, tmp_path: Path, monkeypatch: Any) -> None:
    """Tiles of four selection blocks made o wrong by 1.9 and gradients NaN, shares of no heads made dk and dv NaN."""
    files = [file for file in ADVERSARIAL if file.stem in ("key_block_of_four_blocks", "head_splits_zero")]
    entries = [laid(file, tmp_path)[1] for file in files]
    path = tmp_path / "both.json"
    path.write_text(json.dumps({"schema": 1, "entries": entries}))
    monkeypatch.setenv("NSA_GEN_TUNED", str(path))
    with pytest.warns(UserWarning) as caught:
        assert_matches_oracle(op, 37)
    assert len(caught) == 2


def test_every_value_the_tuner_may_choose_is_accepted_and_no_other(cache: Path) -> None:
    """Lowering states the space once; the text of the package says the same."""
    check = check_of(PROGRAM)
    for kernel in PROGRAM.kernels:
        keeps = space._keeping(kernel, PROGRAM.sizes)
        for config in space.candidates(kernel):
            assert (check(kernel.name, config) == "") == keeps(config), (kernel.name, config)
    for decision in PROGRAM.decisions:
        names = [each.name for each in decision.tunables]
        for values in itertools.product(*(each.values for each in decision.tunables)):
            assert check(decision.name, dict(zip(names, values, strict=True))) == ""


@pytest.mark.parametrize("name", shipped_specs())
def test_the_cost_models_choice_and_what_is_shipped_are_accepted(name: str) -> None:
    program: Plan = lower(load_spec(name))
    check = check_of(program)
    for table in program.defaults.values():
        assert not any(check(kernel, config.mapping()) for kernel, config in table.items())
    for path in (Path(__file__).parents[2] / "generated" / name / "tuned").glob("*.json"):
        for entry in read_entries(path):
            assert not any(check(*each) for each in entry.configs.items()), path


@pytest.mark.parametrize(
    ("kernel", "values", "said"),
    [
        ("selected_forward", {"KEY_BLOCK": 64}, "selected_forward.KEY_BLOCK: expected 16, got 64"),
        ("selected_forward", {"KEY_BLOCK": 16.0}, "selected_forward.KEY_BLOCK: expected 16, got 16.0"),
        ("merge_outputs", {"num_stages": True}, "merge_outputs.num_stages: expected 1, got True"),
        ("selected_attention", {"CHUNK_TOKENS": 0}, "expected 1 to 131072, got 0"),
        ("window_forward", {"QUERY_BLOCK": 16, "num_warps": 8}, "expected 16*num_warps <= max(64, QUERY_BLOCK)"),
    ],
)
def test_an_override_with_values_outside_the_space_is_refused(
    op: Operator, kernel: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as error, op.configs.override(kernel, **values):
        pass
    assert said in str(error.value)


def test_an_override_that_does_not_suit_the_other_values_is_refused_by_the_launch(op: Operator) -> None:
    said = r"override: window_forward: expected 16\*num_warps <= .* got QUERY_BLOCK=16, num_warps=8"
    with op.configs.override("window_forward", num_warps=8), pytest.raises(ValueError, match=said):
        op.configs.get("window_forward", CPU)
    with op.configs.override("window_forward", num_warps=4, QUERY_BLOCK=32):
        assert op.configs.get("window_forward", CPU)["QUERY_BLOCK"] == 32


def test_what_is_kept_of_an_earlier_tuning_is_legal() -> None:
    window = PROGRAM.defaults["sm_90"]["window_backward_dq"].mapping()
    earlier = Entry(
        identity("ATTENTION"),
        {"window_backward_dq": window, "selected_backward_dq": {"KEY_BLOCK": 64, "num_warps": 4, "num_stages": 1}},
        result={"passes": ["backward"], "ms": {}},
    )
    now = Entry(identity("ATTENTION"), {}, result={"passes": ["forward"], "ms": {}})
    assert merged(PROGRAM, earlier, now).configs == {"window_backward_dq": window}


def test_a_bad_entry_of_a_shipped_file_is_dropped_and_those_beside_it_stay(tmp_path: Path) -> None:
    file = next(each for each in ADVERSARIAL if each.stem == "key_block_nan")
    path, *_ = laid(file, tmp_path)
    with pytest.warns(CacheWarning, match="finite numbers.*this entry is dropped"):
        merge_into_bundle(path, Entry(identity("DECODE"), {}))
    assert [each.identity for each in read_entries(path)] == [identity("ATTENTION"), identity("DECODE")]


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_pipe, _huge, Path.mkdir, _device])
def test_what_is_no_file_of_a_few_kilobytes_is_passed_over(
    op: Operator, cache: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe in place of an entry made the first call wait for ever."""
    path = Store(cache).path(identity("ATTENTION"))
    path.parent.mkdir(parents=True)
    make(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(Store(cache).all()) == []
        found = why(SPEC, H100, BUCKETS["ATTENTION"], store=Store(cache), environment={})
    assert "cannot be read" in str(caught[0].message) and path.exists()
    assert "passed over" in found.verdicts[0].reason
    assert op.configs.table_for(CPU, op.configs.lookup.bucket_of(512, 1, False)) == op.configs.DEFAULTS["interpreter"]


def test_a_byte_order_mark_before_a_tuned_file_is_left_out(op: Operator, cache: Path) -> None:
    stages = {**PROGRAM.defaults["interpreter"]["window_forward"].mapping(), "num_stages": 2}
    path = Store(cache).save(Entry(identity("ATTENTION"), {"window_forward": stages}))
    path.write_text("\ufeff" + path.read_text())
    bucket = op.configs.lookup.bucket_of(512, 1, False)
    assert op.configs.get("window_forward", CPU, bucket) == stages
    assert len(list(Store(cache).all())) == 1


@pytest.mark.parametrize("folder", ["x" * 300, "/dev/null", "~nobody_of_that_name/cache", " "])
def test_a_cache_folder_that_cannot_be_costs_a_call_nothing(op: Operator, folder: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", folder)
    op.configs.forget()
    assert op.configs.table_for(CPU, op.configs.lookup.bucket_of(512, 1, False)) == op.configs.DEFAULTS["interpreter"]
