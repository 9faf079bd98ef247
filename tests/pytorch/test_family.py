"""Members of the family beside their public references, where these are installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nsa_gen.spec import load_spec
from tests.support import DEVICE, operator_of_spec

TOKENS = 70


def test_gpt_oss_s_windows_with_sinks_are_those_of_its_eager_attention() -> None:
    reference = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    shipped = load_spec("gptoss_window")
    window = {"size": 24, "sink": "learned"}
    spec = shipped.replace(name="small", heads={"query": 16, "kv": 2}, window=window, dtype="float32")
    op = operator_of_spec(spec)
    heads, group, dim = spec.heads, spec.heads.group, spec.head_dim.qk
    shapes = ((2, TOKENS, heads.query, dim), (2, TOKENS, heads.kv, dim), (2, TOKENS, heads.kv, dim), (heads.query,))
    torch.manual_seed(0)
    ours = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    do = torch.randn(shapes[0], device=DEVICE)

    q, k, v, sink = ours
    o = op.nsa_attention(q, k, v, sink_win=sink)
    gradients = torch.autograd.grad(o, ours, do)

    q, k, v, sink = theirs
    position = torch.arange(TOKENS, device=DEVICE)
    age = position[:, None] - position
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.float64, device=DEVICE)
    mask.masked_fill_((age < 0) | (age >= spec.window.size), float("-inf"))
    module = SimpleNamespace(num_key_value_groups=group, sinks=sink, training=False)
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    expected, _ = reference.eager_attention_forward(module, *by_head, mask, dim**-0.5)
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, theirs, do.double())
    for name, found, right in zip(("dq", "dk", "dv", "dsink"), gradients, wanted, strict=True):
        torch.testing.assert_close(
            found.double(), right, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_moba_is_the_brute_force_version_of_its_authors() -> None:
    """Where MoonshotAI/MoBA is importable; in its form keys have as many heads as queries."""
    reference = pytest.importorskip("moba.moba_naive", exc_type=ImportError)
    shipped = load_spec("moba_llama3_8b")
    selection = {**shipped.selection.model_dump(), "block": 16, "count": 3}
    spec = shipped.replace(name="small", heads={"query": 4, "kv": 2}, selection=selection, dtype="float32")
    op = operator_of_spec(spec)
    lengths, dim = (TOKENS, 17, 1), spec.head_dim.qk
    bounds = torch.tensor([0, TOKENS, TOKENS + 17, TOKENS + 18], dtype=torch.int32, device=DEVICE)
    torch.manual_seed(0)
    ours = [torch.randn(sum(lengths), heads, dim, device=DEVICE).requires_grad_() for heads in (4, 2, 2)]
    do = torch.randn(sum(lengths), 4, dim, device=DEVICE)
    o = op.nsa_attention(*ours, cu_seqlens=bounds)
    gradients = torch.autograd.grad(o, ours, do)

    theirs = [x.detach().clone().requires_grad_() for x in ours]
    q, k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in theirs)
    expected = reference.moba_attn_varlen_naive(q, k, v, bounds, max(lengths), 16, 3)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected, theirs, do)
    for name, found, right in zip(("dq", "dk", "dv"), gradients, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
