"""The rules between fields of a spec: named predicates over field values by dotted path, each stated once.

The same list serves validation (`violations`) and the reference page.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]
"""Field values by dotted path; a record (``compression``) maps to whether it is present."""
Predicate = Callable[[Values], bool]


@dataclass(frozen=True, slots=True)
class Condition:
    """Where a rule applies: a predicate, and `text`, what it means on the reference page."""

    text: str
    predicate: Predicate

    def __call__(self, values: Values) -> bool:
        return self.predicate(values)


def _some_phi(v: Values, kind: str) -> bool:
    return v["compression"] and any(v[f"compression.phi.{side}"] == kind for side in ("key", "value"))


ALWAYS = Condition("always", lambda v: True)
VERSION_1 = Condition("version is 1", lambda v: v["version"] == 1)
TF32 = Condition("fp32_precision is tf32", lambda v: v["fp32_precision"] == "tf32")
COMPRESSED = Condition("there is compression", lambda v: v["compression"])
EXTERNAL = Condition("phi of keys or of values is external", lambda v: _some_phi(v, "external"))
MLP = Condition("phi of keys or of values is mlp", lambda v: _some_phi(v, "mlp"))
NO_MLP = Condition("there is compression, and no phi is mlp", lambda v: v["compression"] and not MLP(v))
GIVEN = Condition("the caller selects blocks", lambda v: v["selection"] and v["selection.indices"] == "input")
SELECTED = Condition("there is selection", lambda v: v["selection"])
COMPUTED = Condition(
    "the operator selects blocks itself", lambda v: v["selection"] and v["selection.indices"] == "computed"
)
BY_COMPRESSION = Condition(
    "the operator selects blocks itself, by scores: compression",
    lambda v: COMPUTED(v) and v["selection.scores"] == "compression",
)
BY_MEAN = Condition(
    "the operator selects blocks itself, by scores: mean", lambda v: COMPUTED(v) and v["selection.scores"] == "mean"
)
BY_INDEXER = Condition(
    "the operator selects blocks itself, by an indexer",
    lambda v: COMPUTED(v) and v["selection.scores"] == "indexer",
)
JOINT = Condition("branches are joint", lambda v: v["combine.joint"])
APART = Condition("version is 2 and no branches are joint", lambda v: v["version"] == 2 and not v["combine.joint"])
CACHED = Condition("there is cache", lambda v: v["cache"])
SCORED = Condition("blocks are selected by compressed scores", lambda v: v["compression"] and BY_COMPRESSION(v))

SCORER_ALONE = Condition("compression has no output", lambda v: v["compression"] and v["compression.output"] is False)

MOST_COMPRESSED_KEYS = 256
"""Most compressed keys that begin in a selection block: a tile of scores holds those of a block."""

SINCE_VERSION_2: Mapping[str, object] = {
    "compression.output": True,
    "selection.scores": "compression",
    "selection.pool": "sum",
    "selection.scope": "group",
    "selection.sink": "none",
    "window.sink": "none",
    "combine.joint": (),
    "combine.sink": "none",
}
"""Fields that version 2 adds, and the value that they have in every spec of version 1."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """One rule between fields.

    Attributes:
        id: a stable name for tests and documentation.
        holds: what must be true of the values.
        at: the field an error points at; if it is not written, the first that is among the others of `fields`.
        message: the error; ``{field}`` is replaced by that field's value.
        hint: how to mend it.
        when: the rule applies only where this is true.
        also: fields that an error may point at and that the message does not name.
    """

    id: str
    holds: Predicate
    at: str
    message: str
    hint: str = ""
    when: Condition = ALWAYS
    also: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields an error may point at."""
        return tuple(dict.fromkeys((self.at, *self.also, *re.findall(r"\{([a-z_.]+)\}", self.message))))

    def broken(self, values: Values) -> bool:
        """Whether the rule applies and does not hold; False when a value it needs is not known."""
        try:
            return self.when(values) and not self.holds(values)
        except KeyError:
            return False

    @property
    def summary(self) -> str:
        """`message` without values, for a page that explains the rule."""
        return re.sub(r"\{[a-z_.]+\}", "...", re.sub(r" \(\{[a-z_.]+\}\)", "", self.message))

    def explain(self, values: Values) -> str:
        """`message` with the values in their places."""
        return re.sub(r"\{([a-z_.]+)\}", lambda match: _shown(values.get(match[1], match[1])), self.message)


def _shown(value: object) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, (list, tuple)) else str(value)


def _needs_version_2(field: str, value: object) -> Constraint:
    return Constraint(
        id=f"{field.replace('.', '_')}_needs_version_2",
        when=VERSION_1,
        holds=lambda v: v[field] == value,
        at=field,
        message=f"{field} ({{{field}}}) is part of version 2 of the language, but version is {{version}}",
        hint="write version: 2",
    )


