"""Adapters: what they say they cannot do, and the calls they make."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from nsa_gen.bench.contenders import Operator, Sdpa, not_importable
from nsa_gen.bench.inputs import draw_inputs
from nsa_gen.bench.peers import CONTENDERS, DEFAULT_NAMES, choose, sliding_window
from nsa_gen.bench.workloads import nsa_spec
from nsa_gen.spec import Spec

SPEC = nsa_spec("a", 64, 4)


def changed(spec: Spec, **changes: object) -> Spec:
    return Spec.model_validate({**spec.model_dump(), **changes})


def selection(**changes: object) -> dict[str, object]:
    return {"block": 64, "count": 16, **changes}


@pytest.mark.parametrize("name", ["fla", "sfnsa", "nsa-triton", "fsa"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window": None}, "leaves one out"),
        ({"compression": {"block": 32, "stride": 16, "phi": "weighted"}}, "mean phi"),
        ({"selection": selection(indices="input")}, "as input"),
        ({"kv": "per_branch"}, "one pair"),
        ({"version": 2, "window": {"size": 512, "sink": "learned"}}, "no sink"),
        ({"version": 2, "selection": {"block": 64, "count": 16, "scores": "mean"}}, "by the compressed keys"),
        ({"combine": {"gate": "none"}}, "sigmoid"),
        ({"dtype": "float32"}, "bfloat16 and float16"),
        ({"head_dim": {"qk": 192, "v": 128}}, "not 192 and 128"),
    ],
)
def test_a_public_package_says_why_it_cannot_compute_a_spec(name, changes, reason):
    assert CONTENDERS[name].refuses(SPEC, 8192) == ""
    assert reason in CONTENDERS[name].refuses(changed(SPEC, **changes), 8192)


@pytest.mark.parametrize(("heads", "fits"), [((64, 4), True), ((128, 4), True), ((28, 4), False), ((32, 4), False)])
def test_fla_takes_groups_of_sixteen_and_its_doubles(heads, fits):
    reason = CONTENDERS["fla"].refuses(nsa_spec("g", *heads), 8192)
    assert (reason == "") is fits
    assert fits or f"not {heads[0] // heads[1]}" in reason


@pytest.mark.parametrize("name", ["cudnn", "fa2", "fa4"])
def test_dense_attention_for_half_precision_refuses_float32(name):
    assert "bfloat16 and float16" in CONTENDERS[name].refuses(changed(SPEC, dtype="float32"), 8192)
    assert CONTENDERS["efficient"].refuses(changed(SPEC, dtype="float32"), 8192) == ""


def test_a_package_that_is_not_installed_is_named_with_the_modules_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "present", ModuleType("present"))
    assert not_importable(("torch",), "torch") == ""
    reason = not_importable(("torch", "no_such_module", "no_such.package"), "some-package")
    assert reason == "some-package is not installed: no module no_such_module, no_such.package"


def test_every_contender_is_found_by_its_name_and_by_its_group():
    assert all(contender.name == name for name, contender in CONTENDERS.items())
    assert [each.name for each in choose(["peers", "fa2"])] == ["fa2", "fla", "sfnsa", "nsa-triton", "fsa"]
    assert [each.name for each in choose(["dense"])] == ["cudnn", "fa2", "fa4"]
    assert {each.name for each in choose(DEFAULT_NAMES)} == set(DEFAULT_NAMES)
    with pytest.raises(ValueError, match="got nonsense"):
        choose(["fa2", "nonsense"])


def test_the_operator_is_called_with_everything_its_spec_takes_and_its_leaves_are_what_has_gradients():
    package = ModuleType("package")
    calls = []
    package.nsa_attention = lambda *positional, **named: calls.append((positional, named)) or positional[0]
    package.CompressionParameters = lambda **fields: tuple(fields)
    spec = changed(
        nsa_spec("s", 4, 2, 16, 16),
        compression={"block": 32, "stride": 16, "phi": {"key": "weighted", "value": "mean"}},
    )
    inputs = draw_inputs(spec, 64, device="cpu")
    prepared = Operator(package).prepare(spec, inputs)
    assert prepared.call() is calls[0][0][0]
    positional, named = calls[0]
    assert [x.shape for x in positional] == [(1, 64, 4, 16), (1, 64, 2, 16), (1, 64, 2, 16)]
    assert set(named) == {"gates", "compression"} and named["compression"] == ("key_weight",)
    assert len(prepared.leaves) == 5 and all(leaf.is_leaf and leaf.requires_grad for leaf in prepared.leaves)
    assert prepared.do is inputs.do and not inputs.q.requires_grad


@pytest.mark.parametrize("grouped", [True, False])
def test_dense_attention_is_causal_with_the_spec_s_scale_and_repeats_heads_where_it_must(monkeypatch, grouped):
    spec = changed(nsa_spec("s", 4, 2, 16, 16), scale=0.5)
    inputs = draw_inputs(spec, 40, device="cpu")
    plain = torch.nn.functional.scaled_dot_product_attention

    def attend(*tensors, enable_gqa, **options):
        if enable_gqa and not grouped:
            raise RuntimeError("no grouped heads")
        return plain(*tensors, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    prepared = Sdpa("math", "MATH").prepare(spec, inputs)
    o = prepared.call().transpose(1, 2).float()
    q, k, v = (x.float()[0] for x in (inputs.q, inputs.k, inputs.v))
    logits = 0.5 * torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1))
    p = logits.masked_fill(~torch.ones(40, 40).tril().bool(), float("-inf")).softmax(-1)
    expected = torch.einsum("hts,shd->thd", p, v.repeat_interleave(2, 1))
    assert (o[0] - expected).norm() < 0.02 * expected.norm()
    assert prepared.do.shape == prepared.call().shape
    assert prepared.leaves[1].shape[1] == (2 if grouped else 4)
    assert ("repeated 2 times" in prepared.note) is not grouped


@pytest.mark.gpu
def test_the_window_of_the_public_packages_holds_the_query_s_own_key_and_those_before_it():
    tokens, size = 300, 17
    q, k, v = (torch.randn(1, tokens, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = sliding_window(*leaves, size, 0.2)
    distance = torch.arange(tokens, device="cuda")[:, None] - torch.arange(tokens, device="cuda")
    mask = (distance >= 0) & (distance < size)
    logits = 0.2 * torch.einsum("thd,shd->hts", q[0].float(), k[0].float().repeat_interleave(2, 1))
    p = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    expected = torch.einsum("hts,shd->thd", p, v[0].float().repeat_interleave(2, 1))
    assert (o[0].float() - expected).norm() < 0.02 * expected.norm()
    gradients = torch.autograd.grad(o, leaves, torch.ones_like(o))
    assert [x.shape for x in gradients] == [x.shape for x in leaves]
