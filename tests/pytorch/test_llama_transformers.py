"""Models of the transformers library with a generated operator in place of their attention; skipped without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_gen.llama import use_sparse_attention
from tests.pytorch.llama_like import TOKENS, WIDTH, whole_window
from tests.support import DEVICE

transformers = pytest.importorskip("transformers")


def model_of(kind: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(6)
    settings: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50, "attn_implementation": "sdpa",
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(DEVICE)


def tokens_of(tokens: int = TOKENS) -> Any:
    return torch.arange(1, tokens + 1, device=DEVICE)[None]


@pytest.mark.parametrize(
    ("kind", "changes", "spec"),
    [
        ("Llama", {}, {}),
        ("Qwen2", {}, {}),
        ("Qwen3", {}, {}),
        ("Olmo2", {}, {}),
        ("StableLm", {}, {}),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, {}),
        ("Granite", {"attention_multiplier": 0.125}, {"scale": 0.125}),
    ],
)
def test_a_model_runs_with_it(kind: str, changes: dict[str, Any], spec: dict[str, Any]) -> None:
    model = model_of(kind, **changes).eval()
    with torch.no_grad():
        expected = model(tokens_of()).logits
        found = use_sparse_attention(model, whole_window(**spec))(tokens_of()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "name"),
    [
        ("Cohere", {}, "CohereAttention computes something else"),
        ("Glm", {}, "GlmAttention computes something else"),
        ("Mistral", {"sliding_window": 4096}, "sliding_window"),
        ("Gemma2", {"layer_types": ["full_attention"] * 2, "attn_implementation": "eager"}, "attn_logit_softcapping"),
        ("Olmo", {"clip_qkv": 8.0}, "clip_qkv"),
        ("Llama", {"attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_a_model_of_which_something_would_be_lost_is_refused_by_name(
    kind: str, changes: dict[str, Any], name: str
) -> None:
    model = model_of(kind, **changes)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=name):
        use_sparse_attention(model, whole_window())
    assert dict(model.named_modules()) == before and model.config.use_cache


def test_sinks_of_a_real_model_are_refused_by_name() -> None:
    model = model_of("GptOss", attn_implementation="eager", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="sinks"):
        use_sparse_attention(model, whole_window())


@pytest.mark.parametrize("positions", [True, False])
def test_documents_of_a_padding_free_batch_do_not_see_each_other(positions: bool) -> None:
    model = model_of("Qwen3").eval()
    bounds = torch.tensor([0, 5, TOKENS], dtype=torch.int32, device=DEVICE)
    batch: dict[str, Any] = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    restarting = torch.cat((torch.arange(5), torch.arange(TOKENS - 5)))[None].to(DEVICE)
    if positions:  # from which transformers makes a mask
        batch["position_ids"] = restarting
    with torch.no_grad():
        expected = torch.cat([model(tokens_of()[:, :5]).logits, model(tokens_of()[:, 5:]).logits], dim=1)
        use_sparse_attention(model, whole_window())
        torch.testing.assert_close(model(tokens_of(), **batch).logits, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"^attention_mask: .* cu_seq_lens_q"):
            model(tokens_of(), position_ids=restarting)


def test_a_model_trains_and_writes_with_it() -> None:
    model, dense = (model_of() for _ in range(2))
    use_sparse_attention(model, whole_window())
    tokens = tokens_of(TOKENS - 1) % 50
    for each in (model, dense):
        optimiser = torch.optim.SGD(each.parameters(), lr=0.1)
        each(tokens, labels=tokens, num_items_in_batch=TOKENS - 2).loss.backward()
        optimiser.step()
    assert all(x.grad is not None for x in model.parameters())
    told = {"max_new_tokens": 2, "do_sample": False, "use_cache": False}
    written, expected = (each.eval().generate(tokens[:, :5], **told) for each in (model, dense))
    assert written.shape == (1, 7) and torch.equal(written, expected)