CONSTRAINTS: tuple[Constraint, ...] = (
    *(_needs_version_2(field, value) for field, value in SINCE_VERSION_2.items()),
    Constraint(
        id="cache_needs_version_2",
        when=VERSION_1,
        holds=lambda v: not v["cache"],
        at="cache",
        message="cache is part of version 2 of the language, but version is {version}",
        hint="write version: 2",
    ),
    Constraint(
        id="cache_needs_decode",
        when=CACHED,
        holds=lambda v: "decode" in v["passes"],
        at="cache",
        also=("passes",),
        message="cache is for decode, but passes do not include decode",
        hint="add decode to passes, or remove cache",
    ),
    Constraint(
        id="cache_holds_raw_keys",
        when=CACHED,
        holds=lambda v: v["selection"] or v["window"] or not EXTERNAL(v),
        at="cache",
        message="cache sets how raw keys and values are stored, but compression with phi: external alone stores none",
        hint="remove cache",
    ),
    Constraint(
        id="some_branch",
        holds=lambda v: v["compression"] or v["selection"] or v["window"],
        at="compression",
        message="at least one branch must be present: expected compression, selection or window, got none",
        hint="for example: window: {size: 512}",
    ),
    Constraint(
        id="groups_are_whole",
        holds=lambda v: v["heads.query"] % v["heads.kv"] == 0,
        at="heads.query",
        message="heads.query ({heads.query}) must be a multiple of heads.kv ({heads.kv})",
        hint="every key head serves the same number of query heads",
    ),
    Constraint(
        id="tf32_needs_float32",
        when=TF32,
        holds=lambda v: v["dtype"] == "float32",
        at="fp32_precision",
        message="tf32 needs float32 inputs, but dtype is {dtype}",
        hint="remove fp32_precision, or set dtype: float32",
    ),
    Constraint(
        id="stride_divides_compression_block",
        when=COMPRESSED,
        holds=lambda v: v["compression.block"] % v["compression.stride"] == 0,
        at="compression.stride",
        message="compression.stride ({compression.stride}) must divide compression.block ({compression.block})",
    ),
    Constraint(
        id="computed_selection_needs_compression",
        when=BY_COMPRESSION,
        holds=lambda v: v["compression"],
        at="selection",
        message="computed selection ranks blocks by the compressed scores, but there is no compression branch",
        hint="add compression, or set selection.indices: input, or selection.scores: mean with version: 2",
    ),
    Constraint(
        id="stride_divides_selection_block",
        when=SCORED,
        holds=lambda v: v["selection.block"] % v["compression.stride"] == 0,
        at="compression.stride",
        message="compression.stride ({compression.stride}) must divide selection.block ({selection.block})",
    ),
    Constraint(
        id="compressed_keys_of_a_block",
        when=SCORED,
        holds=lambda v: v["selection.block"] <= MOST_COMPRESSED_KEYS * v["compression.stride"],
        at="compression.stride",
        message="selection.block ({selection.block}) must be at most "
        f"{MOST_COMPRESSED_KEYS} times compression.stride ({{compression.stride}})",
        hint="the compressed keys of a block are scored together",
    ),
    Constraint(
        id="compression_block_fits_selection_block",
        when=SCORED,
        holds=lambda v: v["compression.block"] <= v["selection.block"],
        at="compression.block",
        message="compression.block ({compression.block}) must not exceed selection.block ({selection.block})",
    ),
    Constraint(
        id="forced_blocks_fit_count",
        when=COMPUTED,
        holds=lambda v: v["selection.initial"] + v["selection.local"] <= v["selection.count"],
        at="selection.count",
        message="selection.count ({selection.count}) must hold the forced blocks: "
        "initial ({selection.initial}) + local ({selection.local})",
        hint="count includes the forced blocks",
    ),
    Constraint(
        id="given_indices_force_nothing",
        when=GIVEN,
        holds=lambda v: v["selection.initial"] == 0 and v["selection.local"] == 0,
        at="selection.initial",
        also=("selection.local",),
        message="with indices: input the caller selects every block; initial and local would have no effect",
        hint="remove initial and local",
    ),
    Constraint(
        id="given_indices_are_not_scored",
        when=GIVEN,
        holds=lambda v: v["selection.scores"] == "compression",
        at="selection.scores",
        message="with indices: input nothing is scored; scores ({selection.scores}) would have no effect",
        hint="remove scores, or set selection.indices: computed",
    ),
    Constraint(
        id="pools_of_compressed_scores",
        when=SELECTED,
        holds=lambda v: v["selection.pool"] == "sum" or BY_COMPRESSION(v),
        at="selection.pool",
        message="selection.pool ({selection.pool}) applies to compressed probabilities only, but blocks are selected "
        "by indices: {selection.indices}, scores: {selection.scores}",
        hint="remove pool, or set scores: compression",
    ),
    Constraint(
        id="mean_scores_need_the_own_block",
        when=BY_MEAN,
        holds=lambda v: v["selection.local"] >= 1,
        at="selection.local",
        message="selection.local ({selection.local}) must be at least 1 with scores: mean, which ranks only the blocks "
        "before the query's own",
        hint="local: 1 is the query's own block",
    ),
    Constraint(
        id="index_scores_need_the_own_block",
        when=BY_INDEXER,
        holds=lambda v: v["selection.local"] >= 1,
        at="selection.local",
        message="selection.local ({selection.local}) must be at least 1 with an indexer, which ranks only the blocks "
        "before the query's own",
        hint="local: 1 is the query's own block",
    ),
    Constraint(
        id="index_scores_rank",
        when=BY_INDEXER,
        holds=lambda v: v["selection.initial"] + v["selection.local"] < v["selection.count"],
        at="selection.count",
        message="the indexer has nothing to rank, because all selection.count ({selection.count}) blocks are forced: "
        "initial ({selection.initial}) + local ({selection.local})",
        hint="raise selection.count",
    ),
    Constraint(
        id="compression_without_output_scores",
        when=SCORER_ALONE,
        holds=BY_COMPRESSION,
        at="compression.output",
        message="with compression.output: false, compressed keys are used only to select blocks, but no selection "
        "ranks by them",
        hint="remove compression, or set selection.scores: compression",
    ),
    Constraint(
        id="compression_without_output_ranks",
        when=SCORER_ALONE,
        holds=lambda v: not BY_COMPRESSION(v) or v["selection.count"] > v["selection.initial"] + v["selection.local"],
        at="compression.output",
        message="with compression.output: false, compressed keys are used only to select blocks, but all of "
        "selection.count ({selection.count}) are forced: initial ({selection.initial}) + local ({selection.local})",
        hint="raise selection.count",
    ),
    Constraint(
        id="compression_without_output_learns_nothing",
        when=SCORER_ALONE,
        holds=lambda v: (
            {v["compression.phi.key"], v["compression.phi.value"]} in ({"mean"}, {"external"})
            and {v["compression.position.key"], v["compression.position.value"]} == {"none"}
        ),
        at="compression.phi",
        also=("compression.position",),
        message="with compression.output: false no gradient reaches phi and there are no values to compress: expected "
        "phi: mean or phi: external, without position, got key: {compression.phi.key}, value: {compression.phi.value}, "
        "position of keys: {compression.position.key}, of values: {compression.position.value}",
        hint="to use a phi that was trained elsewhere, compress the keys yourself and set phi: external",
    ),
    Constraint(
        id="joint_needs_its_branches",
        when=JOINT,
        holds=lambda v: v["selection"] and v["window"],
        at="combine.joint",
        message="combine.joint ({combine.joint}) needs both branches, but one of them is missing",
        hint="add selection and window, or remove joint",
    ),
    Constraint(
        id="joint_needs_shared_keys",
        when=JOINT,
        holds=lambda v: v["kv"] == "shared",
        at="kv",
        message="kv ({kv}) gives a token that is in both branches two keys, but one softmax over their union "
        "(combine.joint) needs one key per token",
        hint="set kv: shared, or remove joint",
    ),
    Constraint(
        id="joint_has_one_sink",
        when=JOINT,
        holds=lambda v: not any(v[branch] and v[f"{branch}.sink"] == "learned" for branch in ("selection", "window")),
        at="selection.sink",
        also=("window.sink",),
        message="branches that share one softmax (combine.joint) cannot have their own sinks",
        hint="write combine: {joint: [selection, window], sink: learned}",
    ),
    Constraint(
        id="combined_sink_needs_joint",
        when=APART,
        holds=lambda v: v["combine.sink"] == "none",
        at="combine.sink",
        message="combine.sink ({combine.sink}) belongs to the softmax of joint branches, but combine.joint is empty",
        hint="write joint: [selection, window], or sink: learned in selection or window",
    ),
    Constraint(
        id="external_is_both_or_neither",
        when=COMPRESSED,
        holds=lambda v: (v["compression.phi.key"] == "external") == (v["compression.phi.value"] == "external"),
        at="compression.phi",
        message="external must be chosen for both key and value or for neither, "
        "got key: {compression.phi.key}, value: {compression.phi.value}",
        hint="write phi: external",
    ),
    Constraint(
        id="external_has_no_position",
        when=EXTERNAL,
        holds=lambda v: v["compression.position.key"] == "none" and v["compression.position.value"] == "none",
        at="compression.position",
        message="the caller computes an external phi, so the operator cannot add a learned position before it",
        hint="remove position",
    ),
    Constraint(
        id="mlp_needs_hidden",
        when=MLP,
        holds=lambda v: v["compression.phi.hidden"] is not None,
        at="compression.phi",
        message="phi mlp needs its hidden width",
        hint="for example: phi: {key: mlp, value: mlp, hidden: 256}",
    ),
    Constraint(
        id="hidden_needs_mlp",
        when=NO_MLP,
        holds=lambda v: v["compression.phi.hidden"] is None,
        at="compression.phi.hidden",
        message="hidden is the width of an mlp, but phi is key: {compression.phi.key}, value: {compression.phi.value}",
        hint="remove hidden, or set phi to mlp",
    ),
)


def violations(values: Values) -> Iterator[Constraint]:
    """The constraints that do not hold for `values`; those that need an unknown value are passed over."""
    return (constraint for constraint in CONSTRAINTS if constraint.broken(values))
