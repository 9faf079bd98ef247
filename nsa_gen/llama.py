"""Running a model of the Llama architecture, as the transformers library builds it, with a generated operator."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsa_gen._packing import Packing

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")

UNDERSTOOD = frozenset(
    (
        "layer_idx", "layer_type", "attention_type", "scaling", "is_causal", "is_sliding", "is_local_attention",
        "use_rope", "use_qk_norm", "qk_layernorm", "rope_theta", "partial_rotary_factor", "rotary_ndims",
        "max_position_embeddings", "attention_bias", "sliding_window_pattern",
    )
)  # fmt: skip
"""Attributes of an attention module that are read here, or that say what its parts and other attributes say."""

SIZE = re.compile(r"(^|_)(num|n|heads?|dims?|hidden|groups?)(_|$)")
"""Names of attributes that are sizes, which the shapes of the parts say as well."""

MEANINGS = {
    "sliding_window": "the model's attention ends there",
    "attn_logit_softcapping": "the operator does not cap logits",
    "attention_dropout": "the operator has no dropout; load the model with attention_dropout=0.0",
    "clip_qkv": "the operator does not clip queries, keys and values",
    "attention_chunk_size": "the model's attention ends at chunks",
}
"""Settings of a module, or of the config where the module has none, that change what it computes."""

IGNORED = frozenset(
    (
        "use_cache", "cache_position", "num_items_in_batch", "output_hidden_states", "output_router_logits",
        "return_dict", "logits_to_keep",
    )
)  # fmt: skip
"""Keyword arguments that layers get and that attention without a cache has no use for."""


LATENT = ("q_a_", "q_b_", "kv_a_", "kv_b_")
"""How the names of parts of latent attention begin."""


def use_sparse_attention(model: Any, op: Any, kind: type[SparseAttention] | None = None) -> Any:
    """Replace the attention of every layer of a Llama-like model by that of a generated package, in place.

    The model's projections, their biases, q_norm and k_norm, and the rotary embedding are kept. Gates, and phi's
    parameters if the spec has any, are new and start as in `NativeSparseAttention`. With such a spec, the model must be
    trained further before it is useful. Layers with use_rope false still have no rotary embedding.

    Every layer is checked before any is replaced. The check compares its parts and settings by name. It also compares
    the output of its attention, for a few tokens and random weights, with dense attention of the parts named above.
    Attention that the operator cannot compute (sinks, soft caps, sliding windows, clipping, dropout, norms elsewhere,
    interleaved rotary dims) raises an error, and the model is left unchanged. The same holds for a model that is
    already patched.

    A patched layer uses `position_embeddings`, and `cu_seq_lens_q` and `cu_seq_lens_k` for rows with several documents.
    Key-value caches and padding raise an error, and `use_cache` is switched off.

    Args:
        model: with `model.layers[...].self_attn` (q_proj, k_proj, v_proj, o_proj) and `model.rotary_emb`, such as
            LlamaForCausalLM with `attn_implementation="sdpa"`.
        op: a generated package of the model's heads, head dim, scale and dtype, whose branches share keys.
        kind: the class of the new attention layers; `SparseAttention` if None.

    Returns:
        the model.

    Raises:
        TypeError: the model has another structure.
        ValueError: the spec does not fit the model, or the operator cannot compute its attention; the message names the
            field.
    """
    inner = getattr(model, "model", None)
    layers, rotary_embedding = getattr(inner, "layers", None), getattr(inner, "rotary_emb", None)
    if layers is None or rotary_embedding is None:
        raise TypeError(
            "model: expected one with model.layers and model.rotary_emb, such as LlamaForCausalLM, "
            f"got {type(model).__name__}"
        )
    if op.SPEC["kv"] != "shared":
        raise ValueError(f"kv: expected shared, as the model has one pair of keys and values, got {op.SPEC['kv']}")
    packing, drawn = Packing(), {}
    replaced = []
    for number, layer in enumerate(layers):
        where = f"model.layers.{number}.self_attn"
        attention = getattr(layer, "self_attn", None)
        _check_settings(where, attention, getattr(attention, "config", None) or model.config)
        sparse = (kind or SparseAttention)(where, attention, op, rotary_embedding, packing)
        _check_result(where, attention, sparse, op, drawn)
        replaced.append(sparse)
    for layer, sparse in zip(layers, replaced, strict=True):
        layer.self_attn = sparse
    model.config.use_cache = False
    return model


def _check_settings(where: str, attention: Any, config: Any) -> None:
    """Raise where an attention module is not made of known parts, or has a setting that the operator cannot follow."""
    if isinstance(attention, SparseAttention):
        raise ValueError(f"{where}: expected the model's own attention; it was replaced already")
    if not isinstance(attention, nn.Module):
        raise ValueError(f"{where}: expected an attention module, as every layer of a Llama-like model has, got none")
    children = {name: child for name, child in attention.named_children() if not _does_nothing(child)}
    own = {name for name, x in (*attention._parameters.items(), *attention._buffers.items()) if x is not None}
    for name in (*children, *sorted(own)):
        if name.startswith(LATENT):
            raise ValueError(
                f"{where}.{name}: expected keys and values a head; latent attention (MLA) makes all heads' from one "
                "vector, which the operator does not do"
            )
        if name not in (*PARTS, *NORMS, "rotary_emb"):
            raise ValueError(f"{where}.{name}: the operator has no such part, so it cannot stand for this attention")
    for name in PARTS:
        if name not in children or not hasattr(children[name], "weight"):
            raise ValueError(f"{where}.{name}: expected a linear projection, got none")
    if not getattr(attention, "is_causal", True):
        raise ValueError(f"{where}.is_causal: expected True, got False")
    settings = {f"{where}.{name}": value for name, value in vars(attention).items() if name[0] != "_"}
    for name in MEANINGS:
        unused = name == "sliding_window" and getattr(config, "use_sliding_window", True) is False
        if not hasattr(attention, name) and not unused:
            settings[f"config.{name}"] = getattr(config, name, None)
    for full, value in settings.items():
        name = full.rpartition(".")[2]
        if not isinstance(value, bool | int | float | str) or not value or name in UNDERSTOOD or name == "training":
            continue
        if type(value) is int and SIZE.search(name):
            continue
        meaning = MEANINGS.get(name, "what it changes is not known, so the operator cannot stand for this attention")
        raise ValueError(f"{full}: expected none, got {value!r}; {meaning}")
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        if isinstance(rope, Mapping) and rope.get("llama_4_scaling_beta"):
            raise ValueError(
                f"config.{name}.llama_4_scaling_beta: expected none; the operator does not scale by position"
            )


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


class SparseAttention(nn.Module):
    """A `NativeSparseAttention` that is called as LlamaAttention is."""

    def __init__(self, where: str, attention: Any, op: Any, rotary_embedding: Any, packing: Packing) -> None:
        """Take the parts of `attention`, named `where` in errors; its layers share `packing`."""
        super().__init__()
        heads, dims, weight = op.SPEC["heads"], op.SPEC["head_dim"], attention.q_proj.weight
        wanted = {
            "q_proj": heads["query"] * dims["qk"],
            "k_proj": heads["kv"] * dims["qk"],
            "v_proj": heads["kv"] * dims["v"],
        }
        for name, size in wanted.items():
            found = getattr(attention, name).weight.shape[0]
            if found != size:
                raise ValueError(f"heads, head_dim: expected a spec whose {name} has {found} outputs, got {size}")
        scale = getattr(attention, "scaling", dims["qk"] ** -0.5)
        if not math.isclose(scale, scale_of(op), rel_tol=1e-6):
            raise ValueError(
                f"scale: expected {scale}, as {where}.scaling, got {scale_of(op)} (scale: {op.SPEC['scale']}); "
                f"write scale: {scale} in the spec"
            )
        self.encodes = bool(getattr(attention, "use_rope", True))
        self.head_dim = dims["qk"]
        self.packing = packing
        self.layer_type = getattr(attention, "layer_type", None) or getattr(attention, "attention_type", None)
        self._rotary_embedding = (rotary_embedding,)  # in a tuple, as it is the model's part and no part of this one
        if self.encodes:
            self._stacked(self._embed(weight.new_zeros(1, 1, weight.shape[1]), torch.zeros(1, 1).long()), 1, 1)
        self.sparse = op.NativeSparseAttention(
            weight.shape[1], rotary=_rotate if self.encodes else None, device=weight.device, dtype=weight.dtype
        )
        for name in PARTS:
            setattr(self.sparse, name, _part(attention, name, dims["qk"]))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: Any = None,
        max_length_k: Any = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """Attention output (B, T, hidden_size), and None where LlamaAttention returns its weights.

        Args:
            hidden_states: (B, T, hidden_size).
            position_embeddings: cosines and sines (1 or B, T, rotary dims); if None, of `position_ids`.
            attention_mask: None, or the mask (1, 1, T, T) that says what `cu_seq_lens_q` says.
            position_ids: (1 or B, T), rising by one but at the bounds of documents; if None, counted in each document.
            cu_seq_lens_q, cu_seq_lens_k: equal bounds (N + 1,) of the documents of a single row.
            max_length_q, max_length_k: come with them; not needed.
            more: has to be neutral.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if not isinstance(hidden_states, Tensor) or hidden_states.is_nested or hidden_states.dim() != 3:
            raise TypeError(f"hidden_states: expected a tensor (B, T, hidden_size), got {_shown(hidden_states)}")
        _refuse(more)
        batch, tokens = hidden_states.shape[:2]
        bounds = self.packing.bounds(
            hidden_states, position_ids, attention_mask, cu_seq_lens_q, cu_seq_lens_k, (max_length_q, max_length_k)
        )
        positions = None
        if self.encodes:
            if position_embeddings is None:
                if position_ids is None:
                    position_ids = self.packing.counted(tokens, bounds, hidden_states.device)
                position_embeddings = self._embed(hidden_states, position_ids)
            positions = self._stacked(position_embeddings, batch, tokens)
        if bounds is None:
            return self.sparse(hidden_states, positions=positions), None
        if positions is not None:
            positions = positions[:, 0]
        return self.sparse(hidden_states[0], cu_seqlens=bounds, positions=positions)[None], None

    def _embed(self, x: Tensor, positions: Tensor) -> Any:
        """The model's cosines and sines of positions (B, T), for the layer's type where it tells them apart."""
        (embedding,) = self._rotary_embedding
        told = inspect.signature(getattr(embedding, "forward", embedding)).parameters
        more = {"layer_type": self.layer_type} if self.layer_type is not None and "layer_type" in told else {}
        return embedding(x, positions.to(x.device), **more)

    def _stacked(self, found: Any, batch: int, tokens: int) -> Tensor:
        """Cosines and sines (2, 1 or B, T, R), after checks."""
        layout = f"(1 or B, T, at most {self.head_dim})"
        pair = isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(x, Tensor) for x in found)
        if not pair or not found[0].is_floating_point():
            raise TypeError(f"position_embeddings: expected cosines and sines {layout}, got {_shown(found)}")
        cos, sin = found
        rotary = cos.shape[-1] if cos.dim() == 3 else 0
        fits = cos.shape == sin.shape == (*cos.shape[:1], tokens, rotary) and cos.shape[0] in (1, batch)
        if not fits or rotary > self.head_dim or rotary % 2:
            shapes = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
            raise ValueError(
                f"position_embeddings: expected cosines and sines {layout} for B={batch}, T={tokens}, got {shapes}"
            )
        return torch.stack((cos, sin))


