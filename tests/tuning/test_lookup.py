"""What a generated package makes of tuned files: which one serves, and that none can break it."""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_gen.hardware import SHARED_TABLES
from nsa_gen.lowering import lower
from nsa_gen.rendering import render
from nsa_gen.tuning import Bucket, Entry, Store
from nsa_gen.tuning.store import Device, Identity, Provenance, kernels_of, write_entries
from tests.support import Operator, assert_matches_oracle, operator_of

H100 = Device("NVIDIA H100 80GB HBM3", 132, "sm_90")
PCIE = Device("NVIDIA H100 PCIe", 114, "sm_90")
A100 = Device("NVIDIA A100-SXM4-80GB", 108, "sm_80")
CPU = torch.device("cpu")


@pytest.fixture
def op(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operator]:
    """A package that takes the CPU for an H100, and has looked nowhere yet."""
    found = operator_of("win", gate="none", dtype="float16")
    configs = found.configs
    monkeypatch.setattr(configs.TILES, "gpu_of", lambda device: configs.lookup.Gpu(H100.name, 132, "sm_90"))
    configs.lookup._say_once.cache_clear()
    configs.forget()
    yield found
    configs.forget()
    configs.forget()


MARKS = {
    number: {"KEY_BLOCK": keys, "num_stages": stages}
    for number, (keys, stages) in enumerate(itertools.product((16, 32, 64, 128), (1, 2)), start=30)
}
"""Legal values by which one sees whose they are; the cost model's choice has more stages."""


def entry(op: Operator, mark: int, device: Device = H100, tokens: int = 8192, **changes: Any) -> Entry:
    """An entry whose window_forward has the values of a mark."""
    identity = Identity.of(lower(op.spec), kernels_of(render(op.spec)), device, Bucket(tokens))
    table = lower(op.spec).defaults["sm_90"]["window_forward"].mapping()
    return Entry(replace(identity, **changes), {"window_forward": {**table, **MARKS[mark]}})


def served(op: Operator, tokens: int = 8192, batch: int = 1, packed: bool = False) -> int | None:
    """The mark that a call is served with, None for the cost model's choice."""
    op.configs.forget()
    op.configs.forget()
    found = op.configs.get("window_forward", CPU, op.configs.lookup.bucket_of(tokens, batch, packed))
    marks = [mark for mark, values in MARKS.items() if values.items() <= found.items()]
    assert marks or found == op.configs.DEFAULTS["sm_90"]["window_forward"]
    return marks[0] if marks else None


@pytest.fixture
def ship(op: Operator) -> Iterator[Any]:
    """Puts entries into the package's tuned folder until the test is over."""
    path = op.folder / "tuned" / "some.json"
    yield lambda *entries: write_entries(path, entries, bundle=True)
    if path.exists():
        path.unlink()
        path.parent.rmdir()


