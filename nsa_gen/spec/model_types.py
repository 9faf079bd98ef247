"""Where the config.json of each type of model says what its attention is: facts of the models' public classes.

A type that is not here is refused, since a config does not say by itself what its class makes of it: defaults that are
not written, scales of its own, flags that overrule counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelType:
    """Names of the fields of a type of model; a dot leads into an object.

    Attributes:
        query, kv, head_dim, hidden: numbers of query and key heads, elements of a head, and the width of the model. Key
            heads that are nowhere named are as many as the query heads, a head's elements the width over these.
        defaults: what the class takes for fields that the config does not have.
        rule: how flags decide the number of key heads: "falcon", "chatglm", "mpt", "nas", or "" where none do.
        latent: multi-head latent attention, whose scale has YaRN's factor for all dims.
        scale: a factor of the logits that no field says.
        notes: what else changes the attention, by the key of `NOTES`.
        unread: fields that look as if they did, and that the class does not read.
    """

    query: tuple[str, ...] = ("num_attention_heads",)
    kv: tuple[str, ...] = ("num_key_value_heads",)
    head_dim: tuple[str, ...] = ("head_dim",)
    hidden: tuple[str, ...] = ("hidden_size",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rule: str = ""
    latent: bool = False
    scale: float | None = None
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def _grouped(kv: int, head_dim: int | None = None, **more: Any) -> ModelType:
    """Fields as in Llama, with other defaults; `notes`, `scale` and `unread` are the type's."""
    own = {name: more.pop(name) for name in ("notes", "scale", "unread") if name in more}
    sizes = {"num_key_value_heads": kv} | ({"head_dim": head_dim} if head_dim else {})
    return ModelType(defaults=sizes | more, **own)


_LLAMA = ModelType()
_QWEN2 = {"use_sliding_window": False}
_QWEN3: dict[str, Any] = {"notes": ("qk_norm",), "use_sliding_window": False}
_GEMMA2 = {"query_pre_attn_scalar": 256, "sliding_window": 4096}
_GRANITE = ModelType(defaults={"attention_multiplier": 1.0})
_GPT2 = {"query": ("n_head", "num_attention_heads"), "kv": (), "hidden": ("n_embd", "hidden_size")}
_MHA = ModelType(kv=())
_LATENT = ModelType(latent=True)
_T5 = ModelType(
    ("num_heads",), (), ("d_kv",), ("d_model",), {"d_kv": 64}, scale=1.0, notes=("relative_attention_num_buckets",)
)
_REFINED_WEB = {"query": ("n_head", "num_attention_heads"), "kv": ("n_head_kv", "num_kv_heads"), "rule": "falcon"}

