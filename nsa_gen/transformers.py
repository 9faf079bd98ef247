"""Models of the transformers library with a generated operator: replaced and put back, padded batches, generation."""

from __future__ import annotations

import os
import weakref
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nsa_gen._packing import Packing
from nsa_gen.llama import SparseAttention, use_sparse_attention
from nsa_gen.loading import load
from nsa_gen.spec import Spec


def apply_sparse_attention(model: Any, spec: Spec | ModuleType | str | os.PathLike[str]) -> Any:
    """Replace the attention of every layer of a Llama, Qwen 2, Qwen 3 or Mistral model, or of a similar one.

    `nsa_gen.llama.use_sparse_attention` says what is replaced, kept and refused. In addition, batches may be padded on
    either side, with an `attention_mask` (B, T) in the model's call: the tokens are packed for attention, and outputs
    of padding are 0. `new_cache` makes a cache for `model.generate`. A model that already has this operator is returned
    unchanged. `remove_sparse_attention` restores the model's own attention.

    Args:
        model: such as `LlamaForCausalLM`, loaded with `attn_implementation="sdpa"`.
        spec: a Spec, a spec's path or shipped name, or a generated package, with the model's heads, head dim and scale.

    Returns:
        the same model.

    Raises:
        TypeError: the model has another structure.
        ValueError: the spec does not fit the model, the operator cannot compute its attention (soft caps, sliding
            windows, latent attention, ...), or the model has another operator; the message names the field.
    """
    op = spec if isinstance(spec, ModuleType) else load(spec)
    layers = getattr(getattr(model, "model", None), "layers", None) or ()
    present = [layer.self_attn for layer in layers if isinstance(getattr(layer, "self_attn", None), SparseAttention)]
    if present and len(present) == len(layers) and all(isinstance(x, PaddedAttention) for x in present):
        other = {str(each.op.SPEC["name"]) for each in present if each.op is not op}
        if not other:
            return model
        raise ValueError(
            f"spec: expected {', '.join(sorted(other))}, whose operator the model has, got {op.SPEC['name']}; call "
            "remove_sparse_attention(model) first"
        )
    used = getattr(getattr(model, "config", None), "use_cache", None)
    use_sparse_attention(model, op, PaddedAttention)
    padding = _Padding()
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.number, layer.self_attn.padding = number, padding
        layer.self_attn.used_cache = used
    return model


def remove_sparse_attention(model: Any) -> Any:
    """Restore the model's own attention, with the current weights of the projections; gates and phi are dropped.

    Raises:
        ValueError: `apply_sparse_attention` has not changed this model.
    """
    layers = getattr(getattr(model, "model", None), "layers", None) or ()
    if not layers or not all(isinstance(getattr(layer, "self_attn", None), PaddedAttention) for layer in layers):
        raise ValueError(f"model: expected one of apply_sparse_attention, got a {type(model).__name__} as it was")
    model.config.use_cache = layers[0].self_attn.used_cache
    for layer in layers:
        (layer.self_attn,) = layer.self_attn.replaced
    return model


def new_cache(model: Any, *, batch: int, capacity: int, **more: Any) -> Any:
    """Make the operator's transformers `Cache`, for ``model.generate(..., cache=cache, use_cache=True)``.

    If models of a transformers version take no `cache`, pass it as past_key_values. Use each cache for one `generate`.

    Args:
        model: a model from `apply_sparse_attention`, with a spec whose passes include decode.
        batch: number of sequences.
        capacity: most tokens of a sequence, prompt and answer together.
        more: other arguments of the package's `NSACache`, such as page_size and max_new_tokens.

    Raises:
        ValueError: `apply_sparse_attention` has not changed this model, or its spec has no decode pass.
    """
    layers = getattr(getattr(model, "model", None), "layers", None) or ()
    if not layers or not isinstance(layers[0].self_attn, PaddedAttention):
        raise ValueError(f"model: expected one of apply_sparse_attention, got a {type(model).__name__} as it was")
    op = layers[0].self_attn.op
    if not hasattr(op, "NSACache"):
        raise ValueError(f"passes: expected a spec with decode, got {', '.join(op.SPEC['passes'])}")
    device = next(layers[0].self_attn.sparse.parameters()).device
    return _cache_type()(op.NSACache(batch, capacity, layers=len(layers), device=device, **more))


