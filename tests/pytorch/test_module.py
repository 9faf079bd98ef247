"""NativeSparseAttention: what it computes, what it learns, and how it starts, for specs of every kind."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import DEVICE, Operator, operator_of

WIDTH = 24
TOKENS = 17
DECODES = ("forward", "backward", "decode")

KINDS: dict[str, dict[str, Any]] = {
    "weighted and linear, per branch": {"phi": "weighted", "phi_value": "linear", "kv": "per_branch", "gate": "given"},
    "mlp with positions": {"phi": "mlp", "position": ("learned", "learned")},
    "external phi and blocks of the caller": {"phi": "external", "indices": "input"},
    "blocks by mean keys": {"branches": "slc", "scores": "mean", "count": 1, "initial": 0},
    "window alone": {"branches": "win", "gate": "none"},
    "compressed alone, external": {"branches": "cmp", "phi": "external"},
}


def layer_of(op: Operator, **more: Any) -> Any:
    torch.manual_seed(1)
    return op.NativeSparseAttention(WIDTH, device=DEVICE, **more)


def hidden_states(tokens: int = TOKENS, batch: int = 1) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(2)).to(DEVICE)


def further(op: Operator, tokens: int = TOKENS) -> dict[str, Tensor]:
    """What forward takes of the caller besides hidden states."""
    found = {}
    if op.spec.compression and op.spec.compression.phi.key == "external":
        rows = max(0, (tokens - 8) // 4 + 1)
        found |= {name: torch.randn(1, rows, 1, 16, device=DEVICE) for name in ("k_cmp", "v_cmp")}
    if op.spec.selection and op.spec.selection.indices == "input":
        found["indices"] = torch.tensor([0, 1, -1], dtype=torch.int32, device=DEVICE).expand(1, tokens, 1, 3)
    return found


def turn(x: Tensor, positions: Tensor) -> Tensor:
    """A rotary encoding of two halves."""
    angles = positions[..., None, None] / 100.0 ** torch.linspace(0, 1, x.shape[-1] // 2, device=x.device)
    first, second = x.chunk(2, dim=-1)
    turned = (first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos())
    return torch.cat(turned, dim=-1).to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_the_hidden_states(kind: str) -> None:
    op = operator_of(**KINDS[kind])
    layer, hidden = layer_of(op), hidden_states().requires_grad_()
    o = layer(hidden, **further(op))
    assert o.shape == hidden.shape and o.dtype == torch.float32
    o.square().sum().backward()
    grads = {name: x.grad for name, x in layer.named_parameters()} | {"hidden": hidden.grad}
    assert all(x is not None and bool(x.isfinite().all()) and bool(x.abs().max() > 0) for x in grads.values()), grads


def test_the_indexer_of_a_layer_learns_from_its_own_loss_alone() -> None:
    op = operator_of("slc", index=32, count=2, initial=0, kv_heads=2, passes=DECODES)
    layer, hidden = layer_of(op, rotary=turn, index_rotary=turn), hidden_states(40).requires_grad_()
    o, loss = layer(hidden, return_alignment=True)
    assert torch.equal(o, layer(hidden)) and loss.shape == (1,) and loss.item() > 0
    o.square().sum().backward(retain_graph=True)
    index = {"q_idx_proj.weight", "k_idx_proj.weight"}
    reached = {name for name, x in layer.named_parameters() if x.grad is not None}
    assert reached == {name for name, _ in layer.named_parameters()} - index
    hidden.grad = None
    layer.zero_grad()
    loss.sum().backward()
    assert {name for name, x in layer.named_parameters() if x.grad is not None} == index and hidden.grad is None
    assert all(bool(x.grad.any()) for name, x in layer.named_parameters() if name in index)
    # Positions reach index queries and keys as they do the others.
    assert not torch.equal(layer(hidden, positions=3 * torch.arange(40, device=DEVICE)[None]), o)
    cache = op.NSACache(1, 64, device=DEVICE)
    with torch.no_grad():
        cache.extend(40)
        torch.testing.assert_close(layer(hidden, cache=cache), o, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="return_alignment: expected False with a cache"):
            layer(hidden, cache=cache, return_alignment=True)


@pytest.mark.parametrize("kind", list(KINDS)[:2])
def test_the_state_dict_makes_another_layer_the_same(kind: str) -> None:
    op = operator_of(**KINDS[kind])
    layer, more = layer_of(op), further(op, 12)
    with torch.no_grad():
        for x in layer.parameters():
            x.add_(0.1 * torch.randn_like(x))
    other = op.NativeSparseAttention(WIDTH, device="meta").to_empty(device=DEVICE)
    other.load_state_dict(layer.state_dict())
    hidden = hidden_states(12)
    with torch.no_grad():
        assert torch.equal(other(hidden, **more), layer(hidden, **more))


def test_it_is_nsa_attention_of_its_projections_with_gates_at_one_half() -> None:
    op = operator_of()
    layer, hidden = layer_of(op), hidden_states(12)
    q, k, v = (proj(hidden).unflatten(-1, (-1, 16)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = op.nsa_attention(q, k, v, torch.zeros(1, 12, 2, 3, device=DEVICE))
    with torch.no_grad():
        assert torch.equal(layer(hidden), layer.o_proj(o.flatten(-2)))


def test_phi_starts_as_the_mean() -> None:
    op, mean, hidden = operator_of(phi="weighted", phi_value="linear"), operator_of(), hidden_states(12)
    layer, other = layer_of(op), layer_of(mean)
    other.load_state_dict({name: x for name, x in layer.state_dict().items() if not name.startswith("phi_")})
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden), other(hidden))


def test_packed_equals_each_sequence_alone_positions_included() -> None:
    op = operator_of(kv="per_branch")
    layer, hidden = layer_of(op, rotary=turn), hidden_states()
    bounds = [0, 9, 9, TOKENS]
    with torch.no_grad():
        packed = layer(hidden[0], cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=DEVICE))
        for first, end in ((0, 9), (9, TOKENS)):
            alone = layer(hidden[:, first:end])[0]
            torch.testing.assert_close(packed[first:end], alone, rtol=1e-5, atol=1e-5)
        layer.rotary = None
        assert not torch.allclose(layer(hidden[0, :9][None])[0], packed[:9], atol=1e-3)


@pytest.mark.parametrize("changes", [{"phi": "weighted", "kv": "per_branch"}, {"indices": "input"}], ids=str)
def test_prefill_and_decode_through_a_cache_give_what_the_whole_sequence_gives(changes: dict[str, Any]) -> None:
    op = operator_of(passes=DECODES, **changes)
    layer, hidden, lists = layer_of(op, rotary=turn), hidden_states(), further(op)
    cache = op.NSACache(1, 64, max_new_tokens=2, device=DEVICE)
    with torch.no_grad():
        expected = layer(hidden, **lists)
        for first, end in ((0, 14), (14, 16), (16, 17)):
            cache.extend(end - first)
            some = {name: x[:, first:end] for name, x in lists.items()}
            found = layer(hidden[:, first:end], cache=cache, **some)
            torch.testing.assert_close(found, expected[:, first:end], rtol=1e-4, atol=1e-5)


def test_dtypes_move_and_parameters_in_float32_work_under_autocast() -> None:
    op = operator_of(dtype="float16", phi="weighted")
    layer = layer_of(op)
    assert {x.dtype for x in layer.parameters()} == {torch.float16}
    hidden = hidden_states(12)
    with torch.no_grad():
        expected = layer(hidden.half())
        layer.float()
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            found = layer(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_it_compiles_whole() -> None:
    layer, hidden = layer_of(operator_of(phi="weighted"), rotary=turn), hidden_states(12)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden), layer(hidden))


def test_the_example_of_the_docstring_runs_and_the_layer_describes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    op = operator_of()
    example = op.NativeSparseAttention.__doc__.split("Example:\n")[1].replace('"cuda"', repr(DEVICE.type))
    names: dict[str, Any] = {"torch": torch, "NativeSparseAttention": op.NativeSparseAttention}
    exec(textwrap.dedent(example), names)
    assert names["out"].shape == (2, 16, 64)
    assert "hidden_size=64, 2 query heads on 1 KV heads, branches cmp, slc, win" in repr(names["layer"])


def test_errors_name_the_argument() -> None:
    op = operator_of(passes=DECODES)
    with pytest.raises(ValueError, match=r"^hidden_size: expected a whole number of at least 1, got 0"):
        op.NativeSparseAttention(0)
    layer = layer_of(op)
    with pytest.raises(ValueError, match=r"^hidden: expected \(B, T, 24\), got shape \(12, 24\)"):
        layer(hidden_states(12)[0])
    bounds = torch.tensor([0, 12], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"^hidden: expected \(T_total, 24\), got shape \(1, 12, 24\)"):
        layer(hidden_states(12), cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected None with a cache"):
        layer(hidden_states(12)[0], cu_seqlens=bounds, cache=op.NSACache(1, 16, device=DEVICE))


def test_positions_that_come_with_the_call_are_the_ones_the_rotary_encoding_gets() -> None:
    op = operator_of(passes=DECODES)
    layer, hidden = layer_of(op, rotary=turn), hidden_states(12)
    rows = torch.arange(12, device=DEVICE)[None]
    bounds = torch.tensor([0, 12], dtype=torch.int32, device=DEVICE)
    with torch.no_grad():
        assert torch.equal(layer(hidden, positions=rows), layer(hidden))
        stretched = layer(hidden, positions=3 * rows)
        assert not torch.allclose(stretched, layer(hidden), atol=1e-3)
        packed = layer(hidden[0], positions=3 * rows[0], cu_seqlens=bounds)
        torch.testing.assert_close(packed, stretched[0], rtol=1e-5, atol=1e-5)
    layer.rotary = None
    with pytest.raises(ValueError, match=r"^positions: expected None in a layer without rotary"):
        layer(hidden, positions=rows)


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        ([[1.0] * WIDTH], "a torch.Tensor .*got list"),
        (torch.zeros(1, 4, WIDTH, dtype=torch.int64), "a dense floating tensor .*got torch.int64"),
        (torch.zeros(4, WIDTH).to_sparse(), "a dense floating tensor .*torch.sparse_coo"),
        (
            torch.nested.nested_tensor([torch.zeros(2, WIDTH)], layout=torch.jagged),
            "a dense floating tensor .*got a nested tensor",
        ),
        (torch.zeros(1, 4, WIDTH, dtype=torch.float64), "dtype torch.float32, as the layer's weights, got .*float64"),
    ],
    ids=["list", "integers", "sparse", "nested", "float64"],
)
def test_hidden_states_of_a_wrong_kind_are_refused_by_name(hidden: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"^hidden: expected {said}"):
        layer_of(operator_of())(hidden.to(DEVICE) if isinstance(hidden, Tensor) else hidden)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ((0, 12), "got tuple"),
        ([0, 12], "got list"),
        (torch.tensor([0, 12]), "dtype torch.int32, got torch.int64"),
        (torch.tensor([[0, 12]], dtype=torch.int32), "shape"),
        (torch.tensor([0, 13], dtype=torch.int32), "bounds rising from 0 to at most T_total=12"),
    ],
    ids=str,
)
def test_bounds_of_a_wrong_kind_are_refused_by_name_with_a_rotary_encoding_too(bounds: Any, said: str) -> None:
    layer = layer_of(operator_of(), rotary=turn)
    if DEVICE.type == "cuda" and "rising" in said:
        pytest.skip("values on a GPU are the caller's to get right")
    with pytest.raises((TypeError, ValueError), match=f"^cu_seqlens: expected.*{said}"):
        layer(hidden_states(12)[0], cu_seqlens=bounds.to(DEVICE) if isinstance(bounds, Tensor) else bounds)


def test_a_cache_of_a_wrong_kind_is_refused_by_name_and_no_tokens_are_none() -> None:
    op = operator_of(passes=DECODES)
    with pytest.raises(TypeError, match=r"^cache: expected an NSACache of this package, got dict"):
        layer_of(op)(hidden_states(12), cache={})
    assert layer_of(op, rotary=turn)(hidden_states(0)).shape == (1, 0, WIDTH)
