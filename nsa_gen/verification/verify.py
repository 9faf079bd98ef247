"""`verify`: hold a generated package against the oracle, case by case."""

from __future__ import annotations

import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nsa_gen.verification.calls import Call, call_package
from nsa_gen.verification.cases import FORWARD_ONLY, Case, default_cases
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.gradients import Reference, References
from nsa_gen.verification.inputs import Inputs, make_inputs
from nsa_gen.verification.oracle import compressed_rows
from nsa_gen.verification.report import Environment, Row, VerifyReport
from nsa_gen.verification.schedules import other_schedules
from nsa_gen.verification.selection import NEGLIGIBLE, check_selection
from nsa_gen.verification.tolerance import FACTOR, Comparison, compare, unit_roundoff

if TYPE_CHECKING:
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

    With `examples`, that many random calls take the place of the fixed ones, each with one of the properties of
    `properties.PROPERTIES`; example i is drawn from seed + i alone. With `example`, a line such as
    "oracle: B=2 T=21 spread", it is that one, with inputs of `seed`. A failed report has the smallest failing example
    that could be found and the command that repeats it (`reproduction`, and the notes), with `source`, the spec's file,
    where it is given.

    Memory freed before each call is poisoned, so that a result nobody wrote shows as NaN. Raises ValueError for a
    dtype or pass that cannot be had, RuntimeError where the CPU is asked for and Triton is imported without its
    interpreter.
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
    cases, more = default_cases(spec, interpreted=interpreted, lengths=lengths, packed=packed, batch=batch)
    parameters = OracleParameters.from_spec(spec)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="nsa_gen_verify_") as folder:
        if interpreted and not hasattr(package, "nsa_attention"):
            _enable_interpreter()
        module = _module(spec, package, Path(folder))
        if drawing:
            from nsa_gen.verification.reporting import report_examples

            return report_examples(
                original,
                spec,
                module,
                count=examples,
                text=example,
                seed=seed,
                device=where,
                dtype=dtype,
                source=source,
                build=_builder(Path(folder)),
                vary_spec=package is None,
                notes=notes,
                progress=progress,
            )
        labels = tuple(case.label for case in cases)
        for number, case in enumerate(cases, 1):
            if progress is not None:
                progress(f"{spec.name}: case {number} of {len(cases)}: {case.label}")
            inputs = make_inputs(
                spec,
                batch=case.batch,
                tokens=case.tokens,
                tokens_kv=case.tokens_kv,
                dtype=getattr(torch, spec.dtype),
                device=where,
                seed=seed + number,
                kind=case.kind,  # type: ignore[arg-type]
            )
            try:
                gradients = "backward" in wanted and case.gradients and case.kind not in FORWARD_ONLY
                rows += check_case(module, parameters, case, inputs, with_gradients=gradients)
            except Exception as error:
                error.add_note(f"while verifying {spec.name}, {case.label}, seed {seed + number}")
                raise
        if "decode" in wanted:
            from nsa_gen.verification.inference import SCENARIOS, run_scenarios

            found = run_scenarios(spec, module, SCENARIOS[where.type], seed, where.type, progress)
            labels += tuple(dict.fromkeys(row.case for row in found))
            rows += found
    return VerifyReport(
        name=spec.name,
        digest=original.digest(),
        dtype=spec.dtype,
        heads=(spec.heads.query, spec.heads.kv),
        passes=wanted,
        seed=seed,
        cases=labels,
        rows=tuple(rows),
        notes=(*notes, *more),
        seconds=time.perf_counter() - started,
        environment=environment(where),
    )


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