MODEL_TYPES: Mapping[str, ModelType] = MappingProxyType(
    {
        **dict.fromkeys(
            ("apertus", "arcee", "aria_text", "cohere", "deepseek", "exaone", "internlm", "internlm2",
             "internlm3", "llama", "minicpm", "nemotron", "olmo2", "olmoe", "orion", "phi", "phi3", "phi3_v",
             "xverse", "yi"), _LLAMA
        ),
        **dict.fromkeys(("granite", "granitemoe", "granitemoehybrid", "granitemoeshared"), _GRANITE),
        **dict.fromkeys(("gpt_neox", "gpt_neox_japanese", "opt"), _MHA),
        **dict.fromkeys(
            ("hunyuan_v1_dense", "hunyuan_v1_moe"),
            ModelType(head_dim=("head_dim", "attention_head_dim"), notes=("qk_norm",)),
        ),
        "baichuan": ModelType(kv=(), notes=("alibi_13b",)),
        **dict.fromkeys(("gpt2", "gpt-sw3", "openai-gpt", "gptj", "codegen"), ModelType(**_GPT2)),
        **dict.fromkeys(
            ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2",
             "longcat_flash", "minicpm3", "mistral4", "youtu"), _LATENT
        ),
        **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
        "bamba": _grouped(8),
        "bitnet": _grouped(5),
        "bloom": ModelType(
            ("n_head", "num_attention_heads"), (), hidden=("n_embed", "hidden_size"), notes=("alibi",)
        ),
        "btlm": ModelType(**_GPT2),
        "chatglm": ModelType(
            kv=("multi_query_group_num",), head_dim=("kv_channels",), defaults={"kv_channels": 128}, rule="chatglm"
        ),
        "cohere2": ModelType(defaults={"sliding_window": 4096}),
        "cwm": _grouped(8, 128, sliding_window=8192),
        "dbrx": ModelType(
            ("n_heads",), ("attn_config.kv_n_heads",), hidden=("d_model",), defaults={"attn_config.kv_n_heads": 1}
        ),
        "deci": ModelType(kv=("num_key_value_heads_per_layer", "num_key_value_heads")),
        "dots1": _grouped(32, notes=("qk_norm",)),
        "ernie4_5": _grouped(2, 128),
        "ernie4_5_moe": _grouped(4),
        "exaone4": _grouped(32, sliding_window=4096, notes=("qk_norm",)),
        "falcon": ModelType(kv=("num_kv_heads",), defaults={"multi_query": True}, rule="falcon"),
        "falcon_h1": _grouped(8, notes=("hybrid",)),
        "gemma": _grouped(16, 256),
        "gemma2": _grouped(4, 256, attn_logit_softcapping=50.0, **_GEMMA2),
        "gemma3_text": _grouped(4, 256, notes=("qk_norm",), **_GEMMA2),
        "gemma3n_text": _grouped(2, 256, sliding_window=512, scale=1.0, notes=("qk_norm",)),
        "gemma4_text": _grouped(4, 256, sliding_window=512, global_head_dim=512, scale=1.0, notes=("qk_norm",)),
        "glm": _grouped(2, 128),
        "glm4": _grouped(2, 128),
        "glm4_moe": _grouped(8),
        "glm4v_text": _grouped(2),
        "glm4v_moe_text": _grouped(8),
        "gpt_bigcode": ModelType(**{**_GPT2, "kv": ("num_key_value_heads",)}, defaults={"multi_query": True}),
        "gpt_neo": ModelType(
            ("num_heads", "num_attention_heads"), (), defaults={"window_size": 256}, scale=1.0
        ),
        "gpt_oss": _grouped(8, 64, sliding_window=128, notes=("sinks",)),
        "helium": _grouped(20, 128),
        **dict.fromkeys(
            ("hf_olmo", "olmo"),
            ModelType(
                ("num_attention_heads", "n_heads"), ("num_key_value_heads", "n_kv_heads"),
                hidden=("hidden_size", "d_model"),
            ),
        ),
        "jamba": _grouped(8, notes=("hybrid",)),
        "lfm2": _grouped(8, notes=("hybrid", "qk_norm")),
        "llama4_text": _grouped(8, 128, attention_chunk_size=8192, use_qk_norm=True, attn_temperature_tuning=True),
        "mimo": ModelType(defaults=_QWEN2),
        "mimo_v2_flash": _grouped(
            4, 192, v_head_dim=128, sliding_window=128, attention_value_scale=0.707, add_swa_attention_sink_bias=True,
            unread=("attention_chunk_size", "sliding_window_size"),
        ),
        "minimax_m2": _grouped(8, 128, notes=("qk_norm",)),
        "ministral": _grouped(8, sliding_window=4096),
        "ministral3": _grouped(8, 128),
        "mistral": _grouped(8, sliding_window=4096),
        "mixtral": _grouped(8),
        "mllama_text_model": _grouped(8),
        "mpt": ModelType(
            ("n_heads",), ("attn_config.kv_n_heads",), hidden=("d_model",), rule="mpt",
            defaults={"attn_config.attn_type": "multihead_attention", "attn_config.alibi": True},
        ),
        "nanochat": ModelType(notes=("qk_norm",)),
        "nemotron-nas": ModelType(rule="nas"),
        "nemotron_h": ModelType(
            head_dim=("attention_head_dim", "head_dim"), defaults={"num_key_value_heads": 8, "head_dim": 128},
            notes=("hybrid",),
        ),
        "olmo3": ModelType(defaults={"sliding_window": 4096}, notes=("qk_norm",)),
        "openelm": ModelType(("num_query_heads",), ("num_kv_heads",), hidden=("model_dim",)),
        "persimmon": ModelType(kv=(), notes=("qk_norm",)),
        "phi3small": _grouped(8, mup_use_scaling=True, mup_attn_multiplier=1.0),
        "phi4mm": _grouped(8),
        "phi4_multimodal": _grouped(8),
        "phimoe": _grouped(8),
        "qwen": ModelType(kv=(), head_dim=("kv_channels", "head_dim"), defaults={"kv_channels": 128}),
        "qwen2": _grouped(32, **_QWEN2),
        "qwen2_moe": _grouped(16, **_QWEN2),
        **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), _grouped(8, **_QWEN2)),
        "qwen2_5_omni_text": _grouped(4, **_QWEN2),
        "qwen3": _grouped(32, 128, **_QWEN3),
        "qwen3_moe": _grouped(4, **_QWEN3),
        "qwen3_next": _grouped(2, 256, notes=("qk_norm", "hybrid", "output_gate")),
        "qwen3_5_text": _grouped(4, 256, notes=("qk_norm", "hybrid", "output_gate")),
        "qwen3_5_moe_text": _grouped(2, 256, notes=("qk_norm", "hybrid", "output_gate")),
        "qwen3_vl_text": _grouped(32, 128, **_QWEN3),
        "qwen3_vl_moe_text": _grouped(16, **_QWEN3),
        "qwen3_omni_moe_text": _grouped(4, **_QWEN3),
        "recurrent_gemma": ModelType(defaults={"attention_window_size": 2048}, notes=("hybrid",)),
        "RefinedWeb": ModelType(**_REFINED_WEB),
        "RefinedWebModel": ModelType(**_REFINED_WEB, defaults={"multi_query": True}),
        "seed_oss": _grouped(8, 128),
        "smollm3": _grouped(4),
        "solar_open": _grouped(8, 128),
        "stablelm": _grouped(32),
        "starcoder2": _grouped(2),
        "vaultgemma": _grouped(4, 256, attn_logit_softcapping=50.0, **_GEMMA2),
        "xglm": ModelType(("attention_heads", "num_attention_heads"), (), hidden=("d_model",)),
    }
)  # fmt: skip
"""Types by the name that a config has as `model_type`."""

TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "language_model", "text_model")
"""Names of the part of a model of text and more that has the text's attention; one may lie in another."""

NOTES: Mapping[str, str] = MappingProxyType(
    {
        "attn_logit_softcapping": "the model caps logits; a spec has no cap of logits, so the operator does not",
        "sliding_window": "some layers attend only to this many recent tokens; the operator does not",
        "attention_window_size": "the model attends only to this many recent tokens; the operator does not",
        "window_size": "some layers attend only to this many recent tokens; the operator does not",
        "attn_config.sliding_window_size": "the model attends only to this many recent tokens; the operator does not",
        "attention_chunk_size": "some layers attend within chunks of this many tokens; the operator does not",
        "alibi": "the model adds a bias by distance to the logits (ALiBi); the operator does not",
        "attn_config.alibi": "the model adds a bias by distance to the logits (ALiBi); the operator does not",
        "relative_attention_num_buckets": "the model adds a learned bias by distance to the logits; the operator does "
        "not",
        "sinks": "the model's softmax has a learned sink per head; the operator's has none",
        "add_swa_attention_sink_bias": "softmax of some layers has a learned sink per head; the operator has none",
        "add_full_attention_sink_bias": "softmax of some layers has a learned sink per head; the operator has none",
        "clip_qkv": "queries, keys and values are clipped before attention; that stays outside the operator",
        "attn_config.clip_qkv": "queries, keys and values are clipped before attention; that stays outside the "
        "operator",
        "qk_norm": "queries and keys are normalised before attention; that stays outside the operator",
        "use_qk_norm": "queries and keys are normalised before attention; that stays outside the operator",
        "qk_layernorm": "queries and keys are normalised before attention; that stays outside the operator",
        "attn_config.qk_ln": "queries and keys are normalised before attention; that stays outside the operator",
        "attn_temperature_tuning": "queries are scaled by their position; that stays outside the operator",
        "attention_value_scale": "values are scaled before attention; that stays outside the operator",
        "attention_layer_norm": "queries and keys are normalised before attention; that stays outside the operator",
        "alibi_13b": "models of size 13B add a bias by distance to the logits (ALiBi); the operator does not",
        "use_logn_attn": "queries are scaled by their position; that stays outside the operator",
        "key_multiplier": "keys are scaled before attention; that stays outside the operator",
        "output_gate": "the output of attention has its own gate; that stays outside the operator",
        "attention_dropout": "the operator has no dropout",
        "attn_pdrop": "the operator has no dropout",
        "attn_config.attn_pdrop": "the operator has no dropout",
        "blocksparse_block_size": "some layers attend to fixed blocks; the operator selects blocks",
        "index_topk": "the model selects keys with its own indexer; the operator does not",
        "global_head_dim": "full-attention layers have heads of this size; the spec has the size of the other layers",
        "num_global_key_value_heads": "full-attention layers have this many KV heads; the spec has the number of "
        "the other layers",
        "swa_num_key_value_heads": "window layers have this many KV heads; the spec has the number of the other layers",
        "swa_num_attention_heads": "window layers have this many heads; the spec has the number of the other layers",
        "swa_head_dim": "window layers have heads of this size; the spec has the size of the other layers",
        "swa_v_head_dim": "window layers have value heads of this size; the spec has the size of the other layers",
        "hybrid": "some layers of the model have no attention; the spec describes the others",
    }
)
"""What a field, where it has a value, or a type means for attention that a spec does not say."""