def scale_of(op: Any) -> float:
    """The factor of the logits of a generated package."""
    scale = op.SPEC["scale"]
    return op.SPEC["head_dim"]["qk"] ** -0.5 if scale == "auto" else float(scale)


def _rotate(x: Tensor, embeddings: Tensor) -> Tensor:
    """Turn the first dims of heads (..., H, D) by cosines and sines (2, ..., R), the pairs R / 2 apart."""
    cos, sin = embeddings.unsqueeze(-2)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest.to(turned.dtype)), dim=-1) if rest.shape[-1] else turned


def _part(attention: Any, name: str, head_dim: int) -> nn.Module:
    """A projection, and behind it the norm of its heads where there is one."""
    norm = getattr(attention, name.replace("_proj", "_norm"), None) if name in ("q_proj", "k_proj") else None
    projection = getattr(attention, name)
    return projection if norm is None or _does_nothing(norm) else NormedProjection(projection, norm, head_dim)


class NormedProjection(nn.Module):
    """A projection and a norm: of each head if its weight is a head's, else of all heads together."""

    def __init__(self, projection: nn.Module, norm: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.projection, self.norm, self.head_dim = projection, norm, head_dim
        weight = getattr(norm, "weight", None)
        self.whole = weight is not None and weight.dim() == 1 and weight.shape[0] != head_dim

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(x)
        return self.norm(x) if self.whole else self.norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)