def test_without_anything_tuned_it_is_the_cost_models_choice_and_says_once_how_to_tune(
    op: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert served(op) is None and served(op) is None
    assert [record.message for record in caplog.records] == [
        f"nothing is tuned for NVIDIA H100 80GB HBM3 near 8192 tokens: the cost model's tile sizes are used. "
        f"To tune: nsa-gen tune {op.folder / 'spec.yaml'} --shapes 8192"
    ]


@pytest.mark.parametrize(("target", "table"), {**SHARED_TABLES, "sm_90": "sm_90", "gfx950": "gfx950"}.items())
def test_a_device_has_the_table_of_its_architecture_or_the_one_that_this_shares(
    op: Operator, monkeypatch: pytest.MonkeyPatch, target: str, table: str
) -> None:
    configs = op.configs
    monkeypatch.setattr(configs.TILES, "gpu_of", lambda device: configs.lookup.Gpu("one", 4, target))
    configs.forget()
    assert configs.architecture(CPU) == table
    with configs.use_target(target):
        assert configs.table_for(CPU, configs.lookup.bucket_of(8192, 1, False)) is configs.DEFAULTS[table]


def test_it_can_be_made_quiet(op: Operator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_GEN_QUIET", "1")
    assert served(op) is None
    assert not caplog.records


def test_the_order_is_explicit_then_cache_then_shipped_then_architecture_then_the_cost_model(
    op: Operator, cache: Path, ship: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served(op) is None
    Store(cache).save(entry(op, 31, PCIE))
    assert served(op) == 31
    ship(entry(op, 32))
    assert served(op) == 32, "this GPU, shipped, is nearer than another of the architecture in the cache"
    Store(cache).save(entry(op, 33))
    assert served(op) == 33
    explicit = tmp_path / "mine.json"
    write_entries(explicit, [entry(op, 34, PCIE)], bundle=False)
    monkeypatch.setenv("NSA_GEN_TUNED", str(explicit))
    assert served(op) == 34
    with op.configs.override("window_forward", **MARKS[35]):
        assert served(op) == 35
    monkeypatch.setenv("NSA_GEN_TUNED", "off")
    assert served(op) is None


def test_the_nearest_bucket_serves_if_it_is_near(op: Operator, cache: Path) -> None:
    Store(cache).save(entry(op, 31, tokens=8192))
    Store(cache).save(entry(op, 32, tokens=65536))
    assert [served(op, tokens) for tokens in (2048, 8192, 16384, 32768, 65536, 262144)] == [31, 31, 31, 32, 32, 32]
    assert served(op, 1024) is None and served(op, 600_000) is None
    assert served(op, 8192, batch=4) == 31 and served(op, 8192, batch=64) is None
    assert served(op, 16384, packed=True) == 31 and served(op, 2048, packed=True) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"kernels": "0"},
        {"space": "0"},
        {"dtype": "bfloat16"},
        {"measurement": "0"},
        {"architecture": "sm_80"},
    ],
)
def test_an_entry_with_another_identity_does_not_serve(
    op: Operator, cache: Path, changes: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    path = Store(cache).save(entry(op, 31))
    assert served(op) == 31
    write_entries(path, [entry(op, 31, **changes)], bundle=False)  # in the folder of these kernels, whatever it says
    assert served(op) is None
    assert not [record for record in caplog.records if "passed over" in record.message]


def test_an_entry_of_another_architecture_does_not_serve(op: Operator, cache: Path) -> None:
    Store(cache).save(entry(op, 31, A100))
    assert served(op) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, '{"schema": 0}', '{"schema": 1}', '{"schema": 1, "entries": 3}',
     '{"schema": 1, "identity": {"gpu": "x", "multiprocessors": 1, "architecture": "sm_90", '
     '"bucket": {"tokens": 1e999, "batch": 1, "packed": false, "decode": false}}, "configs": {}}'],
    ids=["empty", "cut short", "a list", "deep", "old", "bare", "no entries", "endless"],
)  # fmt: skip
def test_a_file_that_cannot_be_understood_is_passed_over_and_stays_where_it_is(
    op: Operator, cache: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = Store(cache).save(entry(op, 31))
    path.write_text(text)
    Store(cache).save(entry(op, 32, tokens=16384))
    assert served(op) == 32
    assert path.read_text() == text
    assert any("passed over" in record.message for record in caplog.records)


@pytest.mark.parametrize("provenance", [None, [], "torch 2.11"])
def test_an_entry_with_versions_that_are_none_is_passed_over(op: Operator, cache: Path, provenance: Any) -> None:
    path = Store(cache).save(entry(op, 31))
    path.write_text(json.dumps({**json.loads(path.read_text()), "provenance": provenance}))
    assert served(op) is None


def test_an_entry_with_a_kernel_that_has_other_tunables_does_not_serve(op: Operator, cache: Path) -> None:
    found = entry(op, 31)
    Store(cache).save(replace(found, configs={"window_forward": {"num_warps": 4}, "gone": {"X": 1}}))
    with pytest.warns(UserWarning, match="window_forward: expected QUERY_BLOCK.*expected one of .* got 'gone'"):
        assert served(op) is None


def test_an_entry_made_with_other_versions_serves_and_says_so(
    op: Operator, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = replace(entry(op, 31), provenance=Provenance(torch=torch.__version__, triton="3.0.0"))
    Store(cache).save(made)
    assert served(op) == 31
    assert [record.message for record in caplog.records] == [
        "configurations were tuned with triton 3.0.0; nsa-gen tune measures anew"
    ]


def test_operators_run_with_their_buckets_table_forward_and_backward(op: Operator, cache: Path) -> None:
    """The interpreter's smallest tiles for one bucket, others for the other: each call has those of its own length."""
    found = entry(op, 31, tokens=512)
    tiles = {"QUERY_BLOCK": 16, "KEY_BLOCK": 32, "num_warps": 4, "num_stages": 1}
    kernels = ("window_forward", "window_backward_dq", "window_backward_dkdv")
    Store(cache).save(replace(found, configs={kernel: tiles for kernel in kernels}))
    op.configs.forget()
    seen: dict[str, set[int]] = {}
    plain = op.configs.get

    def watched(kernel: str, device: torch.device, bucket: Any = None) -> dict[str, int]:
        config = plain(kernel, device, bucket)
        seen.setdefault(kernel, set()).add(config.get("KEY_BLOCK", 0))
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op.configs, "get", watched)
        assert_matches_oracle(op, 37)
    assert {kernel: seen[kernel] for kernel in kernels} == {kernel: {32} for kernel in kernels}
    assert op.configs.TILES._call.table is None, "outside of operators nothing is in force"


def test_a_package_starts_no_process_and_says_what_would_tune(op: Operator, cache: Path, caplog: Any) -> None:
    for module in sorted(op.folder.glob("*.py")):
        assert not re.search(
            r"^import subprocess|^from subprocess|os\.(system|popen|exec|spawn)", module.read_text(), re.M
        )
    op.configs.lookup._say_once.cache_clear()
    assert served(op) is None
    assert f"nsa-gen tune {op.folder / 'spec.yaml'} --shapes 8192" in caplog.text


def test_a_launch_costs_a_dictionary_lookup_after_the_first(op: Operator, cache: Path) -> None:
    op.configs.forget()
    bucket = op.configs.lookup.bucket_of(8192, 1, False)
    first = op.configs.table_for(CPU, bucket)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op.configs.TILES, "_resolve", lambda *arguments: pytest.fail("files are read once"))
        assert op.configs.table_for(CPU, bucket) is first


