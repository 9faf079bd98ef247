"""The spec: what is asked for, as frozen records.

A `Spec` that exists is valid: every field is in its range and every rule of `constraints.CONSTRAINTS` holds.
Specs are read from text by `nsa_gen.spec.parse_spec`; building one in Python raises `pydantic.ValidationError` instead
of `SpecError`.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator
from pydantic_core import PydanticCustomError, core_schema

from nsa_gen.spec.constraints import SINCE_VERSION_2, violations
from nsa_gen.spec.emit import to_yaml
from nsa_gen.spec.fields import (
    FLAG,
    JOINT,
    PACKAGE_NAME,
    PARAGRAPH,
    PASSES,
    RANGES,
    SOFTMAX_SCALE,
    VERSION,
    WordOrRecord,
    join,
    one_of,
)

DType = Literal["bfloat16", "float16", "float32"]
PhiKind = Literal["mean", "weighted", "linear", "mlp", "external"]
PositionKind = Literal["none", "learned"]
BranchName = Literal["cmp", "slc", "win", "joint"]

SINK = "none, or learned: one logit per query head in the softmax's denominator, without a value, passed as an argument"
"""What a sink is, for the reference."""

BROKEN_CONSTRAINTS = "spec_constraints"
"""The pydantic error type of a spec whose fields are fine one by one, but not together."""


class Record(BaseModel):
    """A frozen part of a spec that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shorthand: ClassVar[tuple[str, ...]] = ()
    """The fields that a single value, written in place of the record, stands for."""
    word: ClassVar[str] = ""
    """What the record is called among the words that may be written in its place; empty where none may."""

    @classmethod
    def expand(cls, document: Any) -> Any:
        """`document` with this record's shorthand written out; a mapping is returned as it came."""
        if cls.shorthand and not isinstance(document, Mapping):
            return dict.fromkeys(cls.shorthand, document)
        return document

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, document: Any) -> Any:
        return document if isinstance(document, Record) else cls.expand(document)


class Heads(Record):
    """Numbers of attention heads; `query` is a multiple of `kv`."""

    query: Annotated[int, RANGES["heads.query"]] = Field(description="Number of query heads.", examples=[32])
    kv: Annotated[int, RANGES["heads.kv"]] = Field(description="Number of key and value heads.", examples=[8])

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query // self.kv


class HeadDim(Record):
    """Sizes of a head. `head_dim: 128` sets both."""

    shorthand = ("qk", "v")

    qk: Annotated[int, RANGES["head_dim.qk"]] = Field(description="Elements of a query or key head.", examples=[128])
    v: Annotated[int, RANGES["head_dim.v"]] = Field(description="Elements of a value or output head.", examples=[128])


class Phi(Record):
    """How a block becomes one key and one value. `phi: mean` sets both."""

    shorthand = ("key", "value")

    key: Annotated[PhiKind, one_of(*get_args(PhiKind))] = Field(
        default="mean",
        description="For keys: mean; weighted (one learned weight per position); linear (flattened block times a "
        "matrix); mlp (two layers with a GELU between); external (the caller passes compressed keys).",
    )
    value: Annotated[PhiKind, one_of(*get_args(PhiKind))] = Field(
        default="mean", description="For values: the same choices. external must be set for both or for neither."
    )
    hidden: Annotated[int, RANGES["compression.phi.hidden"]] | None = Field(
        default=None,
        description="Width of the mlp's hidden layer; required with an mlp, refused otherwise.",
        examples=[256],
    )


class Position(Record):
    """Learned embedding of the position inside a block, added before phi. `position: learned` sets both."""

    shorthand = ("key", "value")

    key: Annotated[PositionKind, one_of(*get_args(PositionKind))] = Field(default="none", description="For keys.")
    value: Annotated[PositionKind, one_of(*get_args(PositionKind))] = Field(default="none", description="For values.")


