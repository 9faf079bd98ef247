"""`verify`: hold a generated package against the oracle, case by case; `assert_verified` for tests of a project."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nsa_gen.lowering import lower
from nsa_gen.verification.cases import Case, default_cases
from nsa_gen.verification.coverage import coverage
from nsa_gen.verification.examples import (
    SECONDS,
    Build,
    Example,
    ExampleResult,
    Shrunk,
    drawn_example,
    reproduction,
    require_example,
    shrink,
)
from nsa_gen.verification.inference import SCENARIOS, Scenario, fixed_scenarios, scenario_of_seed
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.report import ExampleRecord, Reproduction, Row, VerifyReport, environment
from nsa_gen.verification.running import CaseCheck, InProcess, Isolated, Runner, ScenarioCheck
from nsa_gen.verification.schedules import Variation, decode_variation

if TYPE_CHECKING:
    from nsa_gen.lowering.plan import Plan
    from nsa_gen.spec import Spec

INTERPRETER_KV_HEADS = 2


def verify(
    spec: Spec,
    *,
    package: Any = None,
    lengths: Sequence[int] | None = None,
    packed: bool = True,
    passes: Sequence[str] | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    batch: int = 2,
    quick: bool = False,
    examples: int | None = None,
    example: str | None = None,
    source: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Verify the operator of a spec: outputs, branches, gradients, selection of blocks and determinism.

    The package is generated into a temporary folder and imported, unless `package` is one already (a module, or the
    folder of a generated package of exactly this spec). `lengths` replaces the default sequence
    lengths, which are near the spec's boundaries. `packed=False` skips the packed batch. `passes` defaults to the
    spec's. `dtype` replaces the spec's. On the CPU, bfloat16 is replaced by float32, and more than two KV heads by two
    with the same group (without `package`); the notes say so. `device` defaults to the GPU if there is one. `progress`
    is called with a line before each case.

    Without `lengths`, the cases run every schedule of the package and recompute every set of branches. The report's
    `coverage` says which values were used, and what was skipped. A package that is not yet a module runs in its own
    process. If an access out of bounds ends this process, its case is a failed row, and the other cases still run.

    `quick` runs three small calls, forward and backward, and one cache. It takes less than a minute on a CPU.

    With `examples`, that many random calls replace the fixed ones, each with one of the properties of
    `properties.PROPERTIES`; example i depends only on seed + i. With `example`, a line such as
    "oracle: B=2 T=21 spread", it is that one, with inputs of `seed`. A failed report has the smallest failing example
    that could be found and the command that repeats it (`reproduction`, and the notes), with `source`, the spec's file,
    where it is given.

    Memory that was freed before a call is poisoned, so that a result that was never written shows as NaN. An exception
    of the package is a failed row. Raises ValueError for a dtype or pass that is not available.
    """
    started = time.perf_counter()
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    original = spec
    spec, notes = adapt(spec, interpreted=where.type == "cpu", dtype=dtype, fixed=package is not None)
    wanted = _passes(spec, passes)
    drawing = examples is not None or example is not None
    if drawing:
        _refuse_with_examples(examples, example, lengths, wanted == tuple(spec.passes))
    if quick and (drawing or lengths is not None):
        raise ValueError("quick: expected False with lengths, examples or an example, which name the calls themselves")
    blank = VerifyReport(
        name=spec.name,
        digest=original.digest(),
        dtype=spec.dtype,
        heads=(spec.heads.query, spec.heads.kv),
        passes=wanted,
        seed=seed,
        environment=environment(where),
        notes=notes,
    )
    tell = progress or (lambda line: None)
    with (
        tempfile.TemporaryDirectory(prefix="nsa_gen_verify_") as folder,
        closing(_runner(spec, package, Path(folder), where)) as runner,
    ):
        if not drawing:
            cases, more = default_cases(
                spec,
                interpreted=where.type == "cpu",
                lengths=lengths,
                packed=packed,
                batch=batch,
                gradients="backward" in wanted,
                quick=quick,
            )
            report = _run_cases(replace(blank, notes=(*notes, *more)), spec, runner, cases, where.type, quick, tell)
        elif example is not None:
            told = require_example(spec, example, seed, where.type)
            tell(f"{spec.name}: seed {seed}: {told.text}")
            report = _with_examples(blank, [_run(runner, spec, told)])
        else:
            report, failed = _run_examples(blank, spec, runner, examples or 0, where.type, tell)
            if failed is not None:
                vary = {"vary_spec": package is None, "seconds": SECONDS, "progress": progress}
                found = shrink(spec, failed, where.type, functools.partial(_run, runner), **vary)
                report = _with_smallest(report, found, original, spec, where.type, dtype, source)
    return replace(report, seconds=time.perf_counter() - started)