WITHOUT_EFFECT = frozenset(
    ("final_logit_softcapping", "alibi_bias_max", "logits_soft_cap", "max_window_layers", "sliding_window_pattern",
     "mup_width_scale", "_sliding_window_pattern", "use_sliding_window", "mup_embeddings_scale",
     "chunk_size_feed_forward", "chunk_size", "attn_scale", "floor_scale", "qk_norm_type", "softmax_in_fp32",
     "scale_attention_softmax_in_fp32", "attention_softmax_in_fp32", "apply_query_key_layer_scaling",
     "softmax_bias", "qk_head_dim")
)  # fmt: skip
"""Fields whose names look as if they changed what attention computes, and which do not, or are read with others."""

SUSPICIOUS = re.compile(
    r"softmax|soft_?cap|logit_cap|(attn|attention|qk)_scal|scale_(attn|qk)|mup_.*(attn|qk|scal)|attention_mult|alibi"
    r"|sink|sliding|window|chunk_size|multi_?query|kv_?(n_)?heads?|key_value_heads|heads?_kv|heads_in_group|head_dim"
    r"|d_kv|kv_channels|qk_(layer_?)?norm|qk_ln|clip_qkv|relative_attention|use_cla"
)
"""Names of fields that may change what attention computes."""

ELSEWHERE = re.compile(r"^(mamba|ssm|linear|index|vision|audio|image|video|encoder|router|moe|conv)_")
"""Names of fields of other parts of a model."""

ATTENTION = re.compile(r"head|attn|attention|kv|qk|query|scal|rope|rotary|window|softcap|alibi|mup")
"""Names of fields that a type that is not known may use for its attention."""
