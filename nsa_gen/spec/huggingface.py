"""Heads, head dims, dtype and scale of a model, from its config.json as Hugging Face writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic_core import PydanticCustomError

from nsa_gen._files import read_json
from nsa_gen.spec.errors import Problem, SpecError
from nsa_gen.spec.fields import RANGES, describe, join
from nsa_gen.spec.model import DType, HeadDim, Heads

QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model")
DTYPES = ("torch_dtype", "dtype")


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

    A model of text and more keeps it under text_config. Missing numbers of key heads mean as many as query heads, a
    missing head_dim means the hidden size over the query heads, as in Hugging Face's own classes. Multi-head latent
    attention (qk_nope_head_dim, qk_rope_head_dim, v_head_dim) is taken as its heads see keys and values.

    Raises:
        SpecError: the file cannot be read, or naming every field that is missing or has a value no spec can have.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        document = read_json(path)
    except json.JSONDecodeError as error:
        raise SpecError([Problem(str(path), error.lineno, error.colno, "", f"no JSON: {error.msg}")]) from error
    except (OSError, ValueError) as error:
        raise SpecError([Problem(str(path), 0, 0, "", f"cannot be read: {error}")]) from error
    if not isinstance(document, dict):
        raise SpecError([Problem(str(path), 0, 0, "", f"expected an object, got {describe(document)}")])
    inner = document.get("text_config")
    nested = isinstance(inner, dict) and not any(name in document for name in QUERY_HEADS)
    return _Config(str(path), {**document, **inner} if nested else document, "text_config." if nested else "").shape()


class _Config:
    """A config while it is read: `problems` and `notes` fill up."""

    def __init__(self, file: str, values: Mapping[str, Any], prefix: str) -> None:
        self.file, self.values, self.prefix = file, values, prefix
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def shape(self) -> ModelShape:
        query = self.number(QUERY_HEADS, RANGES["heads.query"].check)
        kv = self.kv_heads(query)
        qk, v = self.head_dims(query)
        dtype = self.dtype()
        scale = self.scale()
        if query and kv and query % kv:
            name = self.present(KV_HEADS) or KV_HEADS[0]
            self.report(name, f"expected a number that divides the {query} query heads, got {kv}")
        if self.values.get("attn_logit_softcapping"):
            self.notes.append("attn_logit_softcapping: a spec has no cap of logits; the operator will not apply it")
        if self.problems:
            raise SpecError(self.problems)
        assert query and kv and qk and v and dtype
        model = self.values.get("model_type")
        shape = Heads(query=query, kv=kv), HeadDim(qk=qk, v=v)
        return ModelShape(model if isinstance(model, str) else "", *shape, dtype, scale, tuple(self.notes))

    def report(self, name: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(self.file, 0, 0, self.prefix + name, message, hint))

    def present(self, names: tuple[str, ...]) -> str | None:
        """The first of several names of one thing that has a value."""
        return next((name for name in names if self.values.get(name) is not None), None)

    def number(self, names: tuple[str, ...], check: Any) -> int | None:
        """A required number, by any of its names; None after reporting why there is none."""
        name = self.present(names)
        if name is None:
            others = f"nor is it there as {join(names[1:])}" if names[1:] else ""
            self.report(names[0], "this field is required", others)
            return None
        return self.checked(name, self.values[name], check)

    def checked(self, name: str, value: Any, check: Any) -> Any:
        try:
            return check(value)
        except PydanticCustomError as error:
            context = error.context or {}
            self.report(name, str(context["message"]), str(context["hint"]))
            return None

    def kv_heads(self, query: int | None) -> int | None:
        name = self.present(KV_HEADS)
        if name is not None:
            return self.checked(name, self.values[name], RANGES["heads.kv"].check)
        if self.values.get("multi_query") is True:
            return 1
        if query:
            self.notes.append(f"{KV_HEADS[0]}: not there, so every query head has a key head of its own")
        return query

    def head_dims(self, query: int | None) -> tuple[int | None, int | None]:
        """Head dims of keys and of values."""
        latent = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if any(self.values.get(name) is not None for name in latent):
            whole = [self.number((name,), _positive) for name in latent]
            if None in whole:
                return None, None
            qk = self.checked("qk_nope_head_dim + qk_rope_head_dim", whole[0] + whole[1], RANGES["head_dim.qk"].check)  # type: ignore[operator]
            self.notes.append("latent attention: heads are taken as they see keys and values, after the projections")
            return qk, self.checked("v_head_dim", whole[2], RANGES["head_dim.v"].check)
        if self.values.get("head_dim") is not None:
            both = self.checked("head_dim", self.values["head_dim"], RANGES["head_dim.qk"].check)
            return both, both
        hidden = self.present(HIDDEN)
        if hidden is None:
            self.report("head_dim", "this field is required where there is no hidden size either", join(HIDDEN))
            return None, None
        size = self.checked(hidden, self.values[hidden], _positive)
        if not size or not query:
            return None, None
        if size % query:
            self.report("head_dim", f"not there, and {hidden} ({size}) is no multiple of the {query} query heads")
            return None, None
        both = self.checked(f"{hidden} / {self.present(QUERY_HEADS)}", size // query, RANGES["head_dim.qk"].check)
        return both, both

    def dtype(self) -> DType | None:
        name = self.present(DTYPES)
        if name is None:
            self.notes.append("torch_dtype: not there; bfloat16 is taken")
            return "bfloat16"
        value = self.values[name]
        word = value.removeprefix("torch.") if isinstance(value, str) else value
        if word in get_args(DType):
            return word
        self.report(name, f"expected one of {join(get_args(DType))}, got {describe(value)}")
        return None

    def scale(self) -> float | str:
        """The factor of the logits, where a model has one of its own."""
        for name, factor in (("query_pre_attn_scalar", lambda x: x**-0.5), ("attention_multiplier", float)):
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-9 < value < 1e9:
                self.report(name, f"expected a positive number, got {describe(value)}")
                return "auto"
            return factor(value)
        return "auto"


def _positive(value: Any) -> int:
    if type(value) is int and value > 0:
        return value
    message = f"expected a positive whole number, got {describe(value)}"
    raise PydanticCustomError("config_value", "{message}", {"message": message, "hint": ""})