class Compression(Record):
    """Compressed keys, one per block, and the branch that attends to them unless output is false."""

    block: Annotated[int, RANGES["compression.block"]] = Field(description="Tokens in a block.", examples=[32])
    stride: Annotated[int, RANGES["compression.stride"]] = Field(
        description="Tokens from the start of a block to the start of the next.", examples=[16]
    )
    phi: Phi = Field(default=Phi(), description="How a block becomes one key and one value.")
    position: Position = Field(default=Position(), description="Learned positions inside a block.")
    output: Annotated[bool, FLAG] = Field(
        default=True,
        description="true or, in version 2, false: compressed keys are used only to select blocks. They are computed "
        "from the selection's keys, and have no branch, gate, value or gradient.",
    )


class Indexer(Record):
    """A learned scorer with its own queries and keys, q_idx and k_idx, which are arguments of the operator."""

    dim: Annotated[int, RANGES["selection.scores.indexer.dim"]] = Field(
        description="Elements of an index query or key.", examples=[128]
    )


class IndexScores(Record):
    """Scores of a learned indexer: a mapping in place of a word."""

    word = "indexer"

    indexer: Indexer = Field(
        description="A block's score is the largest product of the index query with an index key of the block."
    )


class Selection(Record):
    """The selection branch: attention over the raw tokens of the selected blocks."""

    block: Annotated[int, RANGES["selection.block"]] = Field(description="Tokens in a block.", examples=[64])
    count: Annotated[int, RANGES["selection.count"]] = Field(
        description="Blocks selected for each query, forced ones included.", examples=[16]
    )
    indices: Annotated[Literal["computed", "input"], one_of("computed", "input")] = Field(
        default="computed",
        description="computed: the operator ranks blocks by their scores; input: the caller passes the indices.",
    )
    initial: Annotated[int, RANGES["selection.initial"]] = Field(
        default=1, description="Number of first blocks that are always selected; 0 with indices: input."
    )
    local: Annotated[int, RANGES["selection.local"]] = Field(
        default=2,
        description="Number of most recent blocks, the query's own included, that are always selected; 0 with "
        "indices: input.",
    )
    scores: Annotated[
        Literal["compression", "mean"] | IndexScores,
        WordOrRecord(
            one_of("compression", "mean"), "{indexer: {dim: ...}}", {"indexer": "scores: {indexer: {dim: 128}}"}
        ),
    ] = Field(
        default="compression",
        description="What blocks are ranked by: compression (attention to the compressed keys) or, in version 2, mean "
        "(products of the queries with the block's mean key) or {indexer: {dim: ...}} (products of index queries "
        "and index keys, both passed as arguments).",
    )
    pool: Annotated[Literal["sum", "max"], one_of("sum", "max")] = Field(
        default="sum",
        description="How a block's importance is computed from the probabilities of the compressed blocks that overlap "
        "it: sum (weighted by the overlap) or, in version 2, max; max needs scores: compression.",
    )
    scope: Annotated[Literal["group", "head", "all"], one_of("group", "head", "all")] = Field(
        default="group",
        description="Which query heads sum their scores and share one selection: group (those of a KV head) or, "
        "in version 2, head (each alone) or all (those of the layer).",
    )
    sink: Annotated[Literal["none", "learned"], one_of("none", "learned")] = Field(
        default="none", description=f"{SINK}; learned needs version: 2."
    )

    @property
    def index_dim(self) -> int:
        """Elements of an index query or key; 0 where no indexer ranks the blocks."""
        return self.scores.indexer.dim if isinstance(self.scores, IndexScores) else 0

    @classmethod
    def expand(cls, document: Any) -> Any:
        if isinstance(document, Mapping) and document.get("indices") == "input":
            return {"initial": 0, "local": 0, **document}
        return document


class Window(Record):
    """The window branch: attention over the most recent tokens."""

    size: Annotated[int, RANGES["window.size"]] = Field(
        description="Number of keys a query sees, its own included.", examples=[512]
    )
    sink: Annotated[Literal["none", "learned"], one_of("none", "learned")] = Field(
        default="none", description=f"{SINK}; learned needs version: 2."
    )


