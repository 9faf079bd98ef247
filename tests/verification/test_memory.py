"""The bound on memory holds what packages allocate, and is no looser than it has to be."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_gen.spec import Spec
from nsa_gen.verification import hygiene
from nsa_gen.verification.calls import arguments_of
from nsa_gen.verification.cases import Case
from nsa_gen.verification.properties import PROPERTIES, Trial
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.inputs import Inputs, make_inputs
from tests.support import GPU, Operator, inputs_of, operator_of, operator_of_spec
from tests.verification.test_verify import package
from tests.verification.verification_specs import spec_of


class Living(TorchDispatchMode):
    """Bytes of the storages that operations made inside and that still live, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self.meet(leaf.untyped_storage())
        return result

    def meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.bytes += size
        self.most = max(self.most, self.bytes)

        def gone() -> None:
            self.bytes -= size
            del self.known[key]

        self.known[key] = weakref.finalize(storage, gone)


def peaks(op: Operator, inputs: Inputs) -> tuple[int, int]:
    """What forward and backward allocate at most, beyond what was there before each."""
    leaves, positional, named = arguments_of(op.module, inputs, True)
    with Living() as forward:
        o = op.module.nsa_attention(*positional, **named)
    with Living() as backward:
        torch.autograd.grad(o, list(leaves.values()), inputs.do, allow_unused=True)
    return forward.most, backward.most


def bound_of(spec: Spec, inputs: Inputs) -> hygiene.MemoryBound:
    hidden = None if spec.compression is None else spec.compression.phi.hidden
    return hygiene.memory_bound(OracleParameters.from_spec(spec), inputs, hidden)


CASES: Mapping[str, dict[str, Any]] = {
    "all branches": {"count": 2, "group": 4},
    "mlp": {"branches": "cmp", "phi": "mlp", "position": ("learned", "learned"), "gate": "none"},
    "linear and weighted": {"branches": "cmp win", "phi": "linear", "phi_value": "weighted", "kv": "per_branch"},
    "external and given": {"phi": "external", "indices": "input", "kv": "per_branch", "count": 2},
    "window": {"branches": "win", "gate": "none"},
    "sink": {"branches": "slc", "indices": "input", "count": 1, "gate": "none", "sink_slc": "learned"},
    "joint": {
        "branches": "slc win",
        "scores": "mean",
        "count": 1,
        "initial": 0,
        "joint": True,
        "sink_joint": "learned",
    },
    "joint, half": {"dtype": "float16", "count": 2, "initial": 0, "joint": True},
    "half": {"dtype": "float16", "dims": (32, 16), "count": 1, "initial": 0},
}


@pytest.mark.skipif(GPU, reason="counts the allocations of the interpreter's tensors")
@pytest.mark.parametrize("tokens", [(19,), (11, 0, 1, 8)], ids=["batched", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_generated_packages_allocate_no_more_than_the_bound(case: str, tokens: Sequence[int]) -> None:
    op = operator_of(**CASES[case])
    inputs = inputs_of(op, tokens[0] if len(tokens) == 1 else tuple(tokens))
    bound = bound_of(op.spec, inputs)
    small = 4096  # bounds of lists and the like, which the allocator's allowance holds
    forward, backward = peaks(op, inputs)
    assert 0 < forward <= bound.forward + small
    assert 0 < backward <= bound.backward + small
    # No looser than four times, or it would say nothing: apart from the allowance for index and workspace, and for the
    # parameters' gradients, which are larger than all the rest here and made one after the other.
    work = bound.forward - bound.saved  # scores too, which are more than backward's share of it
    learned = sum(24 * x.numel() for name, x in inputs.differentiable().items() if "." in name)
    assert bound.saved <= 4 * forward and bound.backward - work - learned <= 4 * backward


def test_the_bound_grows_with_tokens_and_not_with_their_square() -> None:
    spec = spec_of(phi="mlp", count=3)
    sizes = {}
    for tokens in (4096, 8192):
        shapes = make_inputs(spec, batch=1, tokens=8, dtype=torch.bfloat16)
        grown = {
            name: x if "." in name else torch.empty(1, tokens, *x.shape[2:], dtype=x.dtype, device="meta")
            for name, x in shapes.differentiable().items()
        }
        sizes[tokens] = bound_of(spec, shapes.replace_differentiable(grown))
    for name in ("saved", "backward"):
        assert getattr(sizes[8192], name) <= 2.001 * getattr(sizes[4096], name)


def test_workspace_and_scores_are_bounded_whatever_the_length() -> None:
    spec = spec_of(count=6, query_heads=64, kv_heads=4)
    shapes = make_inputs(spec, batch=1, tokens=8, dtype=torch.bfloat16)
    long = {
        name: torch.empty(1, 2**18, *x.shape[2:], dtype=x.dtype, device="meta")
        for name, x in shapes.differentiable().items()
    }
    found = bound_of(spec, shapes.replace_differentiable(long))
    token = 4 * 4 * 2**18 // 16  # bytes of the importances of a token
    scores = 2**28 // token * token + hygiene.LARGEST_TILE * token
    assert hygiene.SCORE_TOKENS * token > scores  # so many tokens at a time at least
    scores = (hygiene.SCORE_TOKENS + hygiene.LARGEST_TILE) * token
    index = hygiene.SLOT_BYTES * 2**18 * 6 * 4
    assert found.forward - found.saved == hygiene.MOST_WORKSPACE + index + scores


@pytest.mark.parametrize(("excess", "wrong"), [(0, []), (1, ["memory: forward"]), (2, ["memory: backward"])])
def test_a_package_that_allocates_more_than_the_bound_is_found(
    monkeypatch: pytest.MonkeyPatch, excess: int, wrong: list[str]
) -> None:
    spec = spec_of()
    trial = Trial(spec, package(spec), Case(21), 5, "cpu")
    bound = bound_of(spec, trial.inputs())
    used = [bound.forward + hygiene.ALLOCATOR_BYTES, bound.backward + hygiene.ALLOCATOR_BYTES]
    if excess:
        used[excess - 1] += 1
    monkeypatch.setattr("nsa_gen.verification.properties.measured", lambda *arguments: tuple(used))
    rows = PROPERTIES["memory"].check(trial)
    assert [row.quantity for row in rows] == ["memory: forward", "memory: backward"]
    assert [row.quantity for row in rows if not row.ok] == wrong and PROPERTIES["memory"].cuda


@pytest.mark.gpu
def test_what_is_measured_on_a_gpu_is_within_the_bound() -> None:
    op = operator_of_spec(spec_of(dtype="bfloat16"))
    rows = PROPERTIES["memory"].check(Trial(op.spec, op.module, Case(2048, twice=False), 1, "cuda"))
    assert len(rows) == 2 and all(row.ok and row.error > 0 for row in rows)
