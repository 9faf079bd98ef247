"""Properties of every generated operator, whatever its numbers are: metamorphic relations and hygiene.

Each is a function of a `Trial` that returns rows of a report. `PROPERTIES` names them, and says to which specs and
cases they apply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from nsa_gen.verification import relations
from nsa_gen.verification.calls import Call, call_package
from nsa_gen.verification.cases import FORWARD_ONLY, Case, inputs_of
from nsa_gen.verification.checking import bits_row, check_case, compare_result, comparison_row, written
from nsa_gen.verification.hygiene import ALLOCATOR_BYTES, GuardBands, measured, memory_bound, synchronises
from nsa_gen.verification.reference.alignment import LEARNED
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.gradients import truth_and_baseline
from nsa_gen.verification.reference.inputs import Inputs
from nsa_gen.verification.reference.oracle import argument_suffixes, padding_value
from nsa_gen.verification.report import Row

if TYPE_CHECKING:
    from nsa_gen.spec import Spec


SELECTING = ("slc", "joint")
"""Branches that attend to selected blocks."""
PADDING_ROWS = 37
"""Rows after the last sequence of a padded call: more than the smallest tile, and not a multiple of one."""


@dataclass(frozen=True)
class Trial:
    """A package, one call of it, and a way to make another spec's package (None: there is none)."""

    spec: Spec
    module: Any
    case: Case
    seed: int = 0
    device: str = "cpu"
    build: Callable[[Spec], Any] | None = None

    @property
    def parameters(self) -> OracleParameters:
        """The spec's parameters in the oracle's form."""
        return OracleParameters.from_spec(self.spec)

    @property
    def gradients(self) -> bool:
        """Whether the call has a backward pass."""
        return self.case.gradients and "backward" in self.spec.passes and self.case.kind not in FORWARD_ONLY

    def inputs(self, *, kind: str | None = None, shift: int = 0) -> Inputs:
        """The call's inputs. Another `kind`, or another `shift` of the seed, gives others of the same shapes."""
        return inputs_of(self.spec, replace(self.case, kind=kind or self.case.kind), self.seed + shift, self.device)

    def call(self, inputs: Inputs, *, gradients: bool | None = None) -> Call:
        """Call the package on `inputs`."""
        return call_package(self.module, inputs, self.gradients if gradients is None else gradients)


@dataclass(frozen=True)
class Property:
    """A property: its check, whether it applies to a spec and a case, and whether it needs a CUDA device."""

    check: Callable[[Trial], list[Row]]
    applies: Callable[[OracleParameters, Case], bool]
    cuda: bool = False


def agrees_with_the_oracle(trial: Trial) -> list[Row]:
    """Outputs, gradients and the selection are the oracle's, within the tolerances."""
    case = replace(trial.case, twice=False)
    return check_case(trial.module, trial.parameters, case, trial.inputs(), with_gradients=trial.gradients)


def future_has_no_influence(trial: Trial) -> list[Row]:
    """Rows up to a token have the same bits whatever comes after it; in the forward pass, even NaN."""
    p, inputs = trial.parameters, trial.inputs()
    keep = relations.kept(p, inputs)
    other = relations.mixed(inputs, trial.inputs(kind="gaussian", shift=1_000_003), keep)
    first = relations.past(trial.call(inputs), keep)
    rows = [bits_row(trial.case.label, "future", first, relations.past(trial.call(other), keep))]
    torn = relations.torn(other, keep)
    blind = {name: x for name, x in first.items() if not name.startswith("d")}
    found = relations.past(trial.call(torn, gradients=False), keep)
    return [*rows, bits_row(trial.case.label, "future of NaN", blind, found)]


def wide_enough_is_dense(trial: Trial) -> list[Row]:
    """If the selected blocks or the window hold every key, a branch is torch's causal attention."""
    p, inputs = trial.parameters, trial.inputs()
    call = trial.call(inputs, gradients=False)
    suffixes = argument_suffixes(p)
    rows = []
    for branch in dense_branches(p, trial.case):
        k, v = (getattr(inputs, f"{x}{suffixes[branch]}") for x in "kv")
        tokens = k.shape[1]
        plain = replace(
            p,
            compression_block=None,
            selection_block=None,
            index_dim=0,
            indices_given=False,
            window=tokens,
            sinks=(),
            joint=False,
            gate="none",
            shared_kv=True,
        )
        one = Inputs(q=inputs.q, do=inputs.do, k=k, v=v)
        exact, base = truth_and_baseline(plain, one, with_gradients=False)
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=k.device).tril()[tokens - inputs.q.shape[1] :]
        q64, k64, v64 = (x.double().transpose(1, 2) for x in (inputs.q, k, v))
        dense = functional.scaled_dot_product_attention(
            q64, k64, v64, attn_mask=seen, scale=p.scale, enable_gqa=True
        ).transpose(1, 2)
        truth = replace(exact, outputs=replace(exact.outputs, o_win=dense))
        comparison = compare_result(plain, one, "o_win", call.aux[f"o_{branch}"], truth, base)
        rows.append(comparison_row(trial.case.label, f"dense: o_{branch}", comparison))
    return rows


