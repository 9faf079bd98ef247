"""Compiling packages ahead of time for every architecture, with no GPU in sight."""

import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from nsa_gen.hardware import SHARED_TABLES, TABLES, UnknownGpuError, gpu_for_target
from nsa_gen.targets import Compilation, CompileReport, Resources, compile_spec, print_report
from nsa_gen.targets.compile import COMPILER, compiler_environment
from nsa_gen.targets.resources import excess, parse_amdgcn, parse_res_usage
from nsa_gen.workers import Worker, WorkerFailure

HERE = Path(__file__).parent
SAMPLE = HERE / "sample_package"
TROUBLED = HERE / "troubled_package"
H100 = gpu_for_target("sm_90")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def heard() -> list[tuple[int, int, str]]:
    return []


@pytest.fixture(scope="module")
def sample(cache: Path, heard: list[tuple[int, int, str]]) -> CompileReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # the caller's own choice must not reach the compiler
        return compile_spec(SAMPLE, jobs=1, cache_dir=cache, progress=lambda *said: heard.append(said))


@pytest.fixture(scope="module")
def troubled(cache: Path) -> CompileReport:
    kernels = ("wide", "spilling", "broken", "misfit", "deadly", "sound")
    return compile_spec(TROUBLED, ["sm_90", "sm_120", "gfx942"], jobs=2, cache_dir=cache, passes=kernels)


@pytest.fixture
def worker(cache: Path) -> Iterator[Worker]:
    opening = {"package": str(TROUBLED), "tokens": 4096, "batch": 2, "passes": ["endless", "sound"]}
    one = Worker(COMPILER, compiler_environment(cache), opening)
    yield one
    one.close()


def find(report: CompileReport, kernel: str, target: str) -> Compilation:
    (row,) = (row for row in report.rows if (row.kernel, row.target) == (kernel, target))
    return row


def test_every_kernel_compiles_for_all_architectures_with_tables_of_their_own(sample: CompileReport) -> None:
    assert sample.ok, [row.reason for row in sample.rows]
    assert tuple(dict.fromkeys(row.target for row in sample.rows)) == TABLES
    for target in TABLES:
        assert {row.kernel for row in sample.rows if row.target == target} == {"scores_kernel", "scale_kernel"}


def test_registers_spills_and_sizes_are_read_for_every_row(sample: CompileReport) -> None:
    for row in sample.rows:
        assert row.resources is not None
        assert row.resources.unread == ""
        assert row.resources.registers is not None and 0 < row.resources.registers <= 255
        assert row.resources.spill_bytes == 0
        assert row.resources.binary_bytes > 500
        assert row.seconds > 0


def test_a_kernel_with_a_product_of_tiles_uses_shared_memory_and_an_elementwise_one_none(sample: CompileReport) -> None:
    for target in TABLES:
        scores = find(sample, "scores_kernel", target).resources
        assert scores is not None and scores.shared_memory > 0
    assert all(
        row.resources.shared_memory == 0 for row in sample.rows if row.resources and row.kernel == "scale_kernel"
    )


def test_equal_launches_are_compiled_once_and_the_row_names_both_calls(sample: CompileReport) -> None:
    assert find(sample, "scores_kernel", "sm_90").variants == ("batched", "packed")
    assert [row.variants for row in sample.rows if (row.kernel, row.target) == ("scale_kernel", "sm_90")] == [
        ("batched",),
        ("packed",),
    ]


def test_the_package_chooses_its_tiles_for_each_architecture(sample: CompileReport) -> None:
    assert find(sample, "scores_kernel", "sm_90").constants == {"KEY_BLOCK": 64}
    assert find(sample, "scores_kernel", "gfx942").constants == {"KEY_BLOCK": 32}


def test_threads_count_the_devices_own_warp_size(sample: CompileReport) -> None:
    nvidia, amd = (find(sample, "scores_kernel", target).resources for target in ("sm_90", "gfx942"))
    assert nvidia is not None and amd is not None
    assert (nvidia.threads, amd.threads) == (128, 256)


def test_progress_is_told_of_every_kernel(sample: CompileReport, heard: list[tuple[int, int, str]]) -> None:
    total = len(sample.rows)
    assert [said[:2] for said in heard] == [(done, total) for done in range(1, total + 1)]
    assert heard[0][2] == "scores_kernel sm_80"


def test_a_second_run_finds_the_machine_code_and_says_so(sample: CompileReport, cache: Path) -> None:
    again = compile_spec(SAMPLE, ["sm_90"], jobs=1, cache_dir=cache)
    assert not any(row.cached for row in sample.rows)
    assert all(row.cached for row in again.rows)
    before = [row.resources for row in sample.rows if row.target == "sm_90"]
    assert [row.resources for row in again.rows] == before


