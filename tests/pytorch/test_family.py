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
