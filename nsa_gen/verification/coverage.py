"""What a run's fixed cases exercise of the ways to run a package, and what they leave out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nsa_gen.verification.cases import Case, start_remainders
from nsa_gen.verification.inference import PAGE_SIZES, Scenario
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.report import Coverage
from nsa_gen.verification.schedules import LAUNCH_OPTIONS, Variation

if TYPE_CHECKING:
    from nsa_gen.lowering.plan import Plan

ALWAYS_LEFT_OUT = (
    "the operator's steps called one by one",
    f"{' and '.join(LAUNCH_OPTIONS)} other than those in force",
)
"""What the fixed cases never exercise. The tuner checks the launch options and tile sizes that it uses."""
BUDGET_LEFT_OUT = "workspace_bytes, which makes chunks as CHUNK_TOKENS does"


def coverage(
    program: Plan,
    cases: Sequence[Case],
    scenarios: Iterable[tuple[Scenario, Variation | None]],
    *,
    interpreted: bool,
    passes: Sequence[str],
) -> Coverage:
    """What calls and scenarios exercise together: tunables by kernel, recomputed branches, offsets and page sizes."""
    scenarios = list(scenarios)
    ways = [case.variation for case in cases if case.variation is not None]
    exercised: dict[str, tuple[int | str, ...]] = {}
    left_out = [f"the {name} pass" for name in program.spec.passes if name not in passes]
    single: list[str] = []
    for name, legal in _tunables(program, passes):
        kernel, key = name.split(".")
        values = {v for way in (*ways, *(way for _, way in scenarios if way)) for k, n, v in way.values
                  if (k, n) == (kernel, key)}  # fmt: skip
        if interpreted:
            values.add(program.defaults["interpreter"][kernel].mapping()[key])
        if len(values) > 1 or len(legal) == 1:
            exercised[name] = tuple(sorted(values or legal))
        else:
            single.append(name)
    if single:
        left_out.append(f"values other than those in force of {', '.join(single)}")
    packed = [case.tokens for case in cases if isinstance(case.tokens, tuple)]
    for name, done, missing in (
        _recomputed(program, ways, passes),
        _remainders(OracleParameters.from_spec(program.spec), packed),
        _pages([scenario for scenario, _ in scenarios], passes),
    ):
        if done:
            exercised[name] = done
        left_out += [missing] if missing else []
    if program.selected:
        left_out.append(BUDGET_LEFT_OUT)
    if "decode" in passes:
        left_out.append("layers, layer, pages and out of the cache and of decode")
    return Coverage(exercised, (*left_out, *ALWAYS_LEFT_OUT), tuple(way.text for way in ways))


def _tunables(program: Plan, passes: Sequence[str]) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Every tunable of the schedules, and of the kernels that the passes run, as kernel.NAME with its legal values."""
    for decision in program.decisions:
        for tunable in decision.tunables:
            yield f"{decision.name}.{tunable.name}", tunable.values
    for kernel in program.kernels:
        if kernel.whole and kernel.direction in passes:
            for tunable in kernel.tunables:
                if tunable.name not in LAUNCH_OPTIONS:
                    yield f"{kernel.name}.{tunable.name}", tunable.values


Found = tuple[str, tuple[int | str, ...], str]
"""What is counted, the values that were exercised, and a line for those that were not, or ""."""


def _recomputed(program: Plan, ways: Sequence[Variation], passes: Sequence[str]) -> Found:
    branches = program.spec.branches if "backward" in passes else ()
    every = ["+".join(each) for n in range(len(branches)) for each in itertools.combinations(branches, n + 1)]
    done = {"+".join(way.recompute) for way in ways}
    missing = [name for name in every if name not in done]
    line = f"recompute: {', '.join(missing)}" if missing else ""
    return "recompute", tuple(name for name in every if name in done), line


def _remainders(p: OracleParameters, packed: Sequence[tuple[int, ...]]) -> Found:
    stride = p.compression_stride
    if stride is None:
        return "packed offsets", (), "" if packed else "packed sequences"
    done = {remainder for tokens in packed for remainder in start_remainders(p, tokens)}
    missing = ", ".join(str(remainder) for remainder in range(stride) if remainder not in done)
    line = f"packed sequences that begin at tokens of remainder {missing} by the stride {stride}" if missing else ""
    return "packed offsets", tuple(sorted(done)), line


def _pages(scenarios: Sequence[Scenario], passes: Sequence[str]) -> Found:
    names = {None: "contiguous", **{size: str(size) for size in PAGE_SIZES}} if "decode" in passes else {}
    held = {scenario.page_size for scenario in scenarios}
    missing = [name for size, name in names.items() if size not in held]
    line = f"page_size: {', '.join(missing)}" if missing else ""
    return "page_size", tuple(name for size, name in names.items() if size in held), line
