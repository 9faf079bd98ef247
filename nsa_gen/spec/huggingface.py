"""Heads, head dims, dtype and scale of a model, from its config.json as Hugging Face writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic_core import PydanticCustomError

from nsa_gen._files import parse_json, read_text
from nsa_gen.spec.errors import Problem, SpecError
from nsa_gen.spec.fields import RANGES, describe, did_you_mean, join
from nsa_gen.spec.model import DType, HeadDim, Heads
from nsa_gen.spec.model_types import (
    ATTENTION,
    ELSEWHERE,
    MODEL_TYPES,
    NOTES,
    SUSPICIOUS,
    TEXT_PARTS,
    WITHOUT_EFFECT,
    ModelType,
)

DTYPES = ("torch_dtype", "dtype")
LATENT = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
FLAGS = ("multi_query", "multi_query_attention")
SWITCHES = (
    *FLAGS, "new_decoder_architecture", "use_mla", "use_sliding_window", "scale_attn_weights", "mup_use_scaling",
    "mup_scale_qk_dot_by_d", "scale_attn_by_inverse_layer_idx",
)  # fmt: skip
OBJECTS = ("attn_config", "rope_parameters", "rope_scaling")
DEEPEST = 4
"""Parts inside parts that are looked into for the text's."""


@dataclass(frozen=True)
class ModelShape:
    """What a config says of a model's attention.

    Attributes:
        model: the model's type, such as "llama"; empty where the config names none.
        heads, head_dim, dtype: as in a spec.
        scale: factor of the logits, "auto" for 1/sqrt(qk).
        notes: what was taken for granted, and what of the model's attention a spec cannot say.
    """

    model: str
    heads: Heads
    head_dim: HeadDim
    dtype: DType
    scale: float | str
    notes: tuple[str, ...]


def read_config(path: Path) -> ModelShape:
    """The shape of a model's attention, from its config.json or the folder that holds one.

    `MODEL_TYPES` says which fields of a type of model are meant, and what its class takes where there are none. A model
    of text and more keeps its text's under text_config, llm_config or another of `TEXT_PARTS`. Multi-head latent
    attention (qk_nope_head_dim, qk_rope_head_dim, v_head_dim) is taken as its heads see keys and values.

    Raises:
        SpecError: the file cannot be read, its model type is not known, or naming every field that is missing, has a
            value no spec can have, or may change the attention in a way that is not known.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        document = parse_json(read_text(path), finite=False)
    except json.JSONDecodeError as error:
        raise SpecError([Problem(str(path), error.lineno, error.colno, "", f"not valid JSON: {error.msg}")]) from error
    except (OSError, ValueError) as error:
        raise SpecError([Problem(str(path), 0, 0, "", f"cannot be read: {error}")]) from error
    if not isinstance(document, dict):
        raise SpecError([Problem(str(path), 0, 0, "", f"expected an object, got {describe(document)}")])
    values, prefix = _text_part(document)
    dtypes = {name: document[name] for name in DTYPES if document.get(name) is not None}
    if any(values.get(name) is not None for name in DTYPES):
        dtypes = {}
    return _Config(str(path), {**dtypes, **values}, prefix).shape()


def _text_part(document: Mapping[str, Any], prefix: str = "") -> tuple[Mapping[str, Any], str]:
    """The part of a config that has the text's attention, and the path to it."""
    for name in TEXT_PARTS:
        inner = document.get(name)
        if isinstance(inner, Mapping) and prefix.count(".") < DEEPEST:
            found = _text_part(inner, f"{prefix}{name}.")
            if _is_known(found[0].get("model_type")) or not _is_known(document.get("model_type")):
                return found
    return document, prefix


def _is_known(model: Any) -> bool:
    return isinstance(model, str) and model in MODEL_TYPES


