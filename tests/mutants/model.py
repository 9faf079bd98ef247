"""What a mutant is, how it is made of a generated package, and the check that has to catch it."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from nsa_gen.rendering import import_package
from nsa_gen.spec import Spec
from nsa_gen.verification import Inputs, Row
from nsa_gen.verification.calls import call_package
from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.inference import Scenario, run_scenario
from nsa_gen.verification.reference.gradients import References
from nsa_gen.verification.relations import padded
from nsa_gen.verification.schedules import Variation, varied
from tests.mutants.far import far_apart
from tests.support import Operator, inputs_of, operator_of_spec, small_spec

# Every spec has a scale that is not 1/sqrt(Dk), so that a forgotten one shows.
SPECS: dict[str, Spec] = {
    "window": small_spec("win", gate="none", scale=0.37),
    # The last query that sees the last key of a tile of 16 begins a tile of 16.
    "window of 18": small_spec("win", gate="none", scale=0.37, window=18),
    "selected": small_spec("slc", gate="none", scale=0.37, indices="input"),
    # Rows of products that no head fills, and blocks of two tiles of keys.
    "grouped": small_spec(
        "slc", gate="none", scale=0.37, indices="input", group=3, kv_heads=2, block=32, count=2, dims=(32, 16)
    ),
    "compressed": small_spec("cmp", gate="none", scale=0.37),
    "weighted": small_spec("cmp", gate="none", scale=0.37, phi="weighted", position=("learned", "learned")),
    # Heads of a group that no two programs share evenly.
    "shares": small_spec("cmp", gate="none", scale=0.37, phi="external", group=3, kv_heads=2),
    "mlp": small_spec("cmp", gate="none", scale=0.37, phi="mlp", phi_value="linear"),
    "forced": small_spec("cmp slc", gate="none", scale=0.37, count=4, initial=1, local=2),
    "free": small_spec("cmp slc", gate="none", scale=0.37, count=3, initial=0, local=0),
    "means": small_spec("slc", gate="none", scale=0.37, initial=0, scores="mean"),
    # Blocks of two tiles of tokens.
    "means of 32": small_spec("slc", gate="none", scale=0.37, initial=0, scores="mean", block=32),
    "means of heads": small_spec(
        "slc", gate="none", scale=0.37, initial=0, scores="mean", scope="head", group=3, kv_heads=2
    ),
    "means of all heads": small_spec(
        "slc", gate="none", scale=0.37, initial=0, scores="mean", scope="all", group=2, kv_heads=2
    ),
    "indexer": small_spec("slc", gate="none", scale=0.37, initial=0, index=16, kv_heads=2),
    "indexer for all heads": small_spec("slc", gate="none", scale=0.37, initial=0, index=16, scope="all", kv_heads=2),
    "cached indexer": small_spec(
        "slc", gate="none", scale=0.37, initial=0, count=4, index=16, kv_heads=2, passes=("forward", "decode")
    ),
    "importance for all heads": small_spec(
        "cmp slc", gate="none", scale=0.37, initial=0, scope="all", group=2, kv_heads=2
    ),
    "maxima": small_spec("cmp slc", gate="none", scale=0.37, initial=0, local=0, pool="max"),
    "cached maxima": small_spec(
        "cmp slc", gate="none", scale=0.37, initial=0, local=0, pool="max", passes=("forward", "decode")
    ),
    "cached means of heads": small_spec(
        "slc",
        gate="none",
        scale=0.37,
        initial=0,
        scores="mean",
        scope="head",
        group=3,
        kv_heads=2,
        passes=("forward", "decode"),
    ),
    "cached means of all heads": small_spec(
        "slc",
        gate="none",
        scale=0.37,
        initial=0,
        scores="mean",
        scope="all",
        group=2,
        kv_heads=2,
        passes=("forward", "decode"),
    ),
    "scorer alone": small_spec("cmp slc", gate="none", scale=0.37, group=3, initial=0, local=0, output=False),
    "scorer alone, keys of each branch": small_spec(
        scale=0.37, initial=0, local=0, output=False, kv="per_branch", kv_heads=2
    ),
    "cached scorer alone": small_spec(
        scale=0.37, group=3, initial=0, local=0, output=False, kv="per_branch", passes=("forward", "decode")
    ),
    "many slots filled": small_spec("slc", gate="none", scale=0.37, group=1, count=67, local=2, scores="mean"),
    "full": small_spec(scale=0.37),
    "local": small_spec(scale=0.37, count=4, local=2, window=40),
    "sink": small_spec("win", scale=0.37, sink="learned"),
    "selected with a sink": small_spec("slc", gate="none", scale=0.37, indices="input", kv_heads=2, sink_slc="learned"),
    "cached sinks": small_spec(
        "slc win",
        gate="none",
        scale=0.37,
        kv_heads=2,
        scores="mean",
        sink="learned",
        sink_slc="learned",
        passes=("forward", "decode"),
    ),
    "joint": small_spec(
        "slc win", scale=0.37, indices="input", kv_heads=2, window=21, joint=True, sink_joint="learned"
    ),
    "cached joint": small_spec(
        "slc win",
        scale=0.37,
        kv_heads=2,
        scores="mean",
        window=21,
        joint=True,
        sink_joint="learned",
        passes=("forward", "decode"),
    ),
    "sink and local": small_spec(scale=0.37, count=4, local=2, window=40, sink="learned"),
    "cached sink": small_spec("win", gate="none", scale=0.37, kv_heads=2, sink="learned", passes=("forward", "decode")),
    "cached": small_spec(scale=0.37, passes=("forward", "decode")),
    "cached codes": small_spec(kv_heads=2, cache="e4m3", passes=("forward", "decode")),
    "cached means": small_spec(
        "slc", gate="none", scale=0.37, initial=0, count=4, scores="mean", passes=("forward", "decode")
    ),
    "cached choice": small_spec("cmp slc", gate="none", scale=0.37, initial=0, local=0, passes=("forward", "decode")),
}

Alteration = Literal["", "counts", "sharp", "far", "padded"]
"""What a check does to the inputs of its kind: counts one below the slots in use are passed; queries are 600 times
larger, so that probabilities underflow; rows lie so far apart that their offsets pass 2^31 elements (then the result is
compared, bit by bit, with that of the same numbers close together); 9 rows behind the last packed sequence hold NaN."""

QueryMajor = Literal["", "forward", "both"]
"""What of selected attention goes token by token: nothing, the forward, or the forward and dq. The interpreter's table
chooses block by block."""


@dataclass(frozen=True)
class Check:
    """One call of a spec's package, compared with the oracle as `nsa_gen.verification.verify` does it.

    `chunk_tokens` is the most tokens that a chunk of the inverted index may have; with `local_in_window` the window's
    kernels do the selected branch's local blocks. `recompute` are branches whose forward the backward runs again,
    `values` tunables (kernel, name, value) other than the interpreter's.
    """

    spec: str
    tokens: int | tuple[int, ...]
    tokens_kv: int | None = None
    kind: str = "gaussian"
    gradients: bool = False
    twice: bool = False
    altered: Alteration = ""
    seed: int = 0
    batch: int = 1
    query_major: QueryMajor = ""
    chunk_tokens: int | None = None
    local_in_window: bool = False
    recompute: tuple[str, ...] = ()
    values: tuple[tuple[str, str, int], ...] = ()

    @property
    def case(self) -> Case:
        """The case of `verify` that this is."""
        way = Variation(0, self.values, self.recompute) if self.values or self.recompute else None
        return Case(self.tokens, self.tokens_kv, self.kind, self.batch, self.twice, variation=way)

    @property
    def label(self) -> str:
        """A short name, such as "window: T=23, forward and backward"."""
        passes = "forward and backward" if self.gradients else "forward"
        shown = {"counts": ", fewer counts", "sharp": ", sharp", "far": ", rows far apart", "padded": ", padded"}
        more = shown.get(self.altered, "")
        batch = f"B={self.batch} " if self.batch > 1 else ""
        schedule = {"both": ", query-major", "forward": ", query-major forward", "": ""}[self.query_major]
        if self.chunk_tokens is not None:
            schedule += f", chunks of {self.chunk_tokens}"
        if self.local_in_window:
            schedule += ", local blocks in the window"
        schedule += "".join(f", {name} {value}" for _, name, value in self.values)
        if self.recompute:
            schedule += f", {'+'.join(self.recompute)} recomputed"
        twice = ", twice" if self.twice else ""
        call = replace(self.case, variation=None).label
        return f"{self.spec}: {batch}{call}{more}{schedule}, {passes}{twice}"

    @contextmanager
    def schedule(self, module: ModuleType) -> Iterator[None]:
        """Inside, `module` computes selected attention by the schedule of this check."""
        values = {"KEY_MAJOR_FORWARD": 0} if self.query_major else {}
        if self.query_major == "both":
            values["KEY_MAJOR_DQ"] = 0
        if self.chunk_tokens is not None:
            values["CHUNK_TOKENS"] = self.chunk_tokens
        if self.local_in_window:
            values["LOCAL_IN_WINDOW"] = 1
        with module.configs.override("selected_attention", **values) if values else nullcontext():
            yield

    def inputs(self, op: Operator) -> Inputs:
        """The inputs of the call; `far` ones are spread out by `run`."""
        made = inputs_of(op, self.tokens, tokens_kv=self.tokens_kv, kind=self.kind, seed=self.seed, batch=self.batch)
        if self.altered == "counts":
            assert made.indices is not None
            made = replace(made, counts=((made.indices >= 0).sum(-1) - 1).clamp(min=0).to(torch.int32))
        if self.altered == "sharp":
            made = replace(made, q=600.0 * made.q)
        if self.altered == "padded":
            made = padded(op.parameters, made, 9)
        return made


@dataclass(frozen=True)
class CacheCheck:
    """What happens to a cache of a spec's package, compared with the oracle after every step that attends."""

    spec: str
    scenario: Scenario
    values: tuple[tuple[str, str, int], ...] = ()

    @property
    def label(self) -> str:
        """A short name, such as "cached: B=1 contiguous: fill 100, decode 1"."""
        values = "".join(f", {name} {value}" for _, name, value in self.values)
        return f"{self.spec}: {self.scenario.text}{values}"