def _run_cases(
    report: VerifyReport,
    spec: Spec,
    runner: Runner,
    cases: Sequence[Case],
    device: str,
    quick: bool,
    tell: Callable[[str], None],
) -> VerifyReport:
    """The report of fixed cases, and of scenarios of a cache where decode is among its passes."""
    labels = [case.label for case in cases]
    rows: list[Row] = []
    for number, case in enumerate(cases, 1):
        tell(f"{spec.name}: case {number} of {len(cases)}: {case.label}")
        rows += runner.run(CaseCheck(case, report.seed + number, "backward" in report.passes))
    program = lower(spec)
    scenarios = _scenarios(spec, program, report.seed, device) if "decode" in report.passes else []
    scenarios = scenarios[:1] if quick else scenarios
    for number, (scenario, way) in enumerate(scenarios, 1):
        tell(f"{spec.name}: cache {number} of {len(scenarios)}, seed {scenario.seed}: {scenario.text}")
        found = runner.run(ScenarioCheck(scenario, way))
        labels += dict.fromkeys(row.case for row in found)
        rows += found
    covered = coverage(program, cases, scenarios, interpreted=device == "cpu", passes=report.passes)
    return replace(report, cases=tuple(labels), rows=tuple(rows), coverage=covered)


def _run(runner: Runner, spec: Spec, example: Example) -> ExampleResult:
    return ExampleResult(example, tuple(runner.run(example, spec)))


def _run_examples(
    report: VerifyReport, spec: Spec, runner: Runner, count: int, device: str, tell: Callable[[str], None]
) -> tuple[VerifyReport, ExampleResult | None]:
    """The report of drawn examples, and the first that failed."""
    results: list[ExampleResult] = []
    for number in range(count):
        example = drawn_example(spec, report.seed + number, device)
        tell(f"{spec.name}: example {number + 1} of {count}, seed {example.seed}: {example.text}")
        results.append(_run(runner, spec, example))
    return _with_examples(report, results), next((result for result in results if not result.ok), None)


def _with_examples(report: VerifyReport, results: Sequence[ExampleResult]) -> VerifyReport:
    return replace(
        report,
        cases=tuple(result.example.text for result in results),
        rows=tuple(row for result in results for row in result.rows),
        examples=tuple(ExampleRecord(each.example.seed, each.example.text, each.ok) for each in results),
    )


def _with_smallest(
    report: VerifyReport,
    found: Shrunk,
    original: Spec,
    spec: Spec,
    device: str,
    dtype: str | None,
    source: str | None,
) -> VerifyReport:
    """The report with the smallest failing example, the command that repeats it, and a note that tells both."""
    example = found.result.example
    same = found.spec is spec
    command = reproduction(
        original if same else found.spec, example, device, dtype if same else None, source if same else None
    )
    smallest = Reproduction(command, example.text, example.seed, found.spec.resolved_yaml(), found.tries)
    failed = [each for each in report.examples if not each.ok]
    note = (
        f"{len(failed)} of {len(report.examples)} examples failed, the first {failed[0].example} of seed "
        f"{failed[0].seed}; the smallest found in {found.tries} tries is {example.text} "
        f"(wrong: {', '.join(sorted(found.result.failing))}); to repeat it: {command}"
    )
    return replace(report, reproduction=smallest, notes=(*report.notes, note))


def _scenarios(spec: Spec, program: Plan, seed: int, device: str) -> list[tuple[Scenario, Variation | None]]:
    """The fixed scenarios of a cache, each with tile sizes and splits of its own, and those of seeds from `seed` on."""
    fixed = fixed_scenarios(OracleParameters.from_spec(spec))
    ways = [decode_variation(program, number, device == "cpu") for number in range(len(fixed))]
    drawn = [scenario_of_seed(spec, number, device) for number in range(seed, seed + SCENARIOS[device])]
    return [*zip(fixed, ways, strict=True), *((scenario, None) for scenario in drawn)]


def _refuse_with_examples(
    examples: int | None, example: str | None, lengths: Sequence[int] | None, own_passes: bool
) -> None:
    if examples is not None and example is not None:
        raise ValueError("example: expected None with examples, which are drawn; pass one of the two")
    if examples is not None and examples < 1:
        raise ValueError(f"examples: expected at least 1, got {examples}")
    if lengths is not None:
        raise ValueError("lengths: expected None with examples, which have lengths of their own")
    if not own_passes:
        raise ValueError("passes: expected the spec's own with examples")


