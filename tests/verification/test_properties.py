"""Each property passes a right package and fails one that breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nsa_gen.spec import Spec
from nsa_gen.verification.cases import Case
from nsa_gen.verification.hygiene import GuardBands
from nsa_gen.verification.properties import PROPERTIES, Trial
from tests.support import DEVICE, operator_of_spec, small_spec
from tests.verification.test_verify import package
from tests.verification.verification_specs import spec_of

CALLS = itertools.count()
BATCHED, PACKED = Case(21, batch=2), Case((19, 0, 1, 11))
WHERE = {
    "oracle": BATCHED,
    "future": BATCHED,
    "dense": Case(9, batch=2),
    "packed": PACKED,
    "padded": PACKED,
    "chunks": BATCHED,
    "batch": BATCHED,
    "neighbours": BATCHED,
    "groups": BATCHED,
    "doubled": BATCHED,
    "bits": BATCHED,
    "replay": BATCHED,
    "guards": PACKED,
}


def failing(name: str, spec: Spec, module: object, case: Case | None = None) -> list[str]:
    trial = Trial(spec, module, case or WHERE[name], 5, "cpu", build=package)
    assert PROPERTIES[name].applies(trial.parameters, trial.case)
    rows = PROPERTIES[name].check(trial)
    assert rows
    return [row.quantity for row in rows if not row.ok]


@pytest.mark.parametrize("phi", ["linear", "external"])
@pytest.mark.parametrize("name", WHERE)
def test_a_right_package_has_the_property(name: str, phi: str) -> None:
    spec = spec_of(phi=phi, position="none" if phi == "external" else "learned", kv="per_branch")
    assert failing(name, spec, package(spec)) == []
    if name != "replay":  # which is of an operator's own choice
        given = spec_of(branches="slc win", indices_given=True)
        assert failing(name, given, package(given)) == []


@pytest.mark.parametrize("phi", ["mean", "external"])
@pytest.mark.parametrize("name", ["packed", "padded"])
def test_packed_sequences_shorter_than_the_stride_have_no_compressed_rows_to_compare(name: str, phi: str) -> None:
    spec = spec_of(branches="cmp win", phi=phi)
    assert failing(name, spec, package(spec), Case((3,))) == []


def reads_all_rows(o: Tensor, aux: dict) -> Tensor:
    return o + 1e-6 * o.mean(-3, keepdim=True)


def reads_the_batch(o: Tensor, aux: dict) -> Tensor:
    return o * torch.arange(1, o.shape[0] + 1)[:, None, None, None]


def reads_its_neighbours(o: Tensor, aux: dict) -> Tensor:
    return o * (1 + 1e-6 * o.mean(0, keepdim=True))


def depends_on_the_length(o: Tensor, aux: dict) -> Tensor:
    return o * (1 + 1e-3 * o.shape[-3])


def differs_from_call_to_call(o: Tensor, aux: dict) -> Tensor:
    return o * (1 + 1e-3 * next(CALLS))


def adds_a_constant(o: Tensor, aux: dict) -> Tensor:
    return o + 0.01


def writes_past_its_end(o: Tensor, aux: dict) -> Tensor:
    x = torch.empty(64)
    if x.untyped_storage().nbytes() > 64 * 4:  # with bands around it; without them torch would refuse
        x.as_strided((3,), (1,), x.storage_offset() + 64).fill_(0.0)
    return o


MISTAKES: dict[str, Callable[[Tensor, dict], Tensor]] = {
    "oracle": adds_a_constant,
    "future": reads_all_rows,
    "packed": depends_on_the_length,
    "padded": adds_a_constant,
    "chunks": depends_on_the_length,
    "batch": reads_the_batch,
    "neighbours": reads_its_neighbours,
    "doubled": adds_a_constant,
    "replay": differs_from_call_to_call,
    "guards": writes_past_its_end,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_package_that_breaks_the_property_fails(name: str) -> None:
    spec = spec_of()
    assert failing(name, spec, package(spec, tamper=MISTAKES[name]))


def test_a_window_too_narrow_is_not_dense() -> None:
    spec = spec_of(branches="win")
    assert failing("dense", spec, package(spec, change=lambda p: replace(p, window=3))) == ["dense: o_win"]


def test_heads_that_read_another_groups_keys_are_not_repeated_heads() -> None:
    spec = spec_of(branches="win")
    right = package(spec)

    def swapped(q: Tensor, k: Tensor, v: Tensor, *rest: object, **more: object) -> object:
        return right.nsa_attention(q, k.flip(-2), v, *rest, **more)

    wrong = SimpleNamespace(nsa_attention=swapped)
    found = {name.removeprefix("repeated KV heads: ") for name in failing("groups", spec, wrong)}
    assert found == {"o", "o_win", "lse_win", "dq", "dk", "dv", "dgates"}


def backward_off_by(factor: float, **which: object) -> Callable[[Spec], SimpleNamespace]:
    """A package with a right forward whose gradient is too large by a factor in calls of some lengths or KV heads."""

    def build(spec: Spec) -> SimpleNamespace:
        def tamper(o: Tensor, aux: dict) -> Tensor:
            wrong = o.shape[-3] == which.get("tokens") or spec.heads.kv == which.get("kv_heads")
            return factor * o + (1 - factor) * o.detach() if wrong else o

        return package(spec, tamper=tamper)

    return build


@pytest.mark.parametrize("phi", ["linear", "external"])
def test_a_gradient_that_is_wrong_in_one_chunk_alone_is_found(phi: str) -> None:
    spec = spec_of(branches="cmp win", phi=phi)
    found = failing("chunks", spec, backward_off_by(1.01, tokens=7)(spec), Case(21, batch=2))
    names = {name.removeprefix("chunks: ") for name in found}
    assert {"dq", "dk", "dv", "dgates"} <= names and not names & {"o", "o_cmp", "lse_win"}


def test_a_gradient_that_is_wrong_where_heads_share_keys_is_found() -> None:
    spec, build = spec_of(branches="cmp win", phi="linear", position="learned"), backward_off_by(1.01, kv_heads=2)
    trial = Trial(spec, build(spec), BATCHED, 5, "cpu", build=build)
    names = {
        row.quantity.removeprefix("repeated KV heads: ") for row in PROPERTIES["groups"].check(trial) if not row.ok
    }
    # A position moves all compressed keys alike, which softmax does not see: its gradient is rounding alone.
    parameters = {f"dcompression.{name}" for name in ("key_weight", "value_weight")}
    assert names - {"dcompression.value_position"} == {"dq", "dk", "dv", "dgates"} | parameters


def test_gradients_of_packed_compressed_keys_are_those_of_repeated_heads() -> None:
    spec = spec_of(branches="cmp", phi="external")
    rows = PROPERTIES["groups"].check(Trial(spec, package(spec), PACKED, 5, "cpu", build=package))
    assert "repeated KV heads: dk_cmp" in {row.quantity for row in rows} and all(row.ok for row in rows)


def test_gradients_are_not_compared_where_the_groups_choice_of_blocks_is_part_of_them() -> None:
    spec = spec_of()
    rows = PROPERTIES["groups"].check(Trial(spec, package(spec), BATCHED, 5, "cpu", build=package))
    assert not [row.quantity for row in rows if row.quantity.startswith("repeated KV heads: d")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_doubled_values_double_but_for_those_of_the_values(dtype: str) -> None:
    spec = spec_of(phi="linear", position="learned", position_value="learned", dtype=dtype)
    assert failing("doubled", spec, package(spec)) == []
    rows = PROPERTIES["doubled"].check(Trial(spec, package(spec), BATCHED, 5, "cpu"))
    assert [row.quantity for row in rows] == ["doubled v", "doubled v: gradients"]

    class Shifted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *gradients: Tensor) -> Tensor:
            return gradients[0] + 0.25

    right = package(spec)

    def off(q: Tensor, k: Tensor, v: Tensor, *rest: object, **more: object) -> object:
        return right.nsa_attention(Shifted.apply(q), k, v, *rest, **more)

    wrong = SimpleNamespace(nsa_attention=off, CompressionParameters=lambda **x: x)
    assert failing("doubled", spec, wrong) == ["doubled v: gradients"]


def test_gradients_of_doubled_values_are_not_compared_through_an_mlp_nor_in_float16() -> None:
    for spec in (spec_of(phi="mlp"), spec_of(dtype="float16")):
        rows = PROPERTIES["doubled"].check(Trial(spec, package(spec), BATCHED, 5, "cpu"))
        assert [row.quantity for row in rows] == ["doubled v"]


def test_results_that_change_from_call_to_call_have_other_bits() -> None:
    calls = iter(range(10))
    spec = spec_of(branches="win")
    module = package(spec, tamper=lambda o, aux: o * (1 + 2.0**-23 * (next(calls) % 2)))
    assert failing("bits", spec, module) == ["repeated"]


def test_guard_bands_see_writes_on_either_side_and_keep_values_and_strides() -> None:
    with GuardBands() as guard:
        x, y = torch.zeros(4, 6), torch.full((3,), 7, dtype=torch.int32)
        z = torch.empty_like(x.t())
        assert guard.guarded == 3 and guard.damage() == []
        y.as_strided((2,), (1,), y.storage_offset() - 2).fill_(1)
    assert x.eq(0).all() and y.tolist() == [7, 7, 7] and z.stride() == x.t().stride() and z.isnan().all()
    assert len(guard.damage()) == 1 and "2 elements written before a torch.int32" in guard.damage()[0]


@pytest.mark.parametrize("name", ["future", "guards", "doubled"])
def test_generated_kernels_have_the_property(name: str) -> None:
    op = operator_of_spec(small_spec(scale=0.37))
    trial = Trial(op.spec, op.module, Case(3, tokens_kv=21, batch=1), 5, DEVICE.type)
    assert [row for row in PROPERTIES[name].check(trial) if not row.ok] == []
