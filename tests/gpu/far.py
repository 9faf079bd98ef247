"""Tensors of more than 2^31 elements: offsets that 32 bits cannot hold, in arguments, results and gradients.

Two ways there. *Apart*: one argument at a time is a view whose tokens, heads or batch entries lie so far apart in a
buffer of NaN that the last ones begin beyond the limit; the result must be that of the compact argument, bit by bit.
*Along*: a batch, or a pack, of a few sequences repeated so often that q, k and their gradients, or v, the outputs and
their gradients, have more elements than the limit; every repetition must be what the few sequences give alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nsa_gen.rendering import import_package
from nsa_gen.spec import Spec
from nsa_gen.verification import relations
from nsa_gen.verification.calls import call_package
from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import check_case, written
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.inputs import Inputs, make_inputs
from nsa_gen.verification.reference.oracle import compressed_rows
from nsa_gen.verification.report import Row, environment
from tests.gpu.common import other_bits, release, save, say
from tests.gpu.support import memory_slot, package_of, spec_of_request

ALIGNMENT = 16
"""Strides are multiples of this, as those of compact tensors are, so that no kernel is compiled anew."""
COMPARED_AT_ONCE = 2**26
"""Elements of a large result that are compared in one go."""
WORST = 4
"""Repetitions that are compared with tolerances where bits differ."""


def far_apart_job(
    result: dict[str, Any], *, spec: str, batch: int, tokens: int, limit: int, device: str, seed: int,
) -> None:  # fmt: skip
    """Spread each argument of a call, and the gradient of its output, along each of its dimensions."""
    meaning = spec_of_request(spec)
    module = import_package(package_of(meaning))
    case = Case(tokens, batch=batch, twice=False)
    inputs = _inputs(meaning, case, device, seed)
    rows = _begin(result, meaning, module, case, inputs, limit, device)
    near = call_package(module, inputs, True).tensors()
    arguments = {**inputs.differentiable(), "do": inputs.do}
    plans = {
        (name, dim): _stride(x, dim, limit)
        for name, x in arguments.items()
        if "." not in name
        for dim in range(3)
        if x.shape[dim] > 1
    }
    largest = max(stride * arguments[name].shape[dim] for (name, dim), stride in plans.items())
    with memory_slot():
        size = limit + largest + max(x.numel() for x in arguments.values())
        buffer = torch.empty(size, dtype=inputs.q.dtype, device=device)
        for (name, dim), stride in plans.items():
            label = f"{name}, {('batch entries', 'tokens', 'heads')[dim]} {stride} apart"
            say(f"{meaning.name}: {label}")
            moved = _spread(buffer, arguments[name], dim, stride, limit)
            far_inputs = replace(inputs, **{name: moved})
            far = call_package(module, far_inputs, True).tensors()
            differing = other_bits(near, far)
            told = ", ".join(f"{count} elements of {each} differ" for each, count in differing.items())
            rows.append(Row(label, "all", "bits", float(sum(differing.values())), 0.0, not differing, told))
            result["rows"] = [asdict(row) for row in rows]
            save(result)
            del far
        result["buffer_elements"] = size
        del buffer
        release(device)
    _end(result, rows)


def _stride(x: Tensor, dim: int, limit: int) -> int:
    """Elements between neighbours of `x` along `dim` with which the last one begins beyond the limit."""
    room = x.select(dim, 0).numel()
    return -(-max(room, limit // (x.shape[dim] - 1) + 1) // ALIGNMENT) * ALIGNMENT


def _spread(buffer: Tensor, x: Tensor, dim: int, stride: int, limit: int) -> Tensor:
    """A copy of `x` in a buffer of NaN. There is room for `limit` elements before it: what is read at an offset that
    wrapped around to below zero is NaN, and no fault."""
    strides = list(x.select(dim, 0).contiguous().stride())
    strides.insert(dim, stride)
    assert stride * (x.shape[dim] - 1) > limit
    buffer.fill_(math.nan)
    view = buffer.as_strided(x.shape, strides, limit)
    view.copy_(x)
    return view


def far_along_job(
    result: dict[str, Any], *, spec: str, lengths: Sequence[int], packed: bool, limit: int, device: str, seed: int,
    shares: int,
) -> None:  # fmt: skip
    """Repeat sequences until the largest argument has more than `limit` elements, and compare every repetition.

    The spec has no parameters to learn, whose gradients would be sums over all repetitions.
    """
    meaning = spec_of_request(spec)
    module = import_package(package_of(meaning))
    case = Case(tuple(lengths)) if packed else Case(lengths[0], batch=len(lengths), twice=False)
    inputs = _inputs(meaning, case, device, seed)
    rows = _begin(result, meaning, module, case, inputs, limit, device)
    p = OracleParameters.from_spec(meaning)
    if packed and p.compression_stride is not None and sum(lengths) % p.compression_stride:
        raise ValueError(f"lengths: expected a sum that is a multiple of {p.compression_stride}, got {sum(lengths)}")
    near = written(p, inputs, call_package(module, inputs, True).tensors())
    largest = max(x.numel() for x in inputs.differentiable().values())
    times = limit // largest * 101 // 100 + 2
    result.update(repetitions=times, sequences=times * len(lengths), largest_elements=times * largest)
    with memory_slot(shares):
        say(f"{meaning.name}: {times} times {case.label}, {times * largest} elements")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        many = _repeated(inputs, times)
        call = call_package(module, many, True)
        if device == "cuda":
            result["peak_bytes"] = torch.cuda.max_memory_allocated()
        result["elements"] = {name: x.numel() for name, x in call.tensors().items()}
        for name, x in call.tensors().items():
            say(f"{meaning.name}: comparing {name}")
            each = x.view(times, x.shape[0] // times, *x.shape[1:])
            rows += _compare(p, inputs, name, _written_in_each(p, inputs, name, each), near)
            result["rows"] = [asdict(row) for row in rows]
            save(result)
        del call, many
        release(device)
    _end(result, rows)


def _repeated(inputs: Inputs, times: int) -> Inputs:
    """The same sequences `times` times over."""
    many = relations.changed(inputs, lambda name, x: x.repeat(times, *(1,) * (x.dim() - 1)))
    if inputs.cu_seqlens is not None:
        lengths = inputs.cu_seqlens.diff().tolist() * times
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=inputs.q.device)
        many = replace(many, cu_seqlens=bounds)
    return many


def _written_in_each(p: OracleParameters, inputs: Inputs, name: str, x: Tensor) -> Tensor:
    """Repetitions of a result without the padding between packed compressed blocks."""
    if inputs.cu_seqlens is None or name.removeprefix("d") not in relations.COMPRESSED:
        return x
    return x[:, compressed_rows(p, inputs.cu_seqlens).to(x.device)]


def _compare(p: OracleParameters, inputs: Inputs, name: str, x: Tensor, near: Mapping[str, Tensor]) -> list[Row]:
    """Every repetition of a result with the result of the sequences alone.

    Bits first. A schedule may depend on how many sequences there are: where bits differ the repetitions that are
    furthest off must be as near as two results of the operator have to be.
    """
    wanted = near[name]
    at_once = max(1, COMPARED_AT_ONCE // max(1, wanted.numel()))
    differing, furthest = 0, []
    for start in range(0, x.shape[0], at_once):
        part = x[start : start + at_once]
        unequal = (part != wanted) & ~((part != part) & (wanted != wanted))
        if bool(unequal.any()):
            differing += int(unequal.sum())
            apart = (part.float() - wanted.float()).abs().nan_to_num(math.inf).flatten(1).amax(1)
            furthest += [(float(value), start + number) for number, value in enumerate(apart.tolist())]
    label = f"{x.shape[0]} repetitions"
    if not differing:
        return [Row(label, name, "bits", 0.0, 0.0, True)]
    rows = []
    for _, number in sorted(furthest, reverse=True)[:WORST]:
        if name in ("indices", "counts") or name.removeprefix("d") in relations.COMPRESSED:
            told = f"{differing} elements differ, in repetition {number} and others"
            rows.append(Row(label, name, "bits", float(differing), 0.0, False, told))
            continue
        both = {name: x[number]}
        same = {"indices": near["indices"], "counts": near["counts"]} if "indices" in near else {}
        title = f"repetition {number}, {differing} elements of other bits in all"
        rows += relations.near(title, "far", p, inputs, {**both, **same}, dict(near))
    return rows


def _inputs(spec: Spec, case: Case, device: str, seed: int) -> Inputs:
    element = getattr(torch, spec.dtype)
    return make_inputs(spec, batch=case.batch, tokens=case.tokens, dtype=element, device=device, seed=seed)


def _begin(
    result: dict[str, Any], spec: Spec, module: Any, case: Case, inputs: Inputs, limit: int, device: str
) -> list[Row]:
    """Verify the compact call: what everything else is compared with."""
    result.update(spec=spec.name, yaml=spec.resolved_yaml(), dtype=spec.dtype, limit=limit, rows=[])
    result["environment"] = asdict(environment(torch.device(device)))
    say(f"{spec.name}: verifying {case.label}")
    rows = check_case(module, OracleParameters.from_spec(spec), case, inputs, with_gradients=True)
    result["rows"] = [asdict(row) for row in rows]
    save(result)
    return rows


def _end(result: dict[str, Any], rows: Sequence[Row]) -> None:
    bad = [row for row in rows if not row.ok]
    result["ok"] = bool(rows) and not bad
    result["error"] = f"{len(bad)} of {len(rows)} comparisons failed" if bad else ""