def adapt(spec: Spec, *, interpreted: bool, dtype: str | None, fixed: bool) -> tuple[Spec, tuple[str, ...]]:
    """The spec to verify in the place of `spec`, and notes on what differs. `fixed`: heads may not change."""
    changes: dict[str, Any] = {}
    notes: list[str] = []
    if dtype is not None and dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {dtype!r}")
    if interpreted and dtype == "bfloat16":
        raise ValueError(
            "dtype: expected float32 or float16 on the CPU, got bfloat16; Triton's interpreter gets it wrong"
        )
    if dtype is None and interpreted and spec.dtype == "bfloat16":
        dtype = "float32"
        notes.append("dtype: the spec's bfloat16 was replaced by float32: Triton's interpreter gets bfloat16 wrong")
    elif dtype is not None and dtype != spec.dtype:
        notes.append(f"dtype: the spec's {spec.dtype} was replaced by {dtype}, as asked")
    if dtype is not None and dtype != spec.dtype:
        changes |= {"dtype": dtype, "fp32_precision": "ieee"}
    if interpreted and not fixed and spec.heads.kv > INTERPRETER_KV_HEADS:
        group = spec.heads.query // spec.heads.kv
        changes["heads"] = {"query": group * INTERPRETER_KV_HEADS, "kv": INTERPRETER_KV_HEADS}
        notes.append(
            f"heads: {spec.heads.query} query and {spec.heads.kv} KV heads were reduced to "
            f"{group * INTERPRETER_KV_HEADS} and {INTERPRETER_KV_HEADS}: the interpreter is slow"
        )
    if fixed and "dtype" in changes:
        raise ValueError(
            f"package: its dtype is {spec.dtype}, which cannot be verified as {dtype} here; pass no package"
        )
    if not changes:
        return spec, tuple(notes)
    return spec.replace(**changes), tuple(notes)


def _passes(spec: Spec, passes: Sequence[str] | None) -> tuple[str, ...]:
    wanted = tuple(spec.passes) if passes is None else tuple(passes)
    for name in wanted:
        if name not in spec.passes:
            raise ValueError(f"passes: expected some of {', '.join(spec.passes)} (the spec's), got {name!r}")
    return wanted


def _runner(spec: Spec, package: Any, folder: Path, device: torch.device) -> Runner:
    """What runs the package: this process if it is a module, one of its own if it is generated or lies in a folder."""
    if package is not None and not isinstance(package, str | os.PathLike):
        return InProcess(spec, package, device, builder(folder))
    from nsa_gen.rendering import generate

    return Isolated(spec, generate(spec, folder) if package is None else Path(package), folder, device)


def builder(folder: Path) -> Build:
    """Generates and imports packages of other specs below `folder`."""
    built: dict[str, Any] = {}

    def build(spec: Spec) -> Any:
        from nsa_gen.rendering import generate, import_package

        digest = spec.digest()
        if digest not in built:
            built[digest] = import_package(generate(spec, folder / digest))
        return built[digest]

    return build


def assert_verified(package_or_spec: Any, **options: Any) -> VerifyReport:
    """Verify a spec or a generated package; AssertionError with every failure where something is wrong.

    Takes a `Spec`, a spec's file or shipped name, the folder of a generated package, or the imported package itself
    (both have their spec.yaml). `options` are those of `verify`. Returns the report.
    """
    spec, package = _meaning(package_or_spec)
    report = verify(spec, package=package, **options)
    if not report.ok:
        lines = [f"{report.name} ({report.digest}), seed {report.seed}, on {report.environment.device}:"]
        lines += [f"  {row.case}: {row.quantity}: {row.complaint}" for row in report.failures]
        raise AssertionError("\n".join([*lines, *(f"note: {note}" for note in report.notes)]))
    return report


def _meaning(given: Any) -> tuple[Spec, Any]:
    from nsa_gen.spec import Spec, load_spec

    if isinstance(given, Spec):
        return given, None
    if isinstance(given, str | os.PathLike):
        folder = Path(given)
        if folder.is_dir():
            return load_spec(folder / "spec.yaml"), folder
        return load_spec(given), None
    file = getattr(given, "__file__", None)
    if file is None or not hasattr(given, "nsa_attention"):
        raise TypeError(
            "package_or_spec: expected a Spec, a spec's file or name, or a generated package (a folder or a module), "
            f"got {type(given).__name__}"
        )
    return load_spec(Path(file).parent / "spec.yaml"), given
