"""Every check that needs a GPU. Those that Triton's interpreter can do run at tiny sizes with NSA_GEN_TEST_DEVICE=cpu.

pytest -m gpu --gpu-report report.jsonl          all of it; with pytest-xdist, -n 6 runs six tests at a time
pytest tests/gpu -k "soak" ...                   drawn specs for NSA_GEN_SOAK_SECONDS in each of NSA_GEN_SOAK_WORKERS
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import pytest

from nsa_gen.lowering import lower
from nsa_gen.rendering import import_package
from nsa_gen.spec import load_spec, shipped_specs
from nsa_gen.verification import OracleParameters
from tests.gpu import (
    correctness,
    examples,
    far,
    far_specs,
    hygiene,
    inference,
    long,
    pytorch,
    reference_fla,
    repeats,
    sanitizer,
    training,
    tuner_faults,
)
from tests.gpu.common import expect_ok, save
from tests.gpu.device import DEVICE, SEED
from tests.gpu.support import package_of, variant
from tests.gpu.test_hopper import having, needs_hopper

CPU = DEVICE == "cpu"
ON_A_GPU = pytest.mark.skipif(CPU, reason="the interpreter cannot do this")
DTYPES = ("float16", "float32") if CPU else ("bfloat16", "float16", "float32")
SPECS = tuple(shipped_specs())
RUNNABLE = tuple(name for name in SPECS if not CPU or load_spec(name).dtype != "bfloat16")
"""Specs that run in their own dtype: the interpreter multiplies bfloat16 wrongly."""
CASES = [(spec, dtype) for spec in SPECS for dtype in DTYPES]
LENGTHS = (1, 9, 31) if CPU else (1, 31, 63, 65, 511, 2049, 8192)
PACKED = () if CPU else ((700, 0, 1, 2049, 63), (1, 0, 511, 65, 0))
"""Packed batches beside verify's own: with sequences longer than a window, and than all selected blocks."""
EACH_SHIPPED, EACH_DRAWN, DRAWN_SPECS = (10, 8, 24) if CPU else (50, 64, 21)
"""Examples of a shipped spec in a dtype and of a drawn one, and how many of these: 2000 and more in all."""
EXAMPLE_SEEDS = 100_000
"""Seeds between the first ones of two tests."""
REPEATS: tuple[int, tuple[Any, ...]] = (3, (19, (9, 0, 1, 5))) if CPU else (200, (4096, (1500, 0, 1, 2595)))
HYGIENE: tuple[Any, ...] = (19, (9, 0, 1, 5)) if CPU else ((1500, 0, 1, 2595), 4096, 16384)
FAR_LIMIT = 2**12 if CPU else 2**31
"""Elements beyond which a tensor is far."""
FAR_DTYPE = "float16" if CPU else "bfloat16"
SCENARIOS, SCENARIO_TESTS = (2, 1) if CPU else (2, 4)
SOAK_SECONDS = float(os.environ.get("NSA_GEN_SOAK_SECONDS", "120"))
SOAK_WORKERS = int(os.environ.get("NSA_GEN_SOAK_WORKERS", "1"))
SOAK_SEED = 1_000_000_000
"""The first seed of a soak's specs, far from those of the examples."""
MISCOMPILED = {
    # ptxas 12.8 lost the address of a product's operand within a branch of the key-major forward.
    "wide": """\
version: 2
name: wide
heads: {query: 21, kv: 3}
head_dim: {qk: 192, v: 24}
dtype: bfloat16
compression: {block: 28, stride: 4, phi: mean}
selection: {block: 1024, count: 3, local: 0, pool: max}
combine: {gate: given}
passes: [forward]
""",
    # Triton 3.6 returns no tuple that holds None, which the table of a contiguous cache is.
    "codes": """\
version: 2
name: codes
heads: {query: 64, kv: 4}
head_dim: 128
dtype: bfloat16
compression: {block: 32, stride: 16, phi: mean}
selection: {block: 64, count: 16, initial: 1, local: 2}
window: {size: 512}
cache: {dtype: e4m3}
passes: [forward, decode]
""",
}
"""Specs whose kernels compiled and were wrong on a GPU, or did not compile for one, where the interpreter was right."""
FAULTS = ("illegal access", "hang", "wrong", "out of memory", "crash")
RUNS = ("worker killed", "run killed", "two tuners", "read-only cache", "full disk")
"""What goes wrong for the tuner: a candidate, or the run."""


