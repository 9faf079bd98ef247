"""A Llama-like model with a generated operator in place of its attention."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa_gen.llama import use_sparse_attention
from tests.pytorch.llama_like import TOKENS, WIDTH, Model, whole_window
from tests.support import DEVICE, operator_of


def hidden_states(batch: int = 1) -> Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5)).to(DEVICE)


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm": "head"}, {"norm": "whole"}, {"bias": True}, {"rotary": 8}, {"last": {"use_rope": 0}}],
    ids=["llama", "qwen3", "olmo2", "qwen2", "stablelm", "smollm3"],
)
def test_a_window_over_everything_gives_what_dense_attention_gives(changes: dict[str, Any]) -> None:
    torch.manual_seed(4)
    model, hidden = Model(**changes).to(DEVICE), hidden_states(2)
    with torch.no_grad():
        expected = model(hidden)
        assert use_sparse_attention(model, whole_window()) is model and model.config.use_cache is False
        torch.testing.assert_close(model(hidden), expected, rtol=1e-4, atol=1e-5)


def test_the_projections_are_the_model_s_own_and_gates_are_learned_besides() -> None:
    model, hidden = Model(norm="head").to(DEVICE), hidden_states()
    weights = dict(model.named_parameters())
    use_sparse_attention(model, operator_of())
    model(hidden).square().sum().backward()
    after = dict(model.named_parameters())
    assert {id(x) for x in weights.values()} <= {id(x) for x in after.values()}
    assert all(x.grad is not None for x in after.values()) and any("gate_proj" in name for name in after)


def test_the_model_s_own_scale_has_to_be_the_spec_s() -> None:
    model = Model(scaling=0.0625).to(DEVICE)
    with pytest.raises(ValueError, match=r"^scale: expected 0.0625, .*scaling, got 0.25 .*write scale: 0.0625"):
        use_sparse_attention(model, whole_window())
    with torch.no_grad():
        expected = model(hidden_states())
        use_sparse_attention(model, whole_window(scale=0.0625))
        torch.testing.assert_close(model(hidden_states()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sinks", {"sinks": True}),
        ("sliding_window", {"sliding_window": 4096}),
        ("attn_logit_softcapping", {"attn_logit_softcapping": 50.0}),
        ("clip_qkv", {"clip_qkv": 8.0}),
        ("attention_dropout", {"attention_dropout": 0.1}),
        ("attention_chunk_size", {"attention_chunk_size": 8192}),
        ("attn_temperature_tuning", {"attn_temperature_tuning": True}),
        ("v_scale", {"v_scale": 0.7}),
        ("is_causal", {"is_causal": False}),
        ("attn_sub_norm", {"attn_sub_norm": nn.LayerNorm(32)}),
        ("rel_bias", {"rel_bias": nn.Parameter(torch.zeros(2))}),
        ("v_proj", {"v_proj": None}),
        ("Attention computes something else", {"interleaved": True}),
        ("Attention computes something else", {"norm": "late"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_attention_that_the_operator_cannot_stand_for_is_refused_by_name_and_the_model_left_as_it_was(
    name: str, changes: dict[str, Any]
) -> None:
    model = Model(last=changes).train()
    before = [(path, id(part), part.training) for path, part in model.named_modules()]
    weights = {path: x.clone() for path, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^model\.layers\.1\.self_attn(\.|: ){name}"):
        use_sparse_attention(model, whole_window())
    assert [(path, id(part), part.training) for path, part in model.named_modules()] == before
    assert model.config.use_cache is True
    assert all(torch.equal(x, weights[path]) for path, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sliding_window", {"sliding_window": 4096}),
        ("clip_qkv", {"clip_qkv": 8.0}),
        ("rope_parameters.llama_4_scaling_beta", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}),
    ],
)
def test_what_a_module_reads_in_the_config_at_each_call_is_refused_too(name: str, config: dict[str, Any]) -> None:
    model = Model()
    model.config = SimpleNamespace(use_cache=True, **config)
    with pytest.raises(ValueError, match=rf"^config\.{name}: expected none"):
        use_sparse_attention(model, whole_window())
    model.config.use_sliding_window = False
    if name == "sliding_window":
        use_sparse_attention(model, whole_window())


def test_a_patched_model_is_refused_and_works_on() -> None:
    model = use_sparse_attention(Model().to(DEVICE), whole_window())
    expected = model(hidden_states())
    with pytest.raises(ValueError, match=r"^model.layers.0.self_attn: .* replaced already"):
        use_sparse_attention(model, whole_window())
    assert torch.equal(model(hidden_states()), expected)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^model: expected one with model.layers and model.rotary_emb.* got Linear"):
        use_sparse_attention(nn.Linear(2, 2), whole_window())
    with pytest.raises(ValueError, match=r"^heads, head_dim: expected a spec whose q_proj has 32 outputs, got 64"):
        use_sparse_attention(Model(), operator_of("win", gate="none", group=4))
    with pytest.raises(ValueError, match=r"^kv: expected shared"):
        use_sparse_attention(Model(), operator_of(kv="per_branch"))
    with pytest.raises(ValueError, match=r"^position_embeddings: expected cosines and sines .*at most 16.* 32\)"):
        use_sparse_attention(Model(rotary=32), whole_window())
    model = Model()
    del model.model.layers[1].self_attn
    with pytest.raises(ValueError, match=r"^model.layers.1.self_attn: expected an attention module, .* got none"):
        use_sparse_attention(model, whole_window())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", torch.ones(1, TOKENS)),
        ("past_key_values", object()),
        ("past_key_value", object()),  # as it was called earlier
        ("sliding_window", 8),
        ("output_attentions", True),
        ("s_aux", torch.zeros(2)),
        ("max_length_q", 7),
        ("cu_seq_lens_k", torch.tensor([0, TOKENS], dtype=torch.int32)),
        ("cu_seq_lens_q", (0, TOKENS)),
        ("cu_seq_lens_q", torch.tensor([0.0, TOKENS])),
        ("position_ids", torch.zeros(3, 1, TOKENS)),
        ("position_ids", [0, 1]),
    ],
)
def test_an_argument_of_a_call_that_says_something_is_used_or_refused_by_name(name: str, value: Any) -> None:
    model = use_sparse_attention(Model().to(DEVICE), whole_window())
    value = value.to(DEVICE) if isinstance(value, Tensor) else value
    with pytest.raises((TypeError, ValueError), match="^cu_seq_lens_q: " if name == "cu_seq_lens_k" else f"^{name}: "):
        model(hidden_states(), **{name: value})
    neutral = {"output_attentions": False, "sliding_window": None, "dropout": 0.0, "num_items_in_batch": 24}
    model(hidden_states(), use_cache=True, **neutral)


@pytest.mark.parametrize("embeddings", [None, (1, 2), (torch.zeros(1, 4, 16),) * 2, (torch.zeros(1, TOKENS, 16),)])
def test_position_embeddings_that_do_not_fit_are_refused(embeddings: Any) -> None:
    layer = use_sparse_attention(Model().to(DEVICE), whole_window()).model.layers[0].self_attn
    if embeddings is None:
        assert layer(hidden_states())[0].shape == (1, TOKENS, WIDTH)
        return
    with pytest.raises((TypeError, ValueError), match=r"^position_embeddings: expected cosines and sines \(1 or B"):
        layer(hidden_states(), position_embeddings=embeddings)


def test_position_embeddings_that_come_with_the_call_are_used_else_those_of_its_positions() -> None:
    torch.manual_seed(4)
    model, hidden = Model(rotary=8).to(DEVICE), hidden_states()
    dense = copy.deepcopy(model)
    layer = use_sparse_attention(model, whole_window()).model.layers[0].self_attn
    stretched = 3 * torch.arange(TOKENS, device=DEVICE)[None]  # as if every third token was kept
    embeddings = model.model.rotary_emb(hidden, stretched)
    with torch.no_grad():
        expected = dense.model.layers[0].self_attn(hidden, embeddings)[0]
        torch.testing.assert_close(layer(hidden, embeddings)[0], expected, rtol=1e-4, atol=1e-5)
        rows = torch.arange(TOKENS, device=DEVICE)[None]
        own = dense.model.layers[0].self_attn(hidden, model.model.rotary_emb(hidden, rows))[0]
        for more in ({}, {"position_ids": rows + 5}):
            torch.testing.assert_close(layer(hidden, **more)[0], own, rtol=1e-4, atol=1e-5)


def test_documents_of_one_row_do_not_see_each_other_and_their_bounds_are_checked() -> None:
    torch.manual_seed(4)
    model, hidden = Model(norm="head").to(DEVICE), hidden_states()
    dense = copy.deepcopy(model)
    use_sparse_attention(model, whole_window())
    bounds = torch.tensor([0, 5, 5, TOKENS], device=DEVICE)  # int64, as some collators make them
    restarting = torch.cat((torch.arange(5), torch.arange(TOKENS - 5)))[None].to(DEVICE)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds.clone()}
    lengths = {"max_length_q": 7, "max_length_k": 7}
    rows = torch.arange(TOKENS, device=DEVICE)
    seen = ((rows[:, None] < 5) == (rows < 5)) & (rows[:, None] >= rows)
    with torch.no_grad():
        expected = torch.cat([dense(hidden[:, :5]), dense(hidden[:, 5:])], dim=1)
        for more in (
            {},
            {"positions": restarting, "position_ids": restarting, **lengths},
            {"position_ids": restarting, "attention_mask": seen[None, None]},
            {"attention_mask": torch.zeros(1, 1, TOKENS, TOKENS, device=DEVICE).masked_fill(~seen, -1e30)},
        ):
            torch.testing.assert_close(model(hidden, **packed, **more), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(hidden), expected, atol=1e-3)
        alone = model.model.layers[0].self_attn(hidden, **packed)[0]
        first = dense.model.layers[0].self_attn(hidden[:, 5:], model.model.rotary_emb(hidden, rows[None, :7]))[0]
        torch.testing.assert_close(alone[:, 5:], first, rtol=1e-4, atol=1e-5)
    other = torch.tensor([0, 6, 6, TOKENS], device=DEVICE)
    for changes, message in (
        ({"cu_seq_lens_k": None}, "cu_seq_lens_k: expected the bounds of cu_seq_lens_q, got None"),
        ({"cu_seq_lens_k": other}, "cu_seq_lens_k: expected the bounds of cu_seq_lens_q"),
        ({"cu_seq_lens_k": bounds[1:]}, "cu_seq_lens_k: expected as many bounds as cu_seq_lens_q, 4, got 3"),
        ({"cu_seq_lens_q": bounds[:3], "cu_seq_lens_k": bounds[:3]}, "cu_seq_lens_q: expected bounds rising from 0"),
        ({"cu_seq_lens_q": other, "cu_seq_lens_k": other, "position_ids": restarting}, "position_ids: expected"),
        ({"attention_mask": seen[None]}, "attention_mask: expected None or"),
        ({"attention_mask": "causal"}, "attention_mask: expected None or"),
        ({"attention_mask": seen.tril(-1)[None, None]}, "attention_mask: expected None, or what cu_seq_lens_q says"),
        ({"cu_seq_lens_q": None, "cu_seq_lens_k": None, "position_ids": restarting}, "position_ids: expected"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            model(hidden, **{**packed, **changes})
    with pytest.raises(ValueError, match=r"^hidden_states: expected a batch of 1 with cu_seq_lens_q, got 2"):
        model(hidden_states(2), **packed)


def test_positions_written_over_between_two_calls_are_checked_again() -> None:
    model = use_sparse_attention(Model().to(DEVICE), whole_window())
    for positions in (torch.arange(TOKENS, device=DEVICE)[None], hidden_states().new_ones(1, TOKENS).cumsum(1).long()):
        model(hidden_states(), position_ids=positions)
        positions[0, 5:] -= 5
        with pytest.raises(ValueError, match=r"^position_ids: expected positions that rise by one"):
            model(hidden_states(), position_ids=positions)
        with torch.inference_mode(), pytest.raises(ValueError, match=r"^position_ids: "):
            model(hidden_states(), position_ids=positions.clone())


def test_a_patched_model_is_copied_and_compiled() -> None:
    model, hidden = use_sparse_attention(Model().to(DEVICE), whole_window()), hidden_states()
    more = {"position_ids": torch.arange(TOKENS, device=DEVICE)[None]}
    bounds = torch.tensor([0, 5, TOKENS], dtype=torch.int32, device=DEVICE)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    with torch.no_grad():
        expected, apart = model(hidden, **more), model(hidden, **packed)
        assert torch.equal(copy.deepcopy(model)(hidden, **more), expected)
        pickle.dumps(model.model.layers[0].self_attn.packing)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(hidden, **more), expected)
        torch.testing.assert_close(compiled(hidden, **packed), apart)


def test_a_model_on_the_meta_device_is_checked_as_others_are() -> None:
    with torch.device("meta"):
        model, other = Model(norm="head"), Model(norm="late")
    use_sparse_attention(model, whole_window())
    assert all(x.is_meta for x in model.parameters())
    with pytest.raises(ValueError, match="Attention computes something else"):
        use_sparse_attention(other, whole_window())