def _enable_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if "triton" in sys.modules:
        raise RuntimeError(
            "device: the CPU needs Triton's interpreter, but Triton is imported without it; "
            "set TRITON_INTERPRET=1 before Python starts"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def _module(spec: Spec, package: Any, folder: Path) -> Any:
    """The package to verify: generated here, imported from a folder, or as given."""
    if package is not None and not isinstance(package, str | os.PathLike):
        return package
    from nsa_gen.rendering import generate, import_package

    return import_package(generate(spec, folder) if package is None else Path(package))


def _builder(folder: Path) -> Callable[[Spec], Any]:
    """Generates and imports packages of other specs below `folder`."""

    def build(spec: Spec) -> Any:
        from nsa_gen.rendering import generate, import_package

        return import_package(generate(spec, folder / spec.digest()))

    return build


def environment(device: torch.device) -> Environment:
    """The machine and versions a report was made with."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    gpu = driver = ""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        driver = f"hip {torch.version.hip}" if torch.version.hip else _nvidia_driver()
    return Environment(str(device), gpu, driver, torch.__version__, triton_version, platform.python_version())


def _nvidia_driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0].strip() if version.exists() else ""


# One case


def check_case(
    module: Any,
    parameters: OracleParameters,
    case: Case,
    inputs: Inputs,
    *,
    with_gradients: bool,
    references: References | None = None,
) -> list[Row]:
    """Every comparison of one call: one row a quantity. `references` saves work where only schedules differ."""
    if case.other_schedules:
        plain = replace(case, other_schedules=False)
        with other_schedules(module, inputs.q.device):
            rows = check_case(module, parameters, plain, inputs, with_gradients=with_gradients)
        return [replace(row, case=case.label) for row in rows]
    call = call_package(module, inputs, with_gradients)
    computed = parameters.selection_block is not None and not parameters.indices_given
    if computed and (problem := _misshapen_choice(parameters, inputs, call)):
        return [Row(case.label, "selection", "selection", math.inf, 1.0, False, problem)]
    chosen = (call.aux["indices"], call.aux["counts"]) if computed else (None, None)
    references = references or References()
    truth, base = references.of(parameters, inputs, chosen, with_gradients=with_gradients)

    # Logits hundreds of nats apart make another softmax of a rounding of q or k: there only the choice is compared.
    compared = () if case.kind == "abyss" else _outputs(call, truth)
    rows = [
        comparison_row(case.label, name, compare_output(parameters, name, call, truth, base, inputs))
        for name in compared
    ]
    if computed:
        rows.append(_selection_row(parameters, case, inputs, call, truth, base))
    for name, gradient in truth.gradients.items():
        comparison = compare(
            call.gradients[name],
            gradient,
            base.gradients[name],
            dtype=inputs.q.dtype,
            noise=truth.gradient_noise[name],
            drift=truth.gradient_drift[name],
            sources=drift_sources(parameters, inputs, f"d{name}"),
            tf32=parameters.tf32,
        )
        rows.append(comparison_row(case.label, f"d{name}", comparison))
    if case.twice:
        rows.append(_bits_row(case, call, call_package(module, inputs, with_gradients), parameters, inputs))
    return rows


def _misshapen_choice(p: OracleParameters, inputs: Inputs, call: Call) -> str:
    """What is wrong with the form of the indices and counts that a package returns, or ""."""
    lead = (*inputs.q.shape[:-2], p.kv_heads)
    for name, shape in (("indices", (*lead, p.selection_count)), ("counts", lead)):
        x = call.aux.get(name)
        if x is None:
            return f"{name}: missing from the auxiliary outputs"
        if x.dtype != torch.int32 or tuple(x.shape) != shape:
            return f"{name}: expected int32 of shape {shape}, got {x.dtype} of {tuple(x.shape)}"
    return ""


def _outputs(call: Call, truth: Reference) -> list[str]:
    """The floating-point outputs to compare: o, and what the oracle and the package's auxiliary outputs both name."""
    skipped = ("indices", "counts", "importance", "fingerprint", "o")
    return ["o", *(name for name in truth.outputs.tensors() if name not in skipped and name in call.aux)]


def drift_sources(p: OracleParameters, inputs: Inputs, name: str) -> int | None:
    """How many rows of independent errors a quantity's drift comes from, None where as many as it has rows.

    What depends on K_cmp and V_cmp shares their errors, over all the queries of their group; the gradients of phi's
    parameters are sums over the compressed blocks; and an error of a query's lse or delta is in its terms of every
    key's gradient.
    """
    queries = inputs.q.shape[:-1].numel() if name.startswith("d") else None
    if p.compression_block is None or p.external or name.endswith(("_slc", "_win")):
        return queries
    if inputs.cu_seqlens is not None:
        blocks = compressed_rows(p, inputs.cu_seqlens).numel() * p.kv_heads
    else:
        keys = inputs.k if inputs.k is not None else inputs.q
        blocks = keys.shape[0] * p.compressed_blocks(keys.shape[1]) * p.kv_heads
    return blocks if queries is None else min(blocks, queries)


def compare_output(
    parameters: OracleParameters, name: str, call: Call, truth: Reference, base: Reference, inputs: Inputs
) -> Comparison:
    """One output against the truth; of packed K_cmp and V_cmp only the rows that are blocks."""
    actual = call.tensors()[name]
    wanted, near = truth.outputs.tensors()[name], base.outputs.tensors()[name]
    noise, drift = truth.output_noise.get(name), truth.output_drift.get(name)
    if name in ("k_cmp", "v_cmp") and inputs.cu_seqlens is not None:
        kept = compressed_rows(parameters, inputs.cu_seqlens).to(actual.device)
        if actual.shape == wanted.shape:
            actual, wanted, near = actual[kept], wanted[kept], near[kept]
            noise, drift = (None if x is None else x[kept] for x in (noise, drift))
    lse = name.startswith("lse")
    comparison = compare(
        actual,
        wanted,
        near,
        dtype=inputs.q.dtype,
        noise=noise,
        drift=drift,
        sources=drift_sources(parameters, inputs, name),
        tf32=parameters.tf32,
        rows=not lse,
    )
    expected = torch.float32 if lse else inputs.q.dtype
    problem = "" if actual.dtype == expected else f"expected {expected}, got {actual.dtype}"
    return replace(comparison, problem=comparison.problem or problem)


def comparison_row(case: str, quantity: str, comparison: Comparison) -> Row:
    """A comparison as a row of a report: the measure that came nearest to its bound."""
    measures = {
        "row": (comparison.row_error, comparison.row_bound),
        "norm": (comparison.norm_error, comparison.norm_bound),
        "bias": (comparison.bias_error, comparison.bias_bound),
    }
    name = max(measures, key=lambda measure: measures[measure][0] / measures[measure][1])
    error, bound = measures[name]
    return Row(case, quantity, name, error, bound, comparison.ok, comparison.problem)


def _selection_row(
    p: OracleParameters, case: Case, inputs: Inputs, call: Call, truth: Reference, base: Reference
) -> Row:
    exact, near = truth.outputs.importance, base.outputs.importance
    assert exact is not None and near is not None
    off = ((near.double() - exact).abs() / exact.clamp(min=NEGLIGIBLE)).nan_to_num(0.0, 0.0, 0.0)
    worst = off.max().item() if off.numel() else 0.0
    tolerance = FACTOR * worst + 8 * unit_roundoff(torch.float32)
    tokens = None if inputs.k is None or inputs.cu_seqlens is not None else inputs.k.shape[1]
    found = check_selection(
        p,
        call.aux["indices"],
        call.aux["counts"],
        exact,
        tolerance=tolerance,
        fingerprint=truth.outputs.fingerprint,
        tokens=tokens,
        cu_seqlens=inputs.cu_seqlens,
    )
    return Row(case.label, "selection", "selection", found.shortfall, 1.0, found.ok, "; ".join(found.problems))


def _bits_row(case: Case, first: Call, second: Call, p: OracleParameters, inputs: Inputs) -> Row:
    """Elements that differ between two equal calls, padding between packed compressed blocks left out."""
    differing = 0
    other = second.tensors()
    for name, x in first.tensors().items():
        y = other[name]
        if name in ("k_cmp", "v_cmp") and inputs.cu_seqlens is not None:
            kept = compressed_rows(p, inputs.cu_seqlens).to(x.device)
            x, y = x[kept], y[kept]
        differing += int(((x != y) & ~((x != x) & (y != y))).sum())
    return Row(case.label, "determinism", "bits", float(differing), 0.0, differing == 0)
