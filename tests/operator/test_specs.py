"""Forward and every gradient against the oracle, for specs that cover every feature of the language."""

from __future__ import annotations

import pytest
import torch

from nsa_gen.spec import Spec
from tests.support import assert_matches_oracle, call, inputs_of, operator_of, operator_of_spec, small_spec

LEARNED = ("learned", "learned")

SPECS: dict[str, Spec] = {
    "weighted phi, learned positions, given gates": small_spec(
        phi="weighted", position=LEARNED, gate="given", group=3, count=2
    ),
    "linear keys, mlp values, a position of keys alone": small_spec(
        phi="linear", phi_value="mlp", position=("learned", "none"), count=2, dims=(16, 24)
    ),
    "mlp keys, mean values, a position of values alone, own keys of each branch": small_spec(
        phi="mlp", phi_value="mean", position=("none", "learned"), kv="per_branch", count=2
    ),
    "mean keys, weighted values, no gates": small_spec(phi_value="weighted", gate="none", kv_heads=2, count=2),
    "external compression, caller's indices, own keys of each branch": small_spec(
        phi="external", indices="input", kv="per_branch", count=2, dims=(24, 40)
    ),
    "external compression, selection, no window": small_spec("cmp slc", phi="external", gate="given", count=2),
    "compression alone": small_spec("cmp", phi="linear", gate="none", group=3, kv_heads=2),
    "external compression alone": small_spec("cmp", phi="external", gate="none"),
    "selection of the caller alone": small_spec("slc", indices="input", gate="sigmoid", count=3),
    "window alone": small_spec("win", gate="given", dims=(40, 24), window=17),
    "compression and window": small_spec("cmp win", kv="per_branch", dims=(72, 16)),
    "caller's selection and window": small_spec("slc win", indices="input", kv="per_branch", count=2, block=32),
    "compression and selection, values wider than keys": small_spec("cmp slc", dims=(24, 80), count=2, gate="none"),
    "keys wider than values": small_spec(dims=(96, 16), count=2, gate="none", compression=(16, 16)),
    "overlapping blocks of three strides": small_spec(compression=(12, 4), count=2, initial=0, local=2),
    "no forced blocks": small_spec("cmp slc", count=2, initial=0, local=0, gate="none"),
    "float16": small_spec(dtype="float16", count=2, phi="weighted", group=3),
    "float16 mlp, given gates": small_spec("cmp win", dtype="float16", phi="mlp", position=LEARNED, gate="given"),
}


def raw_keys(spec: Spec) -> bool:
    """Whether some branch reads raw keys, so that there may be more of them than queries."""
    return spec.selection is not None or spec.window is not None or spec.compression.phi.key != "external"


@pytest.mark.parametrize("name", SPECS)
def test_batched_outputs_and_gradients_are_those_of_the_oracle(name: str) -> None:
    op = operator_of_spec(SPECS[name])
    if raw_keys(op.spec):
        found = assert_matches_oracle(op, 5, tokens_kv=37, batch=2 if op.spec.selection is None else 1, seed=1)
    else:
        found = assert_matches_oracle(op, 21, batch=2, seed=1)
    expected = {f"o_{branch}" for branch in op.spec.branches} | {f"lse_{branch}" for branch in op.spec.branches}
    expected |= {"dgates"} if op.spec.combine.gate != "none" else set()
    parameters = getattr(op.module, "CompressionParameters", None)
    expected |= {f"dcompression.{name}" for name in (parameters._fields if parameters else ())}
    assert expected <= found.keys()


PACKED = (
    "weighted phi, learned positions, given gates",
    "linear keys, mlp values, a position of keys alone",
    "external compression, caller's indices, own keys of each branch",
    "selection of the caller alone",
    "window alone",
    "compression and window",
    "float16",
)


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_are_computed_each_as_if_alone(name: str) -> None:
    op = operator_of_spec(SPECS[name])
    assert_matches_oracle(op, (0, 5, 0, 1, 18, 0), seed=2)


@pytest.mark.parametrize("name", PACKED[:3])
def test_slices_of_fused_projections_need_no_copy(name: str) -> None:
    op = operator_of_spec(SPECS[name])
    inputs = inputs_of(op, 4, batch=2, kind="strided", seed=3)
    assert not inputs.q.is_contiguous()
    assert_matches_oracle(op, 4, inputs=inputs)


def test_head_major_tensors_need_no_copy() -> None:
    op = operator_of(group=2, kv_heads=2, count=2)
    inputs = inputs_of(op, 2, tokens_kv=18, batch=2, seed=4)
    moved = {
        name: x if name == "gates" else x.transpose(1, 2).contiguous().transpose(1, 2)
        for name, x in inputs.differentiable().items()
    }
    moved["gates"] = inputs.gates.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert_matches_oracle(op, 2, inputs=inputs.replace_differentiable(moved))


def test_expanded_keys_of_one_head_or_batch_entry_need_no_copy() -> None:
    op = operator_of("win", kv_heads=2, gate="none")
    inputs = inputs_of(op, 9, batch=2, seed=5)
    shared = {"k": inputs.k[:1, :, :1].expand(2, 9, 2, 16), "v": inputs.v[:1].expand(2, 9, 2, 16)}
    assert_matches_oracle(op, 9, inputs=inputs.replace_differentiable(inputs.differentiable() | shared))


def test_a_forward_only_package_computes_and_has_no_gradient() -> None:
    op = operator_of(count=2, passes=("forward",))
    assert_matches_oracle(op, 4, tokens_kv=30, gradients=False, seed=6)
    inputs = inputs_of(op, 3)
    inputs.q.requires_grad_()
    o = call(op, inputs)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"grad|backward|autograd"):
        o.sum().backward()
    assert not [path for path in (op.folder / "kernels").glob("*.py") if "_backward_" in path.read_text()]


@pytest.mark.parametrize("which", ["q", "k", "v", "gates"])
def test_a_gradient_may_be_asked_of_one_argument_alone(which: str) -> None:
    op = operator_of("cmp win", gate="given")
    inputs = inputs_of(op, 12, seed=7)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
    o = call(op, inputs.replace_differentiable(leaves))
    whole = dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), inputs.do), strict=True))
    leaf = inputs.differentiable()[which].detach().requires_grad_()
    o = call(op, inputs.replace_differentiable(inputs.differentiable() | {which: leaf}))
    (alone,) = torch.autograd.grad(o, leaf, inputs.do)
    assert torch.equal(alone, whole[which])


def test_a_gradient_of_the_output_may_be_strided_or_expanded() -> None:
    op = operator_of("cmp win", gate="given")
    inputs = inputs_of(op, 12, seed=8)
    leaf = inputs.q.detach().requires_grad_()
    o = call(op, inputs.replace_differentiable(inputs.differentiable() | {"q": leaf}))
    (expanded,) = torch.autograd.grad(o.sum(), leaf, retain_graph=True)  # do is one 1.0, expanded
    (dense,) = torch.autograd.grad(o, leaf, torch.ones_like(o))
    assert torch.equal(expanded, dense)
