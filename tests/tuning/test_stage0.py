"""Stage 0: nothing illegal is compiled, and what is not worth measuring falls here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_gen.hardware import gpu_for_target
from nsa_gen.lowering import lower, space
from nsa_gen.rendering import generate
from nsa_gen.spec import load_spec
from nsa_gen.tuning import EFFORTS, Bucket, dry_run
from nsa_gen.tuning.space import check_tokens, is_legal, kernel_space
from nsa_gen.tuning.stage0 import Compiler, calls_of, estimate, job_key, select, spaces_of
from nsa_gen.tuning.timed import bucket_inputs
from tests.support import small_spec
from tests.tuning.fakes import FakeCompiler, binary, fake_tools, spec

H100 = gpu_for_target("sm_90")
PROGRAM = lower(load_spec("llama3_8b"))


def test_candidates_are_legal_distinct_and_begin_with_the_default() -> None:
    for kernel in PROGRAM.kernels:
        found = kernel_space(PROGRAM, kernel, H100, Bucket(8192), 10)
        test = space.fits(kernel, PROGRAM.sizes, H100)
        default = PROGRAM.defaults["sm_90"][kernel.name].mapping()
        assert found.candidates[0] == default and len(found.candidates) <= 10
        assert len({tuple(each.items()) for each in found.candidates}) == len(found.candidates)
        assert all(each == default or test(each) for each in found.candidates), kernel.name
        assert all(is_legal(PROGRAM, kernel.name, each, H100) for each in found.candidates)
        assert found.legal <= found.total


def test_every_value_of_a_tunable_that_is_legal_gets_its_chance_before_a_second_of_the_same() -> None:
    found = kernel_space(PROGRAM, PROGRAM.kernel("window_forward"), H100, Bucket(8192), 10)
    assert {each["num_warps"] for each in found.candidates} == {4, 8}
    assert len({each["QUERY_BLOCK"] for each in found.candidates}) >= 3


def test_the_model_ranks_for_the_length_that_is_tuned() -> None:
    kernel = PROGRAM.kernel("compressed_forward")
    short, long = (kernel_space(PROGRAM, kernel, H100, Bucket(tokens), 10) for tokens in (1024, 65536))
    assert long.seconds[0] > 100 * short.seconds[0]


@pytest.mark.parametrize(
    ("kernel", "config"),
    [
        ("nobody", {"X": 1}),
        ("window_forward", {"QUERY_BLOCK": 64}),
        ("window_forward", {"QUERY_BLOCK": 65, "KEY_BLOCK": 32, "num_warps": 4, "num_stages": 1}),
        ("window_forward", {"QUERY_BLOCK": 16, "KEY_BLOCK": 16, "num_warps": 8, "num_stages": 1}),
        ("selected_attention", {"KEY_MAJOR_FORWARD": 0, "KEY_MAJOR_DQ": 3, "CHUNK_TOKENS": 8192}),
    ],
)
def test_what_is_not_in_the_space_is_not_legal(kernel: str, config: dict[str, int]) -> None:
    assert not is_legal(PROGRAM, kernel, config, H100)


class Scripted(FakeCompiler):
    """Answers for window_forward by place: sound, broken, too large, spilling, and two of the same code."""

    def answer(self, kernel: str, config: dict[str, int]) -> dict[str, Any]:
        usual = super().answer(kernel, config)
        if kernel != "window_forward":
            return usual
        place = CANDIDATES.index(config)
        return {
            1: {"error": "CompilationError: no"},
            2: {"binaries": [binary(), binary(shared_memory=10**6)], "digest": "2"},
            3: {"binaries": [binary(spill_bytes=400)], "digest": "3"},
            4: {"binaries": [binary()], "digest": "same"},
            5: {"binaries": [binary()], "digest": "same"},
        }.get(place, usual)


_program = lower(spec())
CANDIDATES = kernel_space(_program, _program.kernel("window_forward"), H100, Bucket(8192), 10).candidates


def test_what_fails_exceeds_or_spills_is_dropped_and_equal_code_is_one(cache: Path) -> None:
    spaces = spaces_of(_program, H100, Bucket(8192), 10, ("forward",))
    compiler = Scripted(Path(), "sm_90", ("forward",), Path(), None)
    (found,) = (each for each in select(spaces, compiler, H100, Bucket(8192), 976) if each.kernel == "window_forward")
    reasons = list(found.dropped.values())
    assert reasons[0] == "CompilationError: no"
    assert reasons[1].startswith("shared memory: 1,000,000 bytes a block")
    assert reasons[2] == "spills 400 bytes a thread, more than 256"
    assert found.merged == 1 and len(found.survivors) == len(CANDIDATES) - 4
    assert found.default == CANDIDATES[0]


def test_only_kernels_of_the_passes_that_have_a_choice_are_looked_at() -> None:
    names = {each.kernel.name for each in spaces_of(PROGRAM, H100, Bucket(8192), 10, ("forward",))}
    assert "window_forward" in names and "window_backward_dq" not in names
    assert "index_keys" not in names, "it has one configuration"
    assert "attention_delta" not in names, "the operator does not run it"


def test_a_dry_run_needs_no_gpu_and_saves_nothing(cache: Path) -> None:
    report = dry_run(spec(), "h100", tools=fake_tools(cache), shapes=(8192,))
    assert report.device is None and report.ok and report.results == ()
    assert {each.kernel for each in report.selections[Bucket(8192)]} >= {"window_forward", "selected_forward"}
    assert not (cache / "tuned").exists()


def test_the_compiler_compiles_a_candidate_once_for_equal_code_and_fails_alone(tmp_path: Path) -> None:
    """In earnest, with Triton: one kernel, two lengths whose code is the same, and a tile that Triton refuses."""
    of = small_spec("win", gate="none", dtype="float16", window=40)
    package = generate(of, tmp_path)
    compiler = Compiler(package, "sm_90", ("forward",), tmp_path / "triton", jobs=1)
    calls = calls_of(Bucket(1024), check_tokens(of))
    good = {"QUERY_BLOCK": 32, "KEY_BLOCK": 32, "num_warps": 4, "num_stages": 1}
    bad = {**good, "KEY_BLOCK": 48}
    wanted = {job_key("window_forward", each, calls): ("window_forward", each, calls) for each in (good, bad)}
    heard: list[str] = []
    sound, broken = compiler.compile(wanted, lambda key, answer: heard.append(key)).values()
    assert len(sound["binaries"]) == 1 and sound["binaries"][0]["registers"] > 0 and len(sound["digest"]) == 16
    assert "error" in broken and len(heard) == 2
    assert list(compiler.compile(wanted).values()) == [sound, broken], "known by now"
    assert os.listdir(tmp_path / "triton")


def test_what_was_compiled_once_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"a": ("kernel", {"num_warps": 4}, [])}
    asked: list[str] = []

    def one(self: Compiler, worker: Any, kernel: str, config: Any, calls: Any) -> dict[str, Any]:
        asked.append(kernel)
        return {"error": "ptxas failed"} if kernel == "broken" else {"binaries": [], "digest": "d", "seconds": 2.5}

    monkeypatch.setattr(Compiler, "_one", one)
    cache = tmp_path / "triton"
    assert Compiler(tmp_path, "sm_90", (), cache, 1).compile(wanted)["a"]["seconds"] == 2.5
    cache.mkdir()
    both = {**wanted, "b": ("broken", {}, [])}
    assert Compiler(tmp_path, "sm_90", (), cache, 1).compile(both)["a"]["seconds"] == 2.5
    assert Compiler(tmp_path, "sm_90", (), cache, 1).compile(both)["b"] == {"error": "ptxas failed"}
    assert asked == ["kernel", "broken", "broken"], "a failure may have been the machine's"
    Compiler(tmp_path, "sm_80", (), cache, 1).compile(wanted)
    cache.rmdir()
    Compiler(tmp_path, "sm_90", (), cache, 1).compile(wanted)
    assert asked[3:] == ["kernel", "kernel"], "another target, and machine code that is gone"


def test_packed_candidates_are_compiled_for_several_sequences() -> None:
    """One sequence would be another program: its number, 1, would be a constant."""
    calls = calls_of(Bucket(8192, 1, True), 976)
    assert [call["tokens"] * call["batch"] for call in calls] == [8192, 976]
    assert all(call["packed"] and call["batch"] > 1 for call in calls)


def test_the_length_of_checks_is_ragged_and_has_more_blocks_than_a_token_selects() -> None:
    for name in ("llama3_8b", "tiny", "nsa_paper"):
        of = load_spec(name)
        tokens = check_tokens(of)
        assert tokens % 16 == 0 and tokens % 32 and tokens < 2048
        assert of.selection is not None and tokens / of.selection.block > min(of.selection.count, 30)
    assert check_tokens(small_spec("win")) == 976


# Inputs


def test_packed_inputs_are_sequences_end_to_end() -> None:
    of = small_spec("cmp win", phi="external")
    bucket = Bucket(512, 1, True)
    found = bucket_inputs(of, bucket, "correlated", device="cpu")
    assert found.q.shape == (512, 2, 16) and found.do.shape[0] == 512
    assert found.cu_seqlens is not None and found.cu_seqlens.dtype == torch.int32
    assert found.cu_seqlens.diff().tolist() == list(bucket.lengths)
    assert found.k_cmp is not None and found.k_cmp.shape == (512 // 4, 1, 16)


def test_a_batch_has_different_sequences_and_one_set_of_parameters() -> None:
    found = bucket_inputs(small_spec(phi="mlp"), Bucket(512, 4), "independent", device="cpu")
    assert found.q.shape == (4, 512, 2, 16) and not torch.equal(found.q[0], found.q[1])
    assert found.compression is not None and found.compression["key_weight_in"].shape[0] == 1


def test_indices_of_packed_sequences_are_each_sequences_own() -> None:
    of = small_spec("slc", indices="input", gate="none")
    bucket = Bucket(512, 1, True)
    found = bucket_inputs(of, bucket, "independent", device="cpu").indices
    assert found is not None
    start = 0
    for length in bucket.lengths:
        assert int(found[start : start + length].max()) == (length - 1) // 16
        start += length


def test_an_estimate_grows_with_what_is_compiled_and_timed() -> None:
    spaces = spaces_of(PROGRAM, H100, Bucket(65536), 16, ("forward", "backward"))
    compiler = FakeCompiler(Path(), "sm_90", (), Path(), None)
    answer = compiler.answer
    compiler.answer = lambda kernel, config: {**answer(kernel, config), "seconds": 2.0}  # type: ignore[method-assign]
    found = {Bucket(65536): select(spaces, compiler, H100, Bucket(65536), 976)}
    few = {bucket: each[:2] for bucket, each in found.items()}
    count = sum(len(each.candidates) for each in spaces)
    whole = estimate(found, EFFORTS["default"], 16)
    assert whole.compile_seconds == 2.0 * count and whole.wall_seconds == whole.gpu_seconds + 2.0 * count / 16
    assert estimate(few, EFFORTS["default"], 16).gpu_seconds < whole.gpu_seconds
    assert estimate(found, EFFORTS["quick"], 16).gpu_seconds < whole.gpu_seconds