class _Compared(nn.Module):
    """An attention module's output beside dense attention of the parts that `SparseAttention` takes."""

    def __init__(self, attention: Any, sparse: SparseAttention, op: Any) -> None:
        super().__init__()
        self.attention, self.encodes, self.op = attention, sparse.encodes, op
        self.head_dim = sparse.head_dim

    def forward(self, hidden: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hidden.shape[1]
        mask = torch.full((tokens, tokens), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        more = {"attention_mask": mask, "position_ids": torch.arange(tokens)[None]}
        theirs = self.attention(hidden_states=hidden, position_embeddings=tuple(embeddings), **more)[0]
        q, k, v = (_part(self.attention, name, self.head_dim)(hidden) for name in PARTS[:3])
        dims = self.op.SPEC["head_dim"]
        q, k, v = (x.unflatten(-1, (-1, dim)) for x, dim in ((q, dims["qk"]), (k, dims["qk"]), (v, dims["v"])))
        if self.encodes:
            q, k = _rotate(q, embeddings), _rotate(k, embeddings)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale_of(self.op), enable_gqa=True
        )
        return theirs, self.attention.o_proj(o.transpose(1, 2).flatten(-2))


def _check_result(where: str, attention: Any, sparse: SparseAttention, op: Any, drawn: dict[Any, Any]) -> None:
    """Raise unless the module computes what dense attention of its known parts does, for drawn weights on the CPU.

    `drawn` keeps the weights for layers of the same shapes. The module is copied, so that its config can ask for the
    plain implementation; its parts are shared and in evaluation mode meanwhile.
    """
    module = copy.copy(attention)
    if hasattr(getattr(module, "config", None), "_attn_implementation"):
        module.config = copy.copy(module.config)
        module.config._attn_implementation = "eager"
    compared = _Compared(module, sparse, op)
    shapes = tuple((name, tuple(x.shape)) for name, x in compared.named_parameters())
    generator = torch.Generator().manual_seed(0)
    if shapes not in drawn:
        drawn[shapes] = {
            name: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.3)
            + (1.0 if name.endswith("norm.weight") else 0.0)
            for name, shape in shapes
        }
    hidden = torch.randn(1, 6, attention.q_proj.weight.shape[1], generator=generator)
    rotary = 2
    if sparse.encodes:
        weight = attention.q_proj.weight
        rotary = sparse._embed(weight.new_zeros(1, 1, weight.shape[1]), torch.zeros(1, 1).long())[0].shape[-1]
    angles = 6 * torch.rand(1, 6, rotary // 2, generator=generator)
    angles = torch.cat((angles, angles), dim=-1)
    modes = [(part, part.training) for part in attention.modules()]
    try:
        compared.eval()
        with torch.no_grad():
            theirs, ours = functional_call(compared, drawn[shapes], (hidden, torch.stack((angles.cos(), angles.sin()))))
    except Exception as error:
        raise ValueError(f"{where}: cannot be compared with dense attention of its parts: {error}") from error
    finally:
        for part, mode in modes:
            part.training = mode
    largest, difference = float(theirs.abs().max()), float((theirs - ours).abs().max())
    if not difference <= 1e-3 * largest:
        raise ValueError(
            f"{where}: {type(attention).__name__} computes something else than projections, q_norm and k_norm, rotary "
            f"embedding of two halves and softmax: off by {difference:.2g} of {largest:.2g}"
        )


def _refuse(more: Mapping[str, Any]) -> None:
    """Raise for a keyword argument that says something, as none of them is used."""
    for name, value in more.items():
        if name in ("past_key_values", "past_key_value") and value is not None:
            raise ValueError(f"{name}: expected None; call the model with use_cache=False")
        if value is None or name in IGNORED or (isinstance(value, bool | int | float) and not value):
            continue
        raise ValueError(f"{name}: expected None, as the operator cannot use it, got {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    return f"{type(value).__name__} {value!r:.80}"
