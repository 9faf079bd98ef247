"""`verify`: hold a generated package against the oracle, case by case."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nsa_gen.lowering import lower
from nsa_gen.verification.cases import default_cases
from nsa_gen.verification.coverage import coverage
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.inference import SCENARIOS, Scenario, fixed_scenarios, scenario_of_seed
from nsa_gen.verification.report import Row, VerifyReport, environment
from nsa_gen.verification.running import InProcess, Isolated, Runner
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
    """Verify the operator of a spec: outputs, branches, gradients, choice of blocks and determinism.

    The package is generated into a temporary folder and imported, unless `package` is one already (a module, or the
    folder of a generated package of exactly this spec). `lengths` replaces the sequence lengths, which otherwise lie
    around the spec's boundaries; `packed=False` leaves out the packed batch. `passes` defaults to the spec's. `dtype`
    replaces the spec's; on the CPU bfloat16 becomes float32 by itself, and more than two KV heads become two of the
    same group (without `package`); the notes say so. `device` defaults to the GPU where there is one. `progress` is
    called with a line before each case.

    Without `lengths` the cases run the package by every schedule that it has and recompute every set of branches;
    `coverage` of the report says with which values, and what was left out. A package that is no module yet runs in a
    process of its own: a read or write out of bounds that ends it is a failed row of its case, and the others are run.

    `quick` is three small calls, forward and backward, and one cache: a first look, within a minute on a CPU.

    With `examples`, that many random calls take the place of the fixed ones, each with one of the properties of
    `properties.PROPERTIES`; example i is drawn from seed + i alone. With `example`, a line such as
    "oracle: B=2 T=21 spread", it is that one, with inputs of `seed`. A failed report has the smallest failing example
    that could be found and the command that repeats it (`reproduction`, and the notes), with `source`, the spec's file,
    where it is given.

    Memory freed before each call is poisoned, so that a result nobody wrote shows as NaN; an exception of the package
    is a failed row. Raises ValueError for a dtype or pass that cannot be had.
    """
    started = time.perf_counter()
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    interpreted = where.type == "cpu"
    original = spec
    spec, notes = adapt(spec, interpreted=interpreted, dtype=dtype, fixed=package is not None)
    wanted = _passes(spec, passes)
    drawing = examples is not None or example is not None
    if drawing:
        _refuse_with_examples(examples, example, lengths, wanted == tuple(spec.passes))
    if quick and (drawing or lengths is not None):
        raise ValueError("quick: expected False with lengths, examples or an example, which name the calls themselves")
    with (
        tempfile.TemporaryDirectory(prefix="nsa_gen_verify_") as folder,
        closing(_runner(spec, package, Path(folder), where)) as runner,
    ):
        if drawing:
            from nsa_gen.verification.reporting import report_examples

            return report_examples(
                original,
                spec,
                runner,
                count=examples,
                text=example,
                seed=seed,
                device=where,
                dtype=dtype,
                source=source,
                vary_spec=package is None,
                notes=notes,
                progress=progress,
            )
        backward = "backward" in wanted
        cases, more = default_cases(
            spec,
            interpreted=interpreted,
            lengths=lengths,
            packed=packed,
            batch=batch,
            gradients=backward,
            quick=quick,
        )
        labels = [case.label for case in cases]
        rows: list[Row] = []
        for number, case in enumerate(cases, 1):
            if progress is not None:
                progress(f"{spec.name}: case {number} of {len(cases)}: {case.label}")
            rows += runner.case(case, seed + number, backward)
        program = lower(spec)
        scenarios = _scenarios(spec, program, seed, where.type) if "decode" in wanted else []
        scenarios = scenarios[:1] if quick else scenarios
        for number, (scenario, way) in enumerate(scenarios, 1):
            if progress is not None:
                progress(f"{spec.name}: cache {number} of {len(scenarios)}, seed {scenario.seed}: {scenario.text}")
            found = runner.scenario(scenario, way)
            labels += dict.fromkeys(row.case for row in found)
            rows += found
    return VerifyReport(
        name=spec.name,
        digest=original.digest(),
        dtype=spec.dtype,
        heads=(spec.heads.query, spec.heads.kv),
        passes=wanted,
        seed=seed,
        cases=tuple(labels),
        rows=tuple(rows),
        notes=(*notes, *more),
        seconds=time.perf_counter() - started,
        environment=environment(where),
        coverage=coverage(program, cases, scenarios, interpreted=interpreted, passes=wanted),
    )


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
    return type(spec).model_validate({**spec.model_dump(), **changes}), tuple(notes)


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


def builder(folder: Path) -> Callable[[Spec], Any]:
    """Generates and imports packages of other specs below `folder`."""
    built: dict[str, Any] = {}

    def build(spec: Spec) -> Any:
        from nsa_gen.rendering import generate, import_package

        digest = spec.digest()
        if digest not in built:
            built[digest] = import_package(generate(spec, folder / digest))
        return built[digest]

    return build