class Combine(Record):
    """How the outputs of the branches are combined."""

    gate: Annotated[Literal["sigmoid", "given", "none"], one_of("sigmoid", "given", "none")] = Field(
        default="sigmoid",
        description="sigmoid: gates are passed as logits per token, query head and branch; given: gates are passed as "
        "values; none: a plain sum without gates.",
    )
    joint: Annotated[tuple[Literal["selection", "window"], ...], JOINT] = Field(
        default=(),
        description="Branches that share one softmax over the union of their keys, one output and one gate; "
        "[selection, window] needs version: 2 and kv: shared.",
    )
    sink: Annotated[Literal["none", "learned"], one_of("none", "learned")] = Field(
        default="none", description=f"Sink of the joint branches' softmax: {SINK}; learned needs version: 2."
    )


class Cache(Record):
    """How the cache for decode stores keys and values."""

    dtype: Annotated[Literal["e4m3"], one_of("e4m3")] = Field(
        description="e4m3: raw keys and values are stored as 8-bit floating-point numbers with one scale per KV head; "
        "compressed ones stay in the spec's dtype."
    )


class Spec(Record):
    """A native sparse attention operator. At least one branch must be present."""

    version: Annotated[Literal[1, 2], VERSION] = Field(
        description="Version of the spec language: 2 extends 1; everything in 1 keeps its meaning."
    )
    name: Annotated[str, PACKAGE_NAME] = Field(
        description="Name of the generated package: a Python identifier.", examples=["llama3_8b"]
    )
    description: Annotated[str, PARAGRAPH] = Field(default="", description="What the operator is for, in one sentence.")
    heads: Heads = Field(description="Numbers of heads.")
    head_dim: HeadDim = Field(description="Sizes of a head: one number for both, or qk and v separately.")
    dtype: Annotated[DType, one_of(*get_args(DType))] = Field(
        description="Type of inputs, parameters and outputs; sums, softmax and importance are always in float32."
    )
    fp32_precision: Annotated[Literal["ieee", "tf32"], one_of("ieee", "tf32")] = Field(
        default="ieee",
        description="Precision of float32 matrix products: full (ieee) or tf32; tf32 needs dtype: float32.",
    )
    scale: Annotated[float | Literal["auto"], SOFTMAX_SCALE] = Field(
        default="auto", description="Factor on the logits: auto is 1/sqrt(head_dim.qk)."
    )
    kv: Annotated[Literal["shared", "per_branch"], one_of("shared", "per_branch")] = Field(
        default="shared", description="shared: one K and V for all branches; per_branch: each branch has its own."
    )
    compression: Compression | None = Field(default=None, description="The compression branch; absent if left out.")
    selection: Selection | None = Field(default=None, description="The selection branch; absent if left out.")
    window: Window | None = Field(default=None, description="The window branch; absent if left out.")
    combine: Combine = Field(default=Combine(), description="How the outputs of the branches are combined.")
    passes: Annotated[tuple[Literal["forward", "backward", "decode"], ...], PASSES] = Field(
        default=("forward", "backward"),
        description="Passes to generate: forward, backward (its gradients) and decode (inference with a cache).",
    )
    cache: Cache | None = Field(
        default=None,
        description="How the cache stores keys and values; in the spec's dtype if left out. Needs version: 2.",
    )

    @model_validator(mode="after")
    def _constraints_hold(self) -> Self:
        values = flatten(type(self), self)
        broken = [constraint.explain(values) for constraint in violations(values)]
        if broken:
            raise PydanticCustomError(BROKEN_CONSTRAINTS, "{message}", {"message": "; ".join(broken)})
        return self

    @model_serializer(mode="wrap")
    def _in_its_version(self, handler: core_schema.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Version 1 does not have the fields of version 2, so they are left out there."""
        document: dict[str, Any] = handler(self)
        for path in SINCE_VERSION_2 if self.version == 1 else ():
            record, _, name = path.rpartition(".")
            (document.get(record) or {}).pop(name, None)
        return document

    @property
    def scale_value(self) -> float:
        """The factor of the logits as a number."""
        return 1.0 / math.sqrt(self.head_dim.qk) if isinstance(self.scale, str) else self.scale

    @property
    def branches(self) -> tuple[BranchName, ...]:
        """The branches that are present, in the order cmp, slc, win; joint ones are one, `joint`."""
        attended = self.compression if self.compression and self.compression.output else None
        present: dict[BranchName, Record | None] = {"cmp": attended}
        present |= {"joint": self.window} if self.combine.joint else {"slc": self.selection, "win": self.window}
        return tuple(name for name, branch in present.items() if branch is not None)

    @property
    def scopes(self) -> int:
        """Choices of blocks that a query token has, one for each scope of query heads: the third dim of indices."""
        scope = self.selection.scope if self.selection else "group"
        return {"group": self.heads.kv, "head": self.heads.query, "all": 1}[scope]

    @property
    def index_dim(self) -> int:
        """Elements of an index query or key; 0 where no indexer ranks the blocks."""
        return self.selection.index_dim if self.selection else 0

    @property
    def external(self) -> bool:
        """The caller compresses: compressed keys, and values if there is output, are arguments of the operator."""
        return self.compression is not None and self.compression.phi.key == "external"

    def replace(self, **changes: Any) -> Self:
        """This spec with other values for some of its top-level fields, validated anew.

        Raises:
            pydantic.ValidationError: when the result is no valid spec (`model_copy` would not notice).
        """
        return type(self).model_validate(dict(self) | changes)

    def resolved_yaml(self) -> str:
        """The canonical text of this spec: every default written out, keys in the model's order.

        Equal specs give equal bytes, and the text reads back as an equal spec. Absent branches, and `hidden` where
        there is no mlp, are left out.
        """
        return to_yaml(self.model_dump(exclude_none=True))

    def digest(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of `resolved_yaml()`."""
        return hashlib.sha256(self.resolved_yaml().encode()).hexdigest()[:12]


@functools.cache
def record_type(model: type[Record], name: str) -> type[Record] | None:
    """The record class of field `name` of `model`, or None when the field is a leaf."""
    annotation = model.model_fields[name].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Record):
            return candidate
    return None