def packed_is_sequence_by_sequence(trial: Trial) -> list[Row]:
    """A packed batch gives the same results as its sequences separately."""
    p, inputs = trial.parameters, trial.inputs()
    alone = [trial.call(one) for one in relations.sequences(p, inputs)]
    call = trial.call(inputs)
    return relations.near(trial.case.label, "packed", p, inputs, call.tensors(), relations.joined(p, inputs, alone))


def rows_behind_the_last_sequence_are_nothing(trial: Trial) -> list[Row]:
    """Rows after the last sequence of a packed batch change nothing. They hold NaN here, which is not read.

    Their output is 0, their lse -inf and their blocks -1.
    """
    p, inputs = trial.parameters, trial.inputs()
    expected = trial.call(inputs).tensors()
    found, behind = relations.cut(trial.call(relations.padded(p, inputs, PADDING_ROWS)).tensors(), expected)
    nothing = {name: torch.full_like(x, padding_value(name)) for name, x in behind.items()}
    rows = relations.near(trial.case.label, "padded", p, inputs, found, expected)
    return [*rows, bits_row(trial.case.label, "padding", nothing, behind)]


def prefill_in_two_chunks_is_one(trial: Trial) -> list[Row]:
    """The first tokens alone, then the rest with all keys, give what one call gives.

    Gradients too: those of queries and gates are concatenated, those of keys and values are added.
    """
    p, inputs = trial.parameters, trial.inputs()
    parts = [trial.call(part).tensors() for part in relations.chunks(p, inputs)]
    whole = trial.call(inputs).tensors()
    kept = {name: x for name, x in whole.items() if name not in ("k_cmp", "v_cmp")}
    expected, rounded = relations.rejoined(parts, kept)
    return relations.near(trial.case.label, "chunks", p, inputs, kept, expected, rounded)


def batch_entries_are_alone(trial: Trial) -> list[Row]:
    """Reordering the entries of a batch only reorders the results. Sums over the batch are left out."""
    inputs = trial.inputs()
    turned = relations.of_tokens(inputs, lambda name, x: x.flip(0))
    found = _of_entries(trial, turned, lambda x: x.flip(0))
    return _as_in_another_batch(trial, "batch order", inputs, _of_entries(trial, inputs), found)


def neighbours_have_no_influence(trial: Trial) -> list[Row]:
    """The first entry of a batch has the same results whatever the other entries hold."""
    inputs, others = trial.inputs(), trial.inputs(kind="gaussian", shift=1_000_003)
    first = torch.arange(trial.case.batch, device=inputs.q.device) == 0

    def neighbours(name: str, x: Tensor) -> Tensor:
        other = getattr(others, name)
        return x if other is None else torch.where(first.view(-1, *(1,) * (x.dim() - 1)), x, other)

    before, after = (
        _of_entries(trial, each, lambda x: x[:1]) for each in (inputs, relations.of_tokens(inputs, neighbours))
    )
    alone = relations.of_tokens(inputs, lambda name, x: x[:1])
    return _as_in_another_batch(trial, "neighbours", alone, before, after)


