"""A Llama-like model with a generated operator in place of its attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa_gen.llama import use_sparse_attention
from tests.support import DEVICE, Operator, operator_of

WIDTH, TOKENS = 32, 12


class Rotary(nn.Module):
    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None] / 100.0 ** torch.linspace(0, 1, 8, device=x.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Attention(nn.Module):
    """Dense causal attention with the parts and the call of LlamaAttention: two query heads on one KV head of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(WIDTH, 32, bias=False), nn.Linear(32, WIDTH, bias=False)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 16, bias=False)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> tuple[Any, None]:
        q, k, v = (
            proj(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (x.unsqueeze(1) for x in position_embeddings)
        q, k = (x * cos + torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * sin for x in (q, k))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).flatten(-2)), None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.ModuleDict({"self_attn": Attention()}) for _ in range(2))
        self.model.rotary_emb = Rotary()

    def forward(self, hidden: Tensor, **more: Any) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        embeddings = self.model.rotary_emb(hidden, positions)
        for layer in self.model.layers:
            hidden = hidden + layer.self_attn(hidden_states=hidden, position_embeddings=embeddings, **more)[0]
        return hidden


def whole_window() -> Operator:
    """A window longer than the sequences: dense causal attention."""
    return operator_of("win", gate="none", window=64)


def test_a_window_over_everything_gives_what_dense_attention_gives() -> None:
    torch.manual_seed(4)
    model, hidden = Model().to(DEVICE), torch.randn(1, TOKENS, WIDTH, device=DEVICE)
    with torch.no_grad():
        expected = model(hidden)
        assert use_sparse_attention(model, whole_window()) is model and model.config.use_cache is False
        torch.testing.assert_close(model(hidden), expected, rtol=1e-4, atol=1e-5)


def test_the_projections_are_the_model_s_own_and_gates_are_learned_besides() -> None:
    model, hidden = Model().to(DEVICE), torch.randn(1, TOKENS, WIDTH, device=DEVICE)
    weights = dict(model.named_parameters())
    use_sparse_attention(model, operator_of())
    model(hidden).square().sum().backward()
    after = dict(model.named_parameters())
    assert {id(x) for x in weights.values()} <= {id(x) for x in after.values()}
    assert all(x.grad is not None for x in after.values()) and any("gate_proj" in name for name in after)


def test_what_does_not_fit_is_refused_by_name() -> None:
    hidden = torch.randn(1, 4, WIDTH, device=DEVICE)
    with pytest.raises(ValueError, match=r"^heads, head_dim: expected a spec whose q_proj has 32 outputs, got 64"):
        use_sparse_attention(Model(), operator_of("win", gate="none", group=4))
    with pytest.raises(ValueError, match=r"^kv: expected shared"):
        use_sparse_attention(Model(), operator_of(kv="per_branch"))
    model = use_sparse_attention(Model().to(DEVICE), whole_window())
    with pytest.raises(ValueError, match=r"^attention_mask: expected None"):
        model(hidden, attention_mask=torch.ones(1, 4))
    for name in ("past_key_values", "past_key_value"):  # as it is called, and as it was called earlier
        with pytest.raises(ValueError, match=f"^{name}: expected None"):
            model(hidden, **{name: object()})


def of_transformers() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(6)
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=50, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(DEVICE)


def test_a_model_of_the_transformers_library_runs_with_it() -> None:
    model = of_transformers().eval()
    tokens = torch.arange(TOKENS, device=DEVICE)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        found = use_sparse_attention(model, whole_window())(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_the_transformers_library_trains_and_writes_with_it() -> None:
    model, dense = (of_transformers() for _ in range(2))
    use_sparse_attention(model, whole_window())
    tokens = torch.arange(1, TOKENS, device=DEVICE)[None] % 50
    for each in (model, dense):
        optimiser = torch.optim.SGD(each.parameters(), lr=0.1)
        each(tokens, labels=tokens).loss.backward()
        optimiser.step()
    assert all(x.grad is not None for x in model.parameters())
    told = {"max_new_tokens": 2, "do_sample": False, "use_cache": False}
    written, expected = (each.eval().generate(tokens[:, :5], **told) for each in (model, dense))
    assert written.shape == (1, 7) and torch.equal(written, expected)