class PaddedAttention(SparseAttention):
    """A `SparseAttention` that packs padded batches and takes a cache of `new_cache`."""

    number: int
    padding: _Padding
    used_cache: bool | None

    def __init__(self, where: str, attention: Any, op: Any, rotary_embedding: Any, packing: Packing) -> None:
        super().__init__(where, attention, op, rotary_embedding, packing)
        self.op = op
        self.replaced = (attention,)  # in a tuple, as its parts are this one's already
        self.hidden_size = attention.q_proj.weight.shape[1]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        cache: Any = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """Attention output (B, T, hidden_size), and None where LlamaAttention returns its weights.

        Args:
            hidden_states: (B, T, hidden_size).
            position_embeddings: cosines and sines (1 or B, T, rotary dims).
            attention_mask: None, or (1 or B, 1, T, Tkv): causal, without padded keys.
            cache, past_key_values: one cache of `new_cache`, or None.
            more: as in `SparseAttention`.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        cache = past_key_values if cache is None else cache
        packed = more.get("cu_seq_lens_q") is not None
        if packed or (cache is None and attention_mask is None):
            if cache is not None:
                raise ValueError("cache: expected None with cu_seq_lens_q, got a cache")
            return super().forward(hidden_states, position_embeddings, attention_mask, **more)
        if position_embeddings is None:
            raise ValueError("position_embeddings: expected cosines and sines with a mask or a cache, got None")
        batch, tokens = hidden_states.shape[:2]
        positions = (
            self._stacked(position_embeddings, batch, tokens).expand(-1, batch, -1, -1) if self.encodes else None
        )
        if cache is not None:
            return self._cached(hidden_states, positions, attention_mask, cache), None
        found = self.padding.of(attention_mask, batch, tokens)
        rows, bounds = found.rows, found.bounds
        if positions is not None:
            positions = positions.flatten(1, 2)[:, rows]
        o = self.sparse(hidden_states.flatten(0, 1)[rows], cu_seqlens=bounds, positions=positions)
        whole = o.new_zeros(batch * tokens, o.shape[-1]).index_copy(0, rows, o)
        return whole.unflatten(0, (batch, tokens)), None

    def _cached(self, hidden: Tensor, positions: Tensor | None, mask: Tensor | None, cache: Any) -> Tensor:
        """Write the new tokens' keys and values, and attend to all; tokens of a padded prompt move to the left."""
        if not hasattr(cache, "step_of"):
            raise ValueError(f"cache: expected one of nsa_gen.transformers.new_cache, got {type(cache).__name__}")
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise ValueError("cache: expected None where a gradient is wanted; call under torch.no_grad()")
        order = cache.step_of(self.number, mask, *hidden.shape[:2])
        if order is None:
            return self.sparse(hidden, positions=positions, cache=cache.kept, layer=self.number)
        index = order[..., None]
        moved = hidden.gather(1, index.expand_as(hidden))
        if positions is not None:
            positions = positions.gather(2, index[None].expand_as(positions))
        o = self.sparse(moved, positions=positions, cache=cache.kept, layer=self.number)
        return torch.zeros_like(o).scatter(1, index.expand_as(o), o)


class _Rows:
    """Tokens of a padded batch: their rows in (B * T), and bounds (B + 1,) int32."""

    def __init__(self, valid: Tensor) -> None:
        self.rows = valid.flatten().nonzero()[:, 0]
        counts = valid.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.bounds = torch.nn.functional.pad(counts, (1, 0))


