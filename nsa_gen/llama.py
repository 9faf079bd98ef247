"""Running a model of the Llama architecture, as the transformers library builds it, with a generated operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def use_sparse_attention(model: Any, op: Any) -> Any:
    """Replace the attention of every layer of a Llama-like model by a generated package's; the model is changed.

    The model's projections and rotary embedding are kept; gates, and phi's parameters if the spec has any, are new and
    start as in `NativeSparseAttention`, so that a model must be trained on to be of use with a spec that has them.
    Key-value caches and padding are refused: `use_cache` is switched off, and batches hold sequences of one length,
    whose positions count from 0 whatever `position_ids` says.

    Args:
        model: with `model.layers[...].self_attn` (q_proj, k_proj, v_proj, o_proj) and `model.rotary_emb`, such as
            LlamaForCausalLM with `attn_implementation="sdpa"`.
        op: a generated package of the model's heads, head dim and dtype, whose branches share keys.

    Returns:
        the model.

    Raises:
        ValueError: the spec does not fit the model; names the field.
    """
    for layer in model.model.layers:
        layer.self_attn = SparseAttention(layer.self_attn, op, model.model.rotary_emb)
    model.config.use_cache = False
    return model


class SparseAttention(torch.nn.Module):
    """A `NativeSparseAttention` that is called as LlamaAttention is."""

    def __init__(self, attention: Any, op: Any, rotary_embedding: Any) -> None:
        """Take the projections of `attention`, and cosines and sines from `rotary_embedding(x, positions)`."""
        super().__init__()
        heads, dims, weight = op.SPEC["heads"], op.SPEC["head_dim"], attention.q_proj.weight
        if op.SPEC["kv"] != "shared":
            raise ValueError(f"kv: expected shared, as the model has one pair of keys and values, got {op.SPEC['kv']}")
        wanted = {
            "q_proj": heads["query"] * dims["qk"],
            "k_proj": heads["kv"] * dims["qk"],
            "v_proj": heads["kv"] * dims["v"],
        }
        for name, size in wanted.items():
            found = getattr(attention, name).weight.shape[0]
            if found != size:
                raise ValueError(f"heads, head_dim: expected a spec whose {name} has {found} outputs, got {size}")

        def rotary(x: Tensor, positions: Tensor) -> Tensor:
            cos, sin = (y.unsqueeze(-2) for y in rotary_embedding(x, positions))
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-second, first), dim=-1) * sin

        self.sparse = op.NativeSparseAttention(weight.shape[1], rotary=rotary, device=weight.device, dtype=weight.dtype)
        for name in (*wanted, "o_proj"):
            setattr(self.sparse, name, getattr(attention, name))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **more: Any) -> tuple[Tensor, None]:
        """Attention output (B, T, hidden_size), and None where LlamaAttention returns its weights."""
        if attention_mask is not None:
            raise ValueError(
                'attention_mask: expected None; load the model with attn_implementation="sdpa", no padding'
            )
        for name in ("past_key_values", "past_key_value"):
            if more.get(name) is not None:
                raise ValueError(f"{name}: expected None; call the model with use_cache=False")
        return self.sparse(hidden_states), None