@dataclass(frozen=True)
class Edit:
    """Text of one file of a generated package, which occurs exactly `times` times, and what takes its place."""

    file: str
    old: str
    new: str
    times: int = 1


@dataclass(frozen=True)
class Mutant:
    """A mistake: what is wrong in words, the edits that make it, the check that catches it.

    `killed_by` are quantities that must fail in the check, and by which the mutant is caught; others may fail too.
    """

    name: str
    mistake: str
    check: Check | CacheCheck
    killed_by: tuple[str, ...]
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Equivalent:
    """An edit that looks like a mistake and changes no result, and why."""

    name: str
    edit_in_words: str
    reason: str
    check: Check
    edits: tuple[Edit, ...]


class StaleMutantError(Exception):
    """An edit does not fit the package any more: its template changed, and the mutant has to follow."""


def edited(mutant: Mutant | Equivalent, texts: dict[str, str]) -> dict[str, str]:
    """The files that the mutant changes, by name, of a package whose files are `texts`.

    Raises StaleMutantError where a file is missing or the text to replace is not there as often as it should be.
    """
    changed: dict[str, str] = {}
    for edit in mutant.edits:
        text = changed.get(edit.file, texts.get(edit.file))
        if text is None:
            raise StaleMutantError(f"{mutant.name}: the package of {mutant.check.spec} has no {edit.file}")
        found = text.count(edit.old)
        if found != edit.times:
            raise StaleMutantError(
                f"{mutant.name}: {edit.file}: expected this text {edit.times} times, found it {found} times; "
                f"bring the mutant in step with the template:\n{edit.old}"
            )
        changed[edit.file] = text.replace(edit.old, edit.new)
    return changed


