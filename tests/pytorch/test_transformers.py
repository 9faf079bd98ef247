"""`apply_sparse_attention`: on a model of the same parts, and on the transformers library's where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.llama import use_sparse_attention
from nsa_gen.transformers import PaddedAttention, apply_sparse_attention, new_cache, remove_sparse_attention
from tests.pytorch.llama_like import TOKENS, WIDTH, Model, whole_window
from tests.support import DEVICE, operator_of

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the transformers library"
)


def whole(**changes: Any) -> Any:
    """A package whose window holds all tokens of a test, so that it computes dense attention."""
    return whole_window(**changes).module


def hidden_of(batch: int = 2) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(batch, TOKENS, WIDTH, device=DEVICE)


def mask_of(valid: Tensor) -> Tensor:
    """The mask (B, 1, T, T) that transformers makes of a padded batch's (B, T)."""
    return (valid[:, None] & torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=valid.device).tril())[:, None]


def padded(left: bool) -> Tensor:
    lengths = torch.tensor([TOKENS, 5], device=DEVICE)[:, None]
    places = torch.arange(TOKENS, device=DEVICE)
    return places >= TOKENS - lengths if left else places < lengths


def test_it_is_applied_once_and_put_back() -> None:
    model = Model().to(DEVICE)
    own = [layer.self_attn for layer in model.model.layers]
    before = model(hidden_of())
    op = whole()
    assert apply_sparse_attention(model, op) is model
    replaced = [layer.self_attn for layer in model.model.layers]
    assert all(isinstance(each, PaddedAttention) for each in replaced) and model.config.use_cache is False
    assert apply_sparse_attention(model, op) is model
    assert [layer.self_attn for layer in model.model.layers] == replaced
    with pytest.raises(ValueError, match=r"spec: expected under_test, whose operator the model has, got under_test"):
        apply_sparse_attention(model, operator_of("cmp win").module)
    assert remove_sparse_attention(model) is model
    assert [layer.self_attn for layer in model.model.layers] == own and model.config.use_cache is True
    assert torch.equal(model(hidden_of()), before)
    with pytest.raises(ValueError, match="model: expected one of apply_sparse_attention, got a Model"):
        remove_sparse_attention(model)


def test_the_projections_that_were_trained_stay_when_it_is_put_back() -> None:
    model = apply_sparse_attention(Model().to(DEVICE), whole())
    with torch.no_grad():
        model.model.layers[0].self_attn.sparse.q_proj.weight.mul_(2)
    trained = model.model.layers[0].self_attn.sparse.q_proj.weight
    assert remove_sparse_attention(model).model.layers[0].self_attn.q_proj.weight is trained


def test_a_model_that_was_patched_otherwise_is_refused() -> None:
    model = use_sparse_attention(Model().to(DEVICE), whole())
    with pytest.raises(ValueError, match="it was replaced already"):
        apply_sparse_attention(model, whole())


def test_latent_attention_is_refused_by_name() -> None:
    model = Model()
    model.model.layers[1].self_attn.kv_a_proj_with_mqa = torch.nn.Linear(WIDTH, 4)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.kv_a_proj_with_mqa: .*latent attention \(MLA\)"):
        apply_sparse_attention(model, whole())
    assert not any(isinstance(layer.self_attn, PaddedAttention) for layer in model.model.layers)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("additive", [True, False])
def test_a_padded_batch_is_that_of_its_sequences_alone(left: bool, additive: bool) -> None:
    model = apply_sparse_attention(Model().to(DEVICE), operator_of("cmp win", window=8).module)
    valid, hidden = padded(left), hidden_of().requires_grad_()
    mask = mask_of(valid)
    if additive:
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    found = model(hidden, positions, attention_mask=mask)
    weights = torch.randn(found.shape, device=DEVICE)
    (found * weights)[valid].sum().backward()
    for number in range(2):
        alone = hidden.detach()[number][valid[number]][None].requires_grad_()
        expected = model(alone)
        torch.testing.assert_close(found[number][valid[number]][None], expected, rtol=1e-4, atol=1e-5)
        (expected[0] * weights[number][valid[number]]).sum().backward()
        assert hidden.grad is not None and alone.grad is not None
        torch.testing.assert_close(hidden.grad[number][valid[number]][None], alone.grad, rtol=1e-4, atol=1e-5)


def test_a_mask_of_another_kind_is_refused() -> None:
    model = apply_sparse_attention(Model().to(DEVICE), whole())
    several = mask_of(padded(left=False)).clone()
    several[:, :, 6:, 2] = False  # key 2 is hidden from later queries: no padding
    with pytest.raises(ValueError, match="attention_mask: expected a causal mask without padded keys"):
        model(hidden_of(), attention_mask=several)
    with pytest.raises(ValueError, match=r"attention_mask: expected \(1 or B, 1, T, T\) for B=2, T=12, got \(2, 12\)"):
        model(hidden_of(), attention_mask=padded(left=False))
    with pytest.raises(ValueError, match=r"cache: expected one of nsa_gen.transformers.new_cache, got object"):
        model(hidden_of(), cache=object())
    with pytest.raises(ValueError, match="passes: expected a spec with decode, got forward, backward"):
        new_cache(model, batch=1, capacity=8)
    with pytest.raises(ValueError, match="model: expected one of apply_sparse_attention"):
        new_cache(Model(), batch=1, capacity=8)


def library_model(kind: str = "Llama") -> Any:
    import transformers

    torch.manual_seed(6)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=50, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None, pad_token_id=0,
        **({"sliding_window": None} if kind == "Mistral" else {}),
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(DEVICE).eval()


@needs_transformers
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_the_library_s_models_run_padded_batches_with_it_and_without_again(kind: str) -> None:
    model = library_model(kind)
    tokens = torch.arange(1, 2 * TOKENS + 1, device=DEVICE).view(2, TOKENS)
    valid = padded(left=True)
    with torch.no_grad():
        expected = model(tokens, attention_mask=valid.long()).logits
        found = apply_sparse_attention(model, whole())(tokens, attention_mask=valid.long()).logits
        again = remove_sparse_attention(model)(tokens, attention_mask=valid.long()).logits
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-4, atol=1e-5)
    assert torch.equal(again, expected)


@needs_transformers
def test_it_generates_with_its_cache_what_the_dense_model_generates() -> None:
    import inspect

    model = library_model()
    tokens = torch.arange(1, 2 * TOKENS + 1, device=DEVICE).view(2, TOKENS)
    valid = padded(left=True)
    common = {"attention_mask": valid.long(), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(tokens, **common)
    apply_sparse_attention(model, whole(passes=("forward", "backward", "decode")))
    cache = new_cache(model, batch=2, capacity=TOKENS + 4)
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    found = model.generate(tokens, **common, use_cache=True, **{name: cache})
    assert torch.equal(found, expected) and found.shape == (2, TOKENS + 4)
    assert cache.kept.tokens == (TOKENS + 3, 8)  # the last token is not attended to