class _Padding:
    """What the layers of a model, which get the same mask one after the other, found in it."""

    def __init__(self) -> None:
        self._last: tuple[Any, int, _Rows] | None = None

    def __reduce__(self) -> tuple[type[_Padding], tuple[()]]:
        return _Padding, ()

    def of(self, mask: Tensor | None, batch: int, tokens: int) -> _Rows:
        """The tokens that a mask (1 or B, 1, T, T) leaves; the values are waited for, once in a forward."""
        if not isinstance(mask, Tensor) or mask.shape not in {(each, 1, tokens, tokens) for each in (1, batch)}:
            shown = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: expected (1 or B, 1, T, T) for B={batch}, T={tokens}, got {shown}")
        version = 0 if mask.is_inference() else mask._version
        if self._last is not None and self._last[0]() is mask and self._last[1] == version:
            return self._last[2]
        seen = _seen(mask).expand(batch, -1, -1)
        valid = seen[:, -1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
        wanted_mask = causal & valid[:, None]
        if not bool(((seen == wanted_mask) | ~valid[..., None]).all()):
            raise ValueError(
                "attention_mask: expected a causal mask without padded keys; rows of several documents need "
                "cu_seq_lens_q and cu_seq_lens_k"
            )
        found = _Rows(valid)
        self._last = weakref.ref(mask), version, found
        return found


def _seen(mask: Tensor) -> Tensor:
    """Which keys a mask (B, 1, T, Tkv) shows: (B, T, Tkv) bool."""
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0


def _cache_type() -> Any:
    """The class of caches; made here, as transformers is imported by nothing else."""
    try:
        from transformers.cache_utils import Cache
    except ImportError as error:
        raise ImportError("transformers: needed for its Cache; install it with nsa-gen[peers]") from error

    class SparseCache(Cache):
        """Keys and values of all layers in an `NSACache`; what transformers counts includes padding."""

        def __init__(self, kept: Any) -> None:
            super().__init__(layers=[])
            self.kept, self._columns, self._order = kept, 0, None

        def step_of(self, layer: int, mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
            """Make room for new tokens, at the first layer; the order (B, T) that moves them left, None as they are."""
            if layer:
                return self._order
            if batch != len(self.kept.tokens):
                raise ValueError(f"cache: expected a batch of {len(self.kept.tokens)}, got {batch}")
            self._order, new = None, [tokens] * batch
            if mask is not None:
                columns = self._columns + tokens
                if mask.dim() != 4 or mask.shape[-2:] != (tokens, columns):
                    wanted = f"(1 or B, 1, {tokens}, {columns})"
                    raise ValueError(f"attention_mask: expected {wanted}, got {tuple(mask.shape)}")
                seen = _seen(mask).expand(batch, -1, -1)
                valid = seen[:, -1, -tokens:]
                new = valid.sum(1).tolist()
                wanted_keys = [old + more for old, more in zip(self.kept.tokens, new, strict=True)]
                if seen[:, -1].sum(1).tolist() != wanted_keys:
                    raise ValueError("attention_mask: expected all tokens of the cache to be seen, got another mask")
                if min(new) < tokens:
                    self._order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
            self.kept.extend(new)
            self._columns += tokens
            return self._order

        def get_seq_length(self, layer_idx: int = 0, *_: Any) -> int:
            return self._columns

        def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
            if isinstance(query_length, Tensor):  # positions, in versions before 5
                query_length = query_length.shape[0]
            return self._columns + query_length, 0

        def get_max_length(self, *_: Any) -> int:
            return self.kept.layout.capacity

        def get_query_offset(self, layer_idx: int = 0) -> int:
            return self._columns

        get_max_cache_shape = get_max_length
        is_compileable = False
        is_initialized = True
        is_sliding: list[bool] = [False]  # noqa: RUF012  as the class above declares it

        def update(self, *_: Any, **__: Any) -> Any:
            raise ValueError("cache: expected a model of apply_sparse_attention, got one with its own attention")

    return SparseCache