def source_of(folder: Path) -> dict[str, str]:
    """The modules of a package, by path within it."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}


@functools.cache
def _workspace() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="nsa_gen_mutants_")


def build(mutant: Mutant | Equivalent) -> ModuleType:
    """Copy the generated package of the mutant's spec, make its edits, import the copy."""
    op = operator_of_spec(SPECS[mutant.check.spec])
    changed = edited(mutant, source_of(op.folder))
    folder = Path(_workspace().name) / mutant.name
    shutil.copytree(op.folder, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for name, text in changed.items():
        (folder / name).write_text(text)
    return import_package(folder)


def run(check: Check | CacheCheck, module: ModuleType | None = None) -> list[Row]:
    """The comparisons of a check, one a quantity, of `module` or else of the package as it is generated."""
    op = operator_of_spec(SPECS[check.spec])
    module = module or op.module
    if isinstance(check, CacheCheck):
        with varied(module, Variation(0, check.values) if check.values else None):
            return run_scenario(op.spec, module, check.scenario, "cpu")
    inputs, references = _inputs(check)
    with check.schedule(module):
        if check.altered == "far":
            return _compare_far(check, module, inputs)
        return check_case(
            module, op.parameters, check.case, inputs, with_gradients=check.gradients, references=references
        )


@functools.lru_cache(maxsize=4)
def _inputs(check: Check) -> tuple[Inputs, References]:
    """The inputs of a check, and what the oracle has said of them: mutants that follow each other often share both."""
    return check.inputs(operator_of_spec(SPECS[check.spec])), References()


def bits(check: Check, module: ModuleType | None = None) -> dict[str, Tensor]:
    """Every output and gradient of a check's call, of `module` or else of the package as it is generated."""
    op = operator_of_spec(SPECS[check.spec])
    module = module or op.module
    with check.schedule(module), varied(module, check.case.variation):
        return call_package(module, check.inputs(op), check.gradients, recompute=check.recompute).tensors()


def failures(check: Check | CacheCheck, module: ModuleType | None = None) -> dict[str, str]:
    """What is wrong with each quantity that fails in a check; {} where all is well."""
    return {
        row.quantity: row.problem or f"{row.measure} error {row.error:.2e}, bound {row.bound:.2e}"
        for row in run(check, module)
        if not row.ok
    }


def _compare_far(check: Check, module: ModuleType, inputs: Inputs) -> list[Row]:
    near = call_package(module, inputs, False).tensors()
    with far_apart({name: x for name in ("q", "k", "v") if (x := getattr(inputs, name)) is not None}) as spread:
        far = call_package(module, inputs.replace_differentiable({**inputs.differentiable(), **spread}), False)

    def row(name: str, x: Tensor) -> Row:
        differing = float((x != near[name]).sum())
        return Row(check.label, name, "bits", differing, 0.0, differing == 0)

    return [row(name, x) for name, x in far.tensors().items()]