@pytest.mark.gpu(seconds=900)
@pytest.mark.parametrize(("spec", "dtype"), CASES)
def test_a_spec_is_verified_at_every_length_and_packed(spec: str, dtype: str) -> None:
    check = {"lengths": LENGTHS, "packed": PACKED, "device": DEVICE, "seed": SEED}
    found = expect_ok(correctness.verify_job, spec=spec, dtype=dtype, **check)
    compared = {row["quantity"] for row in found["rows"]}
    assert {"alignment_loss", "dq_idx", "dk_idx"} <= compared or not OracleParameters.from_spec(load_spec(spec)).aligned


@ON_A_GPU
@pytest.mark.gpu(seconds=900)
@pytest.mark.parametrize(("spec", "dtype"), [case for case in CASES if case[1] != "float32"])
def test_a_spec_is_verified_with_every_kernel_for_hopper(spec: str, dtype: str) -> None:
    needs_hopper()
    check = {"lengths": (1, 65, 200, 1300), "packed": PACKED, "device": DEVICE, "seed": SEED + 1, "hopper": True}
    expect_ok(correctness.verify_job, spec=spec, dtype=dtype, **check)


@ON_A_GPU
@pytest.mark.gpu(alone=True)
def test_rows_of_a_long_sequence_agree_with_the_oracle() -> None:
    request = {"spec": "llama3_8b", "dtype": "bfloat16", "tokens": 131072, "rows": 48}
    expect_ok(long.long_job, device=DEVICE, seed=SEED, **request)


@pytest.mark.gpu(seconds=1200)
@pytest.mark.parametrize("number", range(SCENARIO_TESTS))
@pytest.mark.parametrize("spec", [name for name in RUNNABLE if "decode" in load_spec(name).passes])
def test_caches_go_through_scenarios_and_graphs(spec: str, number: int) -> None:
    request = {"first": number * SCENARIOS, "count": SCENARIOS, "graphs": number == 0}
    expect_ok(inference.inference_job, spec=spec, device=DEVICE, seed=SEED, **request)


@pytest.mark.gpu(seconds=1800)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_examples_of_a_shipped_spec(number: int) -> None:
    spec, dtype = CASES[number]
    first = SEED + EXAMPLE_SEEDS * (number + 1)
    request = {"spec": spec, "spec_seed": None, "dtype": dtype, "count": EACH_SHIPPED, "device": DEVICE}
    expect_ok(examples.examples_job, seed=first, **request)


@pytest.mark.gpu(seconds=1800)
@pytest.mark.parametrize("number", range(DRAWN_SPECS))
def test_examples_of_a_drawn_spec(number: int) -> None:
    first = SEED + EXAMPLE_SEEDS * (len(CASES) + number + 1)
    request = {"spec": None, "spec_seed": SEED + number, "dtype": DTYPES[number % len(DTYPES)], "count": EACH_DRAWN}
    expect_ok(examples.examples_job, seed=first, device=DEVICE, **request)


@ON_A_GPU
@pytest.mark.gpu(seconds=1800)
@pytest.mark.parametrize("name", MISCOMPILED)
def test_examples_of_what_a_compiler_got_wrong(name: str) -> None:
    request = {"spec": MISCOMPILED[name], "spec_seed": None, "dtype": None, "count": EACH_DRAWN}
    expect_ok(examples.examples_job, seed=SEED, device=DEVICE, **request)


@pytest.mark.gpu(alone=True, seconds=SOAK_SECONDS + 600)
@pytest.mark.parametrize("worker", range(SOAK_WORKERS))
def test_a_soak_of_drawn_specs(worker: int) -> None:
    request = {"worker": worker, "seconds": SOAK_SECONDS, "per_spec": 4 if CPU else 30}
    expect_ok(examples.soak_job, device=DEVICE, seed=SOAK_SEED + SEED, **request)