def all_records(model: type[Record], prefix: str = "") -> Iterator[tuple[str, type[Record]]]:
    """`model` and every record inside it with its dotted path, that of `model` itself first, with an empty one."""
    yield prefix, model
    for name in model.model_fields:
        record = record_type(model, name)
        if record is not None:
            yield from all_records(record, f"{prefix}.{name}".removeprefix("."))


def expectation(model: type[Record], name: str) -> str:
    """What field `name` of `model` expects, in words."""
    record = record_type(model, name)
    if record is not None and not record.word:
        return f"a mapping with {join(record.model_fields, 'and')}"
    info = model.model_fields[name]
    inside_union = [rule for part in get_args(info.annotation) for rule in getattr(part, "__metadata__", ())]
    return next(rule.expected for rule in (*info.metadata, *inside_union) if hasattr(rule, "expected"))


def flatten(model: type[Record], document: Any, prefix: str = "") -> dict[str, object]:
    """The field values of `document`, a record or the mapping it is read from, by dotted path.

    Shorthand is written out and defaults are filled in. A record's own path holds whether it is present or, where words
    may take its place, the word; required fields that are missing, and everything under a value that is no mapping, are
    left out.
    """
    fields = dict(document) if isinstance(document, Record) else model.expand(document)
    values: dict[str, object] = {}
    if not isinstance(fields, Mapping):
        return values
    for name, info in model.model_fields.items():
        path = prefix + name
        record = record_type(model, name)
        if name not in fields and info.is_required():
            continue
        value = fields.get(name, info.default)
        if record is None:
            values[path] = value
            continue
        word = value if isinstance(value, str) else record.word
        values[path] = word if record.word else value is not None
        if value is not None:
            values |= flatten(record, value, path + ".")
    return values
