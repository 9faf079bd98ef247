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


SINCE: Mapping[str, int] = {"window.sink": 2}
"""Fields that earlier versions of the language lack, and the version that brought each."""


def always(v: Values) -> bool:
    """always"""
    return True


def tf32(v: Values) -> bool:
    """fp32_precision is tf32"""
    return v["fp32_precision"] == "tf32"


def sink(v: Values) -> bool:
    """the window has a sink"""
    return v["window"] and v["window.sink"] != "none"


def compressed(v: Values) -> bool:
    """there is compression"""
    return v["compression"]


def computed(v: Values) -> bool:
    """the operator selects blocks itself"""
    return v["selection"] and v["selection.indices"] == "computed"


def given(v: Values) -> bool:
    """the caller selects blocks"""
    return v["selection"] and v["selection.indices"] == "input"


def scored(v: Values) -> bool:
    """blocks are selected by compressed scores"""
    return v["compression"] and computed(v)


def external(v: Values) -> bool:
    """phi of keys or values is external"""
    return v["compression"] and (v["compression.phi.key"] == "external" or v["compression.phi.value"] == "external")


def mlp(v: Values) -> bool:
    """phi of keys or values is an mlp"""
    return v["compression"] and (v["compression.phi.key"] == "mlp" or v["compression.phi.value"] == "mlp")


def no_mlp(v: Values) -> bool:
    """there is compression without an mlp"""
    return v["compression"] and not mlp(v)


@dataclass(frozen=True, slots=True)
class Constraint:
    """One rule between fields.

    Attributes:
        id: a stable name for tests and documentation.
        holds: what must be true of the values.
        at: the field an error points at; if it is not written, the first that is among the others of `fields`.
        message: the error; ``{field}`` is replaced by that field's value.
        hint: how to mend it.
        when: the rule applies only where this is true; its docstring says so on the reference page.
        also: fields that an error may point at and that the message does not name.
    """

    id: str
    holds: Predicate
    at: str
    message: str
    hint: str = ""
    when: Predicate = always
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
        return re.sub(r"\{([a-z_.]+)\}", lambda match: str(values.get(match[1], match[1])), self.message)


CONSTRAINTS: tuple[Constraint, ...] = (
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
        when=tf32,
        holds=lambda v: v["dtype"] == "float32",
        at="fp32_precision",
        message="tf32 products exist for float32 inputs only, but dtype is {dtype}",
        hint="remove fp32_precision, or set dtype: float32",
    ),
    Constraint(
        id="window_sink_needs_version_2",
        when=sink,
        holds=lambda v: v["version"] >= SINCE["window.sink"],
        at="window.sink",
        message="window.sink ({window.sink}) needs version: 2 of the spec language, but version is {version}",
        hint="write version: 2",
    ),
    Constraint(
        id="stride_divides_compression_block",
        when=compressed,
        holds=lambda v: v["compression.block"] % v["compression.stride"] == 0,
        at="compression.stride",
        message="compression.stride ({compression.stride}) must divide compression.block ({compression.block})",
    ),
    Constraint(
        id="computed_selection_needs_compression",
        when=computed,
        holds=lambda v: v["compression"],
        at="selection",
        message="computed selection ranks blocks by the compressed scores, but there is no compression branch",
        hint="add compression, or set selection.indices: input",
    ),
    Constraint(
        id="stride_divides_selection_block",
        when=scored,
        holds=lambda v: v["selection.block"] % v["compression.stride"] == 0,
        at="compression.stride",
        message="compression.stride ({compression.stride}) must divide selection.block ({selection.block})",
    ),
    Constraint(
        id="compression_block_fits_selection_block",
        when=scored,
        holds=lambda v: v["compression.block"] <= v["selection.block"],
        at="compression.block",
        message="compression.block ({compression.block}) must not exceed selection.block ({selection.block})",
    ),
    Constraint(
        id="forced_blocks_fit_count",
        when=computed,
        holds=lambda v: v["selection.initial"] + v["selection.local"] <= v["selection.count"],
        at="selection.count",
        message="selection.count ({selection.count}) must hold the forced blocks: "
        "initial ({selection.initial}) + local ({selection.local})",
        hint="count includes the forced blocks",
    ),
    Constraint(
        id="given_indices_force_nothing",
        when=given,
        holds=lambda v: v["selection.initial"] == 0 and v["selection.local"] == 0,
        at="selection.initial",
        also=("selection.local",),
        message="with indices: input the caller chooses every block; initial and local would have no effect",
        hint="remove initial and local",
    ),
    Constraint(
        id="external_is_both_or_neither",
        when=compressed,
        holds=lambda v: (v["compression.phi.key"] == "external") == (v["compression.phi.value"] == "external"),
        at="compression.phi",
        message="external must be chosen for both key and value or for neither, "
        "got key: {compression.phi.key}, value: {compression.phi.value}",
        hint="write phi: external",
    ),
    Constraint(
        id="external_has_no_position",
        when=external,
        holds=lambda v: v["compression.position.key"] == "none" and v["compression.position.value"] == "none",
        at="compression.position",
        message="an external phi is computed by the caller, so there is nothing to add a learned position to",
        hint="remove position",
    ),
    Constraint(
        id="mlp_needs_hidden",
        when=mlp,
        holds=lambda v: v["compression.phi.hidden"] is not None,
        at="compression.phi",
        message="phi mlp needs its hidden width",
        hint="for example: phi: {key: mlp, value: mlp, hidden: 256}",
    ),
    Constraint(
        id="hidden_needs_mlp",
        when=no_mlp,
        holds=lambda v: v["compression.phi.hidden"] is None,
        at="compression.phi.hidden",
        message="hidden is the width of an mlp, but phi is key: {compression.phi.key}, value: {compression.phi.value}",
        hint="remove hidden, or choose mlp",
    ),
)


def violations(values: Values) -> Iterator[Constraint]:
    """The constraints that do not hold for `values`; those that need an unknown value are passed over."""
    return (constraint for constraint in CONSTRAINTS if constraint.broken(values))
