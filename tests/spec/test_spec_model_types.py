"""The table of model types against the classes of the transformers library; skipped without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nsa_gen.spec.huggingface import ModelShape, read_config
from nsa_gen.spec.model_types import MODEL_TYPES

transformers = pytest.importorskip("transformers")

HEADS = 160  # a multiple of every default number of key heads
SCALES = ("scaling", "softmax_scale", "inv_norm_factor")


def shape_of(path: Path, config: dict[str, Any]) -> ModelShape:
    file = path / "config.json"
    file.write_text(json.dumps(config))
    return read_config(file)


def attention_of(config: Any) -> nn.Module:
    """The first module of a model of `config` that has a scale and is no other model's."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = (x for x in model.modules() if "Attention" in type(x).__name__ and any(hasattr(x, s) for s in SCALES))
    return next(found)


@pytest.mark.parametrize("kind", sorted(MODEL_TYPES))
def test_a_config_of_few_fields_is_completed_as_the_class_of_its_type_does(kind: str, tmp_path: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        pytest.skip("its class lies with the model")
    made = CONFIG_MAPPING[kind]
    row = MODEL_TYPES[kind]
    known = made().to_dict()
    query, hidden = (next((n for n in names if n in known), "") for names in (row.query, row.hidden))
    if not query:
        pytest.skip("its class keeps the text's fields in a part")
    fields = {query: HEADS, hidden: HEADS * 64}
    latent = {n: known[n] for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim") if row.latent}
    shape = shape_of(tmp_path, {"model_type": kind, **fields, **latent})
    config = made(**fields)
    kv = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", HEADS)
    if kind == "falcon":
        kv = 1
    if kind == "dbrx":
        kv = config.attn_config.kv_n_heads
    assert shape.heads.query == HEADS
    assert shape.heads.kv == (HEADS if row.latent else kv)
    if not row.latent and kind != "gemma4_text":
        assert shape.head_dim.qk == (getattr(config, "head_dim", None) or getattr(config, "d_kv", 64))


@pytest.mark.parametrize(
    "kind",
    ["llama", "granite", "gemma2", "gemma3_text", "deepseek_v2", "deepseek_v3", "qwen3", "qwen2", "mistral", "olmo2",
     "cohere", "glm4", "gpt_neox", "phi3", "smollm3", "ministral3", "helium", "exaone4", "mpt", "bloom", "falcon",
     "nemotron", "starcoder2", "vaultgemma", "gpt_oss"],
)  # fmt: skip
def test_the_scale_of_a_config_is_the_one_its_attention_computes_with(kind: str, tmp_path: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[kind]().to_dict()
    small = {"num_hidden_layers": 1, "n_layers": 1, "n_layer": 1, "vocab_size": 64, "pad_token_id": 0,
             "layer_types": None, "first_k_dense_replace": 1}  # fmt: skip
    small = {name: value for name, value in small.items() if name in known}
    if kind.startswith("deepseek"):
        small["rope_parameters"] = {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        }  # fmt: skip
    if kind == "bloom":
        small["hidden_size"] = 512
    if kind == "nemotron":
        small["num_key_value_heads"] = 8
    config = CONFIG_MAPPING[kind](**small)
    attention = attention_of(config)
    scale = next(getattr(attention, name) for name in SCALES if hasattr(attention, name))
    shape = shape_of(tmp_path, json.loads(config.to_json_string(use_diff=False)))
    assert (shape.head_dim.qk**-0.5 if shape.scale == "auto" else shape.scale) == pytest.approx(float(scale))