def test_an_architecture_that_shares_a_table_is_compiled_for_all_the_same(tmp_path: Path) -> None:
    report = compile_spec(SAMPLE, SHARED_TABLES, jobs=1, cache_dir=tmp_path, passes=["forward"], variants=["batched"])
    assert [(row.target, row.reason) for row in report.rows] == [(target, "") for target in SHARED_TABLES]
    compiled = {
        re.findall(r"^\.target (sm_\d+)", path.read_text(), re.MULTILINE)[0] for path in tmp_path.rglob("*.ptx")
    }
    assert compiled == SHARED_TABLES.keys()


def test_only_the_passes_asked_for_are_compiled(sample: CompileReport, cache: Path) -> None:
    forward = compile_spec(SAMPLE, ["sm_90"], jobs=1, cache_dir=cache, passes=["forward"])
    assert [row.kernel for row in forward.rows] == ["scores_kernel"]


def test_a_block_beyond_the_devices_shared_memory_fails_there_and_only_there(troubled: CompileReport) -> None:
    assert find(troubled, "wide_kernel", "sm_90").ok
    for target in ("sm_120", "gfx942"):
        row = find(troubled, "wide_kernel", target)
        limit = gpu_for_target(target).shared_memory_per_block
        assert not row.ok and row.resources is not None
        assert row.resources.shared_memory > limit
        assert f"{row.resources.shared_memory:,} bytes" in row.reason and f"{limit:,}" in row.reason


def test_spills_are_flagged_and_do_not_fail_a_kernel(troubled: CompileReport) -> None:
    row = find(troubled, "spilling_kernel", "sm_90")
    assert row.ok and row.spills_heavily
    assert row.resources is not None and row.resources.spill_bytes is not None and row.resources.spill_bytes >= 128
    assert not find(troubled, "wide_kernel", "sm_90").spills_heavily


def test_a_kernel_that_does_not_compile_fails_with_the_compilers_reason(troubled: CompileReport) -> None:
    row = find(troubled, "broken_kernel", "gfx942")
    assert not row.ok and row.resources is None
    assert "arange's range must be a power of 2" in row.reason
    assert "broken_kernel" in row.detail


def test_a_launch_that_does_not_fit_its_kernel_is_a_row_and_the_others_are_compiled(troubled: CompileReport) -> None:
    misfits = [row for row in troubled.rows if "the launch does not fit the kernel" in row.reason]
    assert {(row.kernel, row.target) for row in misfits} == {
        ("sound_kernel", target) for target in ("sm_90", "sm_120", "gfx942")
    }
    assert all("TypeError" in row.reason for row in misfits)


def test_a_kernel_that_ends_the_compiler_fails_and_the_next_one_compiles(troubled: CompileReport) -> None:
    for target in ("sm_90", "sm_120", "gfx942"):
        assert "was ended by SIGABRT" in find(troubled, "deadly_kernel", target).reason
        assert any(row.ok for row in troubled.rows if (row.kernel, row.target) == ("sound_kernel", target))


def test_a_kernel_that_never_finishes_is_given_up_and_the_next_one_compiles(worker: Worker) -> None:
    call = {"target": "sm_90", "packed": False}
    endless, sound = worker.ask({"do": "trace", **call}, 120)["launches"]
    with pytest.raises(WorkerFailure, match=r"hung: no sign of life for 0\.5 s \(in "):
        worker.ask({"do": "compile", **call, "key": endless["key"]}, 0.5)
    assert worker.ask({"do": "compile", **call, "key": sound["key"]}, 120)["registers"] > 0


def test_a_package_whose_launches_cannot_be_recorded_is_reported_with_the_reason(cache: Path) -> None:
    report = compile_spec(TROUBLED, ["sm_90"], jobs=1, cache_dir=cache, passes=["untraceable"])
    assert not report.ok
    assert [row.variants for row in report.rows] == [("batched",), ("packed",)]
    assert all("ValueError: heads: expected 4, got 3" in row.reason for row in report.rows)


@pytest.mark.parametrize("variant", ["batched", "packed"])
def test_one_of_the_calls_may_be_compiled_alone(sample: CompileReport, cache: Path, variant: str) -> None:
    report = compile_spec(SAMPLE, ["sm_90"], jobs=1, cache_dir=cache, variants=[variant])
    expected = {row.kernel for row in sample.rows if row.target == "sm_90" and variant in row.variants}
    assert report.ok and {row.kernel for row in report.rows} == expected
    assert {row.variants for row in report.rows} == {(variant,)}


@pytest.mark.parametrize(("variants", "got"), [([], "none"), (["padded"], "padded")])
def test_calls_that_do_not_exist_are_refused(variants: list[str], got: str) -> None:
    with pytest.raises(ValueError, match=f"variants: expected some of batched, packed, got {got}"):
        compile_spec(SAMPLE, ["sm_90"], variants=variants)