def _of_entries(trial: Trial, inputs: Inputs, pick: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
    """The results of a call for each entry of the batch, or for those that `pick` selects."""
    found = trial.call(inputs).tensors()
    return {name: pick(x) for name, x in found.items() if not relations.is_gradient_of_parameters(name)}


def _as_in_another_batch(
    trial: Trial, title: str, inputs: Inputs, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> list[Row]:
    """Results of the same entries in two batches have the same bits.

    Sums over the tokens that selected a block are cut where the lists of all entries together fill a piece. The
    gradients of raw keys and values are therefore only as close as rounding allows.
    """
    p = trial.parameters
    summed = {name for name in first if relations.is_gradient_of_raw_keys(name) and p.selection_block is not None}
    exact = ({name: x for name, x in each.items() if name not in summed} for each in (first, second))
    rows = [bits_row(trial.case.label, title, *exact)]
    if summed:
        kept = {"indices", "counts", *summed}
        sums = ({name: x for name, x in each.items() if name in kept} for each in (first, second))
        rows += relations.near(trial.case.label, f"{title}: sums", p, inputs, *sums)
    return rows


def group_is_repeated_kv_heads(trial: Trial) -> list[Row]:
    """Repeating each KV head for every query head of its group gives the same outputs.

    If no selection depends on the group, the gradients are the same too: a KV head's are the sum of its copies'.
    """
    assert trial.build is not None
    p, inputs = trial.parameters, trial.inputs()
    module = trial.build(trial.spec.replace(heads={"query": p.query_heads, "kv": p.query_heads}))
    apart = relations.repeated(p, inputs)
    whole = comparable_without_groups(p)
    gradients = trial.gradients and whole
    call, other = trial.call(inputs, gradients=gradients), call_package(module, apart, gradients)
    kept = ["o"] if whole else []
    kept += [
        f"{x}_{branch}" for branch in p.branches for x in ("o", "lse") if branch not in SELECTING or p.indices_given
    ]
    kept += [f"d{name}" for name in call.gradients]
    expected, rounded = relations.regrouped(other, p.group, kept)
    rows = {name: call.tensors()[name] for name in kept}
    return relations.near(trial.case.label, "repeated KV heads", p, inputs, rows, expected, rounded)


def doubled_values_double_the_output(trial: Trial) -> list[Row]:
    """Doubling v doubles the outputs exactly.

    With the same gradient of the output, the gradients of v and of its compression's positions do not change, and all
    others double.
    """
    p, inputs = trial.parameters, trial.inputs()
    doubled = relations.changed(
        inputs, lambda name, x: 2 * x if name.split("_")[0] == "v" or name == "value_position" else x
    )
    half = inputs.q.dtype == torch.float16
    branches = [branch for branch in p.branches if branch != "cmp" or p.phi_value != "mlp"]
    # In float16, branches and gradients below the normal range are rounded differently. So are compressed values, and
    # the parts that add up to the output of selected blocks.
    linear = len(branches) == len(p.branches) and not half
    gradients = trial.gradients and linear
    first, second = (trial.call(each, gradients=gradients).tensors() for each in (inputs, doubled))
    rounded = (*SELECTING, "cmp") if half and relations.has_subnormal(first.get("v_cmp")) else SELECTING if half else ()
    names = [f"o_{branch}" for branch in branches if branch not in rounded] + (["o"] if linear else [])
    before = {name: relations.normal(first[name]) for name in names}
    after = {name: second[name] for name in names}
    expected = {name: torch.where(x == 0, after[name], 2 * x) for name, x in before.items()}
    rows = [bits_row(trial.case.label, "doubled v", expected, after)]
    if gradients:
        slopes = {name: x for name, x in first.items() if relations.is_gradient(name)}
        # The alignment loss does not depend on values.
        same = {f"d{name}" for name in LEARNED}
        wanted = {n: x if relations.is_gradient_of_values(n) or n in same else 2 * x for n, x in slopes.items()}
        found = {name: second[name] for name in slopes}
        rows.append(bits_row(trial.case.label, "doubled v: gradients", *relations.not_tiny(wanted, found)))
    return rows


def same_inputs_same_bits(trial: Trial) -> list[Row]:
    """Two equal calls, forward and backward, have the same bits."""
    p, inputs = trial.parameters, trial.inputs()
    first, second = (written(p, inputs, trial.call(inputs).tensors()) for _ in range(2))
    return [bits_row(trial.case.label, "repeated", first, second)]


def writes_only_its_own(trial: Trial) -> list[Row]:
    """Nothing is written outside allocated tensors, and what is read there (NaN) reaches no result."""
    p, inputs = trial.parameters, trial.inputs()
    free = written(p, inputs, trial.call(inputs).tensors())
    with GuardBands() as guard:
        call = trial.call(inputs)
    damage = "; ".join(guard.damage())
    row = Row(trial.case.label, "guard bands", "bits", float(bool(damage)), 0.0, not damage, damage)
    return [row, bits_row(trial.case.label, "within guard bands", free, written(p, inputs, call.tensors()))]


def host_never_waits(trial: Trial) -> list[Row]:
    """The public call, forward and backward, does not synchronise the host with the GPU."""
    inputs = trial.inputs()
    waited = synchronises(lambda: call_package(trial.module, inputs, trial.gradients, poisoned=False))
    return [Row(trial.case.label, "synchronisation", "bits", float(bool(waited)), 0.0, not waited, waited)]


def memory_is_bounded(trial: Trial) -> list[Row]:
    """Forward and backward allocate no more memory on a CUDA device than `memory_bound` says."""
    inputs = trial.inputs()
    hidden = None if trial.spec.compression is None else trial.spec.compression.phi.hidden
    bound = memory_bound(trial.parameters, inputs, hidden)
    trial.call(inputs)  # what only the first call allocates does not count
    found = measured(trial.module, inputs, trial.gradients)
    rows = []
    for name, used, most in zip(("forward", "backward"), found, (bound.forward, bound.backward), strict=True):
        most += ALLOCATOR_BYTES
        rows.append(Row(trial.case.label, f"memory: {name}", "bytes", float(used), float(most), used <= most))
    return rows if trial.gradients else rows[:1]


def a_choice_given_again_gives_the_same_bits(trial: Trial) -> list[Row]:
    """Blocks that a call selected, given to the operator, give the same results; given twice, the same bits.

    The first two calls may add up in another order: only an operator that selects local blocks itself can leave them
    to the window's kernels.
    """
    p, inputs = trial.parameters, trial.inputs()
    first = trial.call(inputs)
    given = replace(inputs, indices=first.aux["indices"], counts=first.aux["counts"])
    calls = [trial.call(given) for _ in range(2)]
    rows = relations.near(trial.case.label, "replay", p, inputs, calls[0].tensors(), first.tensors())
    return [*rows, bits_row(trial.case.label, "replay again", *(call.tensors() for call in calls))]


def dense_branches(p: OracleParameters, case: Case) -> list[str]:
    """The branches that see every past key in this case."""
    if isinstance(case.tokens, tuple):
        return []
    keys = case.tokens if case.tokens_kv is None else case.tokens_kv
    found = []
    if p.selection_block is not None and not p.indices_given and keys <= p.selection_count * p.selection_block:
        found.append("slc")
    if p.window is not None and keys <= p.window:
        found.append("win")
    if p.joint and found:
        found = ["joint"]
    return [branch for branch in found if branch not in p.sinks]


def comparable_without_groups(p: OracleParameters) -> bool:
    """Whether no selection sums over a group, because repeated KV heads have no groups."""
    return p.selection_block is None or p.indices_given


def _chosen(p: OracleParameters, case: Case) -> bool:
    """The operator selects blocks."""
    return p.selection_block is not None and not p.indices_given and _quiet(p, case)


def _several(p: OracleParameters, case: Case) -> bool:
    """The batch has several entries."""
    return not isinstance(case.tokens, tuple) and case.batch > 1


def _packed(p: OracleParameters, case: Case) -> bool:
    return isinstance(case.tokens, tuple) and any(case.tokens) and _quiet(p, case)


def _divisible(p: OracleParameters, case: Case) -> bool:
    """There is more than one query, as many as keys, and some branch reads raw keys."""
    square = case.tokens_kv is None or case.tokens_kv == case.tokens
    several = not isinstance(case.tokens, tuple) and case.tokens > 1
    return several and square and bool(argument_suffixes(p)) and _quiet(p, case)


def _grouped(p: OracleParameters, case: Case) -> bool:
    few = p.group > 1 and p.query_heads <= 8
    return few and _quiet(p, case) and (comparable_without_groups(p) or p.branches[0] == "cmp")


def _quiet(p: OracleParameters, case: Case) -> bool:
    """The inputs have no NaN."""
    return case.kind != "nan"


def _always(p: OracleParameters, case: Case) -> bool:
    return True


PROPERTIES: dict[str, Property] = {
    "oracle": Property(agrees_with_the_oracle, _always),
    "future": Property(future_has_no_influence, _quiet),
    "dense": Property(wide_enough_is_dense, lambda p, case: _quiet(p, case) and bool(dense_branches(p, case))),
    "packed": Property(packed_is_sequence_by_sequence, _packed),
    "padded": Property(rows_behind_the_last_sequence_are_nothing, _packed),
    "chunks": Property(prefill_in_two_chunks_is_one, _divisible),
    "batch": Property(batch_entries_are_alone, _several),
    "neighbours": Property(neighbours_have_no_influence, _several),
    "groups": Property(group_is_repeated_kv_heads, _grouped),
    "doubled": Property(doubled_values_double_the_output, _quiet),
    "bits": Property(same_inputs_same_bits, _always),
    "replay": Property(a_choice_given_again_gives_the_same_bits, _chosen),
    "guards": Property(writes_only_its_own, _always),
    "waiting": Property(host_never_waits, _always, cuda=True),
    "memory": Property(memory_is_bounded, _always, cuda=True),
}
"""Every property by a short name."""