@pytest.mark.gpu(seconds=900)
@pytest.mark.parametrize("spec", RUNNABLE)
def test_repeated_calls_keep_their_bits(spec: str) -> None:
    repeats_, shapes = REPEATS
    expect_ok(repeats.repeats_job, spec=spec, shapes=shapes, repeats=repeats_, device=DEVICE, seed=SEED)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", RUNNABLE)
def test_calls_do_not_wait_nor_allocate_too_much_nor_write_beside_their_tensors(spec: str) -> None:
    expect_ok(hygiene.hygiene_job, spec=spec, shapes=HYGIENE, device=DEVICE, seed=SEED)


@pytest.mark.gpu(alone=True)
@pytest.mark.parametrize("name", far_specs.APART)
def test_arguments_may_lie_far_apart(name: str) -> None:
    request = {"spec": far_specs.APART[name].replace("DTYPE", FAR_DTYPE), "tokens": far_specs.APART_TOKENS[DEVICE]}
    expect_ok(far.far_apart_job, batch=3, limit=FAR_LIMIT, device=DEVICE, seed=SEED, **request)


@pytest.mark.gpu(alone=True)
@pytest.mark.parametrize("name", far_specs.ALONG)
def test_tensors_may_have_more_than_two_to_the_31_elements(name: str) -> None:
    each = far_specs.ALONG[name]
    request = {"lengths": each.few if CPU else each.lengths, "packed": each.packed, "shares": 2}
    spec = each.spec.replace("DTYPE", FAR_DTYPE)
    expect_ok(far.far_along_job, spec=spec, limit=FAR_LIMIT, device=DEVICE, seed=SEED, **request)


@ON_A_GPU
@pytest.mark.skipif(sanitizer.program() is None, reason="compute-sanitizer is not installed")
@pytest.mark.gpu(alone=True, seconds=1800)
@pytest.mark.parametrize("name", sanitizer.SPECS)
@pytest.mark.parametrize("tool", sanitizer.SHAPES)
def test_the_sanitizer_finds_no_race_and_no_access_out_of_bounds(tool: str, name: str) -> None:
    expect_ok(sanitizer.watched_touch, tool=tool, spec=name, seconds=1700.0)


@ON_A_GPU
@pytest.mark.gpu(alone=True)
@pytest.mark.parametrize("fault", [*FAULTS, *RUNS])
def test_the_tuner_survives(fault: str) -> None:
    expect_ok(tuner_faults.tuner_fault_job, fault=fault)


@pytest.mark.gpu
@pytest.mark.parametrize("check", pytorch.CHECKS)
@pytest.mark.parametrize("spec", [name for name in pytorch.SPECS if name in RUNNABLE])
def test_pytorchs_tools_work_with_a_package(spec: str, check: str) -> None:
    if CPU and check in pytorch.ONLY_ON_A_GPU:
        pytest.skip("needs a GPU")
    meaning = load_spec(spec)
    module = import_package(package_of(meaning))
    save({"check": check, "detail": pytorch.CHECKS[check](pytorch.Subject(meaning, module, DEVICE))})


@pytest.mark.gpu(alone=True)
def test_a_small_model_trains_eagerly_and_compiled_with_equal_losses() -> None:
    expect_ok(training.training_job, device=DEVICE, seed=SEED)


@ON_A_GPU
@pytest.mark.skipif(bool(reference_fla.missing()), reason=f"not importable: {reference_fla.missing()}")
@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(reference_fla.CONFIGURATIONS)))
def test_the_front_end_agrees_with_flash_linear_attention(number: int) -> None:
    each = reference_fla.CONFIGURATIONS[number]
    theirs = getattr(importlib.import_module("fla.ops.nsa"), each.against)
    row = reference_fla.compare(each, theirs, DEVICE, SEED)
    save({"case": each.name, **row})
    assert row["ok"], row


def test_hoppers_kernels_are_compared_for_every_spec_and_dtype_that_has_them() -> None:
    dtypes = ("bfloat16", "float16", "float32")
    has = {(spec, dtype) for spec in SPECS for dtype in dtypes if lower(variant(spec, dtype)).hopper}
    names = having("hopper_banded_forward")
    assert has == {(name, dtype) for name in names for dtype in ("bfloat16", "float16")} and "llama3_8b" in names