def test_a_compiled_call_takes_the_chunks_of_its_bucket(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph, without a recompilation for a second length of the same bucket."""
    op = operator_of("slc", indices="input", gate="none", dtype="float16")
    assert op.configs.gpu_of(CPU) is None
    monkeypatch.setattr(op.configs.TILES, "gpu_of", lambda device: op.configs.lookup.Gpu(H100.name, 132, "sm_90"))
    monkeypatch.setattr(op.configs.TILES, "architecture", lambda device: "interpreter")
    program = lower(op.spec)
    identity = Identity.of(program, kernels_of(render(op.spec)), H100, Bucket(512))
    schedule = program.defaults["interpreter"]["selected_attention"].mapping()
    Store(cache).save(Entry(identity, {"selected_attention": {**schedule, "CHUNK_TOKENS": 128}}))
    op.configs.forget()
    steps = importlib.import_module(f"{op.module.__name__}.kernels.selected_attention")
    seen: list[int] = []

    def chunk(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        sequences = steps.Sequences(q.shape[0], q.shape[1], k.shape[1])
        return q * steps.most_chunk_tokens(q, sequences)

    def counting(graph: Any, example: Any) -> Any:
        seen.append(1)
        return graph.forward

    compiled = torch.compile(chunk, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (40, 50, 60):
        q = torch.ones(1, tokens, 2, 16)
        assert torch.equal(compiled(q, q), 128 * q)
    assert len(seen) == 1
    q = torch.ones(1, 600, 2, 16)
    assert torch.equal(compiled(q, q), 128 * q) and len(seen) == 2, "another bucket is another graph"
    op.configs.forget()


def test_what_is_chosen_is_marked_as_the_public_decorator_marks_it() -> None:
    """The decorator itself would import the compiler; should it come to mean something else, this fails."""
    op = operator_of("slc", indices="input", gate="none", dtype="float16")
    marked = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(marked).items() <= vars(op.configs.chosen).items() and vars(marked)


# Decode


def test_decode_is_looked_up_by_the_capacity_of_its_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = operator_of("cmp slc win", dtype="float16", passes=("forward", "decode"))
    monkeypatch.setattr(op.configs.TILES, "gpu_of", lambda device: op.configs.lookup.Gpu(H100.name, 132, "sm_90"))
    monkeypatch.setattr(op.configs.TILES, "architecture", lambda device: "interpreter")
    program = lower(op.spec)
    bucket = Bucket.of(1000, 3, decode=True)
    assert bucket == Bucket(1024, 4, decode=True)
    identity = Identity.of(program, kernels_of(render(op.spec), decode=True), H100, bucket)
    default = program.defaults["interpreter"]["decode_attend"].mapping()
    Store(cache).save(Entry(identity, {"decode_attend": {**default, "PROGRAMS": 2}}))
    op.configs.forget()
    lookup, programs = op.configs.lookup, {}
    for capacity in (1000, 600, 1025, 10**5):
        with op.configs.serving(CPU, lookup.decode_bucket(capacity, 3)):
            programs[capacity] = op.configs.get("decode_attend", CPU)["PROGRAMS"]
    assert programs == {1000: 2, 600: 2, 1025: 2, 10**5: default["PROGRAMS"]}
    with op.configs.serving(CPU, lookup.bucket_of(1000, 3, False)):
        assert op.configs.get("decode_attend", CPU) == default, "a forward is not served by a decode's entry"
    seen = []
    inference = importlib.import_module(f"{op.module.__name__}.inference_ops").INFERENCE
    monkeypatch.setattr(inference, "_serving", _noting(op.configs.serving, seen))
    small = op.module.NSACache(batch=1, capacity=900, device="cpu")
    small.extend(1)
    new = torch.zeros(1, 1, 1, 16, dtype=torch.float16)
    small.write(new, new)
    q = torch.zeros(1, 1, 2, 16, dtype=torch.float16)
    op.module.nsa_decode(q, small, torch.zeros(1, 1, 2, 3, dtype=torch.float16))
    assert seen[-1] == lookup.Bucket(1024, 1, packed=False, decode=True)
    op.configs.forget()


def _noting(serving: Any, seen: list[Any]) -> Any:
    def noted(device: torch.device, bucket: Any) -> Any:
        seen.append(bucket)
        return serving(device, bucket)

    return noted