class _Config:
    """A config while it is read: `problems` and `notes` fill up, and the names that were looked at."""

    def __init__(self, file: str, values: Mapping[str, Any], prefix: str) -> None:
        inner = values.get("attn_config")
        self.named = dict(values)
        if isinstance(inner, Mapping):
            self.named |= {f"attn_config.{name}": value for name, value in inner.items()}
        self.file, self.prefix = file, prefix
        self.values: dict[str, Any] = self.named
        self.type = ModelType()
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.seen = {*LATENT}

    def shape(self) -> ModelShape:
        model = self.values.get("model_type")
        if not _is_known(model):
            self.refuse_type(model)
            raise SpecError(self.problems)
        self.type = MODEL_TYPES[model]
        self.values = {**self.type.defaults, **self.named}
        for names, kind, expected in ((SWITCHES, bool, "true or false"), (OBJECTS, Mapping, "an object")):
            for name in names:
                value = self.values.get(name)
                if value is not None and not isinstance(value, kind):
                    self.report(name, f"expected {expected}, got {describe(value)}")
        query = self.number(self.type.query, RANGES["heads.query"].check)
        latent = self.latent()
        kv = self.latent_kv_heads(query) if latent else self.kv_heads(query)
        qk, v = self.latent_head_dims() if latent else self.head_dims(query)
        dtype = self.dtype()
        scale = self.scale(qk, latent=latent)
        if query and kv and query % kv:
            name = self.present(self.type.kv) or next(iter(self.type.kv), "num_key_value_heads")
            self.report(name, f"expected a number that divides the {query} query heads, got {kv}")
        self.note_the_rest()
        if self.problems:
            raise SpecError(self.problems)
        assert query and kv and qk and v and dtype
        return ModelShape(model, Heads(query=query, kv=kv), HeadDim(qk=qk, v=v), dtype, scale, tuple(self.notes))

    def refuse_type(self, model: Any) -> None:
        """Report a model type that is not known, with the fields that it may use for its attention."""
        fields = [name for name, value in self.named.items() if ATTENTION.search(name) and not _neutral(value)]
        fields = [name for name in fields if not isinstance(self.named[name], Mapping) or "rope" in name]
        hint = did_you_mean(model, MODEL_TYPES) if isinstance(model, str) else ""
        told = f"without it these fields are not understood: {', '.join(fields)}" if fields else ""
        way = "make a spec with nsa-gen new NAME --like SPEC, and write heads, head_dim and scale yourself"
        hints = [part for part in (hint, told, way) if part]
        if model is None:
            self.report("model_type", "this field is required, because it says what the others mean", "; ".join(hints))
        else:
            self.report("model_type", f"expected a known model type, got {describe(model)}", "; ".join(hints))

    def report(self, name: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(self.file, 0, 0, self.prefix + name, message, hint))

    def get(self, name: str) -> Any:
        self.seen.add(name)
        return self.values.get(name)

    def present(self, names: tuple[str, ...]) -> str | None:
        """The first of several names of one thing that has a value."""
        self.seen.update(names)
        return next((name for name in names if self.values.get(name) is not None), None)

    def tell_default(self, name: str) -> None:
        if name not in self.named:
            self.notes.append(f"{name}: missing; {self.values[name]} is used, the default of the model's class")

    def number(self, names: tuple[str, ...], check: Any) -> int | None:
        """A required number, by any of its names; None after reporting why there is none."""
        name = self.present(names)
        if name is None:
            others = f"{join(names[1:])} would do, but is missing too" if names[1:] else ""
            self.report(names[0], "this field is required", others)
            return None
        self.tell_default(name)
        return self.checked(name, self.values[name], check)

    def checked(self, name: str, value: Any, check: Any) -> Any:
        try:
            return check(value)
        except PydanticCustomError as error:
            context = error.context or {}
            self.report(name, str(context["message"]), str(context["hint"]))
            return None

    def kv_heads(self, query: int | None) -> int | None:
        """Key heads, by their number or by the flags that overrule it."""
        flag = next((name for name in FLAGS if self.get(name) is True), None)
        match self.type.rule:
            case "falcon":
                counted = self.get("new_decoder_architecture") or flag is None or self.get("n_head_kv") is not None
                if not counted:
                    self.seen.update(self.type.kv)
                    self.tell_default(str(flag))
                    return 1
                flag = None
            case "chatglm":
                if flag is None:
                    self.seen.update(self.type.kv)
                    return query
                return self.number(self.type.kv, RANGES["heads.kv"].check)
            case "mpt":
                kind = self.get("attn_config.attn_type")
                if kind == "grouped_query_attention":
                    return self.number(self.type.kv, RANGES["heads.kv"].check)
                if kind in ("multihead_attention", "multiquery_attention"):
                    self.seen.update(self.type.kv)
                    return query if kind == "multihead_attention" else 1
                self.report("attn_config.attn_type", f"expected a known kind of attention, got {describe(kind)}")
                return None
            case "nas" if self.values.get("block_configs") is not None:
                self.seen.update(self.type.kv)
                return self.grouped_by_layers(query)
        name = self.present(self.type.kv)
        if name is not None:
            found = self.checked(name, self.values[name], RANGES["heads.kv"].check)
            if flag and flag in self.named and found not in (None, 1):
                self.report(flag, f"expected false together with {name}: {found}, got {describe(True)}")
            self.tell_default(name)
            return found
        if flag:
            self.tell_default(flag)
            return 1
        if query and self.type.kv:
            self.notes.append(f"{self.type.kv[0]}: missing, so every query head has its own KV head")
        return query

    def grouped_by_layers(self, query: int | None) -> int | None:
        """Key heads, from the query heads that share one in each layer that has attention."""
        blocks = self.get("block_configs")
        if not isinstance(blocks, list):
            self.report("block_configs", f"expected a list, got {describe(blocks)}")
            return None
        parts = [block.get("attention") if isinstance(block, Mapping) else None for block in blocks]
        parts = [part if isinstance(part, Mapping) else {} for part in parts]
        kept = [part for part in parts if not (part.get("no_op") or part.get("replace_with_linear"))]
        groups = {describe(part.get("n_heads_in_group")): part.get("n_heads_in_group") for part in kept}
        if len(kept) < len(parts):
            self.notes.append(f"block_configs: {NOTES['hybrid']}")
        if len(groups) != 1 or not isinstance(group := next(iter(groups.values())), int) or group < 1:
            shown = join(sorted(groups), "and") if groups else "nothing"
            self.report("block_configs", f"expected one n_heads_in_group for all layers, got {shown}")
            return None
        if query and query % group:
            self.report("block_configs", f"expected an n_heads_in_group that divides {query} heads, got {group}")
            return None
        return query // group if query else None

    def latent(self) -> bool:
        """Whether this is latent attention, which a type may switch off."""
        if self.type.latent and self.get("use_mla") is False:
            return False
        return self.type.latent or any(self.values.get(name) is not None for name in LATENT[:2])

    def latent_kv_heads(self, query: int | None) -> int | None:
        """As many as query heads, whatever is told."""
        told = self.get("num_key_value_heads")
        if query and told not in (None, query):
            self.notes.append(
                f"num_key_value_heads: {told}, but with latent attention each query head has its own KV head"
            )
        return query

    def latent_head_dims(self) -> tuple[int | None, int | None]:
        self.seen.update(("head_dim", "qk_head_dim"))
        whole = [self.number((name,), _positive) for name in LATENT]
        if None in whole:
            return None, None
        qk = self.checked("qk_nope_head_dim + qk_rope_head_dim", whole[0] + whole[1], RANGES["head_dim.qk"].check)  # type: ignore[operator]
        self.notes.append("latent attention: heads and head dims are those after the projections")
        return qk, self.checked("v_head_dim", whole[2], RANGES["head_dim.v"].check)

    def head_dims(self, query: int | None) -> tuple[int | None, int | None]:
        """Head dims of keys and of values."""
        qk = self.key_head_dim(query)
        if self.values.get("v_head_dim"):
            return qk, self.number(("v_head_dim",), RANGES["head_dim.v"].check)
        return qk, qk

    def key_head_dim(self, query: int | None) -> int | None:
        name = self.present(self.type.head_dim)
        if name is not None:
            return self.number((name,), RANGES["head_dim.qk"].check)
        hidden = self.present(self.type.hidden)
        if hidden is None:
            which = self.type.head_dim[0]
            self.report(which, "this field is required, because the hidden size is missing too", join(self.type.hidden))
            return None
        size = self.checked(hidden, self.values[hidden], _positive)
        if not size or not query:
            return None
        if size % query:
            self.report("head_dim", f"missing, and {hidden} ({size}) is not a multiple of the {query} query heads")
            return None
        return self.checked(f"{hidden} / {self.present(self.type.query)}", size // query, RANGES["head_dim.qk"].check)

    def dtype(self) -> DType | None:
        name = self.present(DTYPES)
        if name is None:
            self.notes.append("torch_dtype: missing; bfloat16 is used")
            return "bfloat16"
        value = self.values[name]
        word = value.removeprefix("torch.") if isinstance(value, str) else value
        if word in get_args(DType):
            return word
        self.report(name, f"expected one of {join(get_args(DType))}, got {describe(value)}")
        return None

    def scale(self, qk: int | None, *, latent: bool) -> float | str:
        """The factor of the logits, where a model has one of its own."""
        if self.get("scale_attn_by_inverse_layer_idx"):
            self.report("scale_attn_by_inverse_layer_idx", "expected false, because a spec has one scale, got true")
        if self.type.scale is not None:
            self.notes.append(f"scale: {self.type.scale}, the value of the model's class")
            return self.type.scale
        if self.get("scale_attn_weights") is False:
            return 1.0
        if self.get("mup_scale_qk_dot_by_d") and qk:
            return 1 / qk
        by_size = self.get("mup_use_scaling")
        factors: dict[str, Callable[[float], float]] = {
            "query_pre_attn_scalar": lambda x: x**-0.5,
            "attention_multiplier": float,
            "attn_config.softmax_scale": float,
            "mup_attn_multiplier": lambda x: x / qk if qk else x,
        }
        for name, factor in factors.items():
            value = self.get(name)
            if value is None or (name == "mup_attn_multiplier" and not by_size):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-9 < value < 1e9:
                self.report(name, f"expected a positive number, got {describe(value)}")
                return "auto"
            self.tell_default(name)
            return factor(value)
        return self.yarn_scale(qk, latent=latent)

    def yarn_scale(self, qk: int | None, *, latent: bool) -> float | str:
        """YaRN's factor on the scale of latent attention; with other attention it is the rotary embedding's."""
        name = self.present(("rope_parameters", "rope_scaling"))
        rope = self.values.get(name) if name else None
        if not isinstance(rope, Mapping):
            return "auto"
        kind = rope.get("rope_type", rope.get("type", "default"))
        if rope.get("llama_4_scaling_beta"):
            self.notes.append(f"{name}.llama_4_scaling_beta: {NOTES['attn_temperature_tuning']}")
        told, factor = rope.get("mscale_all_dim"), rope.get("factor")
        if kind == "default" or not latent or not told:
            if kind in ("yarn", "longrope", "su"):
                self.notes.append(f"{name}: {kind}'s factor on queries and keys stays in the rotary embedding")
            return "auto"
        for each, value in (("mscale_all_dim", told), ("factor", factor)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                self.report(f"{name}.{each}", f"expected a positive number, got {describe(value)}")
                return "auto"
        if factor <= 1 or not qk:
            return "auto"
        scale = qk**-0.5 * (0.1 * told * math.log(factor) + 1) ** 2
        self.notes.append(f"{name}: scale includes YaRN's factor on the logits, {scale * qk**0.5:.4g}")
        return scale

    def note_the_rest(self) -> None:
        """Note what a spec cannot say, and report what may change the attention in a way that is not known."""
        for name in self.type.notes:
            self.notes.append(f"{name}: {NOTES[name]}")
        kinds = self.get("layer_types")
        several = {kind for kind in kinds if isinstance(kind, str)} if isinstance(kinds, list) else set()
        without_window = several == {"full_attention"} or self.get("use_sliding_window") is False
        if len(several) > 1:
            self.notes.append(
                f"layer_types: {join(sorted(several), 'and')}; the spec describes one shape, that of attention layers"
            )
        if self.get("position_embedding_type") == "alibi":
            self.notes.append(f"position_embedding_type: {NOTES['alibi']}")
        self.seen.update(self.type.unread)
        for name, text in NOTES.items():
            value = self.get(name)
            known = name in (*self.type.notes, *self.type.unread) or (name == "sliding_window" and without_window)
            if not known and not _neutral(value):
                self.notes.append(f"{name}: {text}" if value is True else f"{name}: {value}; {text}")
        for name, value in self.named.items():
            last = name.rpartition(".")[2]
            if name in self.seen or last in WITHOUT_EFFECT or _neutral(value) or ELSEWHERE.search(last):
                continue
            if SUSPICIOUS.search(last):
                kind = self.named["model_type"]
                self.report(name, f"not understood for models of type {kind}, and may change the attention")


def _neutral(value: Any) -> bool:
    """Whether a field says nothing."""
    return value is None or value is False or value in (0, "", [], {})


def _positive(value: Any) -> int:
    if type(value) is int and value > 0:
        return value
    message = f"expected a positive whole number, got {describe(value)}"
    raise PydanticCustomError("config_value", "{message}", {"message": message, "hint": ""})