def test_a_package_that_launches_nothing_is_not_a_success(cache: Path) -> None:
    report = compile_spec(SAMPLE, ["sm_90"], jobs=1, cache_dir=cache, passes=[])
    assert not report.ok
    assert "launched no kernel" in report.rows[0].reason


def test_a_spec_is_generated_in_a_folder_that_is_gone_afterwards_and_says_which_passes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def generate(spec: SimpleNamespace, out_dir: Path) -> Path:
        made.append(Path(shutil.copytree(SAMPLE, out_dir / spec.name)))
        return made[-1]

    monkeypatch.setitem(sys.modules, "nsa_gen.rendering", SimpleNamespace(generate=generate))
    spec = SimpleNamespace(name="from_a_spec", passes=("backward",))
    report = compile_spec(spec, ["sm_90"], jobs=1, cache_dir=cache)
    assert report.ok and report.name == "from_a_spec"
    assert {row.kernel for row in report.rows} == {"scale_kernel"}
    assert len(made) == 1 and not made[0].exists()


def test_an_unknown_target_is_refused_before_anything_starts() -> None:
    with pytest.raises(UnknownGpuError, match="sm_75"):
        compile_spec(SAMPLE, ["sm_90", "sm_75"])


def test_a_folder_without_a_package_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"generated package's folder.*{tmp_path.name}"):
        compile_spec(tmp_path)


@pytest.mark.parametrize("argument", ["jobs", "tokens", "batch", "kernel_timeout"])
def test_a_number_that_is_not_positive_is_refused_by_name(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected a positive number, got 0"):
        compile_spec(SAMPLE, **{argument: 0})


def test_no_target_is_refused() -> None:
    with pytest.raises(ValueError, match="targets: expected at least one"):
        compile_spec(SAMPLE, [])


def test_the_report_is_json_with_its_verdicts(troubled: CompileReport) -> None:
    data = json.loads(json.dumps(troubled.to_json()))
    assert data["ok"] is False
    assert set(data["versions"]) == {"python", "torch", "triton"}
    row = next(row for row in data["rows"] if (row["kernel"], row["target"]) == ("wide_kernel", "sm_120"))
    assert row["ok"] is False
    assert row["resources"]["shared_memory"] > row["shared_memory_limit"] == 101_376


def test_a_piped_report_has_one_line_a_row_and_a_summary(troubled: CompileReport) -> None:
    out = io.StringIO()
    print_report(troubled, Console(file=out, width=40))
    lines = out.getvalue().splitlines()
    assert len(lines) == len(troubled.rows) + 2
    broken = next(line for line in lines if "broken_kernel" in line and "gfx942" in line)
    assert broken.startswith("FAIL") and "power of 2" in broken
    assert "wide_kernel on sm_120/gfx942" in lines[-1]
    assert f"{sum(row.ok for row in troubled.rows)} of {len(troubled.rows)} fit" in lines[-1]


USED = Resources(
    threads=128, registers=64, spill_bytes=0, shared_memory=1024, tensor_memory=0, binary_bytes=1, unread=""
)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"shared_memory": 232_449}, "shared memory: 232,449 bytes"),
        ({"tensor_memory": 513}, "tensor memory: 513 columns"),
        ({"threads": 2048}, "threads: 2,048"),
        ({"registers": 255, "threads": 512}, "registers: 255 x 512 threads = 130,560"),
    ],
)
def test_each_limit_of_the_device_is_checked(change: dict[str, int], word: str) -> None:
    assert excess(replace(USED, **change), gpu_for_target("sm_100")).startswith(word)


def test_a_block_exactly_at_the_limits_fits() -> None:
    assert excess(replace(USED, shared_memory=232_448, tensor_memory=512, registers=64, threads=1024), H100) == ""


def test_unknown_registers_are_not_taken_for_too_many() -> None:
    assert excess(replace(USED, registers=None, spill_bytes=None, unread="no tool"), H100) == ""


def test_registers_and_stack_are_read_from_what_cuobjdump_prints() -> None:
    printed = (
        "Resource usage:\n Common:\n  GLOBAL:0\n Function kernel:\n"
        "  REG:168 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:588 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    )
    assert parse_res_usage(printed) == (168, 24, "")


def test_registers_and_scratch_are_read_from_amd_assembly() -> None:
    text = "    .private_segment_fixed_size: 36\n    .sgpr_count:     22\n    .vgpr_count:     130\n"
    assert parse_amdgcn(text) == (130, 36, "")


@pytest.mark.parametrize("parse", [parse_res_usage, parse_amdgcn])
def test_what_cannot_be_read_is_none_with_the_reason_and_not_a_guess(parse) -> None:
    registers, spills, why = parse("nothing of the kind")
    assert registers is None and spills is None and why


def test_a_cache_that_cannot_be_written_is_a_warning_and_kernels_compile_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cache cannot be written"):
        report = compile_spec(SAMPLE, ["sm_90"], jobs=1, passes=["forward"])
    assert report.ok
