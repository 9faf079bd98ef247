"""Hopper's kernels of selected attention beside the ordinary ones. Which are quicker, `nsa-gen tune` measures.

Needs of Python torch and triton alone. Where the kernel does not run, the ordinary one is compared with itself.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.gpu import hopper
from tests.gpu.common import say

KERNELS = {"hopper": 0, "ordinary": 2**31}
"""By name, from how many query tokens on Hopper's kernel serves a call."""
FACTOR, FLOOR = 1.3, 1e-4
"""The error of Hopper's kernel, relative to float64, may be this much of the ordinary one's, and this much more."""

Call = dict[str, Any]


class Package:
    """The modules of a generated package that take part in selected attention, block by block."""

    def __init__(self, module: ModuleType, device: str) -> None:
        self.top, self.device = module, device
        names = (
            "configs", "spec", "kernels.inverted_index", "runtime.sequences", "kernels.selected_key_major_forward",
            "kernels.selected_key_major_backward",
        )  # fmt: skip
        self.configs, constants, self.index, self.sequences, self.forward, self.backward = (
            importlib.import_module(f"{module.__name__}.{name}") for name in names
        )
        takes_local = "without_local" in inspect.signature(self.index.slot_keys).parameters
        # That the window's kernel does no local blocks, for the index and for the forward.
        self.without_local, self.local = ((False,), (None,)) if takes_local else ((), ())
        self.hq, self.hkv = constants.QUERY_HEADS.value, constants.KV_HEADS.value
        self.group, self.count = constants.GROUP.value, constants.SELECTION_COUNT.value
        self.dk, self.dv = constants.HEAD_DIM_QK.value, constants.HEAD_DIM_V.value
        self.block, self.scale = constants.SELECTION_BLOCK.value, constants.SCALE.value
        self.dtype = getattr(torch, self.top.SPEC["dtype"])
        self.gated = self.top.SPEC["combine"]["gate"] != "none"


# Correctness


def make_call(
    package: Package,
    rows: int,
    tokens: int,
    *,
    batch: int = 1,
    lengths: tuple[int, ...] = (),
    same: bool = False,
    gated: bool = True,
    strided: bool = False,
) -> Call:
    """A call, its gradients in float64; `same`: all queries choose alike; `strided`: inputs are views of one tensor."""
    generator = torch.Generator(package.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=package.device).to(package.dtype)

    hq, hkv, dk, dv = package.hq, package.hkv, package.dk, package.dv
    if strided:
        fused = normal(batch, max(rows, tokens), hq + 2 * hkv + 1, max(dk, dv))
        q, k = fused[:, :rows, :hq, :dk], fused[:, :tokens, hq : hq + hkv, :dk]
        v = fused[:, :tokens, hq + hkv : hq + 2 * hkv, :dv]
    else:
        q, k, v = normal(batch, rows, hq, dk), normal(batch, tokens, hkv, dk), normal(batch, tokens, hkv, dv)
    do = normal(batch, rows, hq, dv)
    gate = normal(batch, rows, hq, 3)[..., 1] if gated and package.gated else None
    position, first = (
        torch.arange(rows, device=package.device) + tokens - rows,
        torch.zeros(rows, dtype=torch.long, device=package.device),
    )
    bounds = None
    if lengths:
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=package.device)
        first = torch.repeat_interleave(bounds[:-1].long(), torch.tensor(lengths, device=package.device))
        position = torch.arange(rows, device=package.device) - first
    indices = _choose(package, position, batch, tokens, same, generator)
    call = {
        "q": q,
        "k": k,
        "v": v,
        "do": do,
        "gate": gate,
        "indices": indices,
        "counts": (indices >= 0).sum(-1).int(),
        "sequences": package.sequences.Sequences(batch, rows, tokens, bounds),
    }
    return call | _differentiate(package, call, position, first)


def _choose(
    package: Package, position: Tensor, batch: int, tokens: int, same: bool, generator: torch.Generator
) -> Tensor:
    """The own block, the first, and others at random or always the same, ascending; -1 where there are no more."""
    blocks = -(-tokens // package.block)
    number = torch.arange(blocks, device=package.device)
    score = torch.rand(batch, len(position), package.hkv, blocks, generator=generator, device=package.device)
    if same:
        score = -number.float().expand_as(score)
    own = (position // package.block)[:, None, None]
    score = torch.where((number == own) | (number == 0), 2.0, score).where(number <= own, -torch.inf)
    best, chosen = torch.topk(score, min(package.count, blocks), dim=-1)
    chosen = torch.sort(chosen.where(best > -torch.inf, blocks), dim=-1)[0]
    indices = torch.full((*score.shape[:3], package.count), -1, dtype=torch.int32, device=package.device)
    indices[..., : chosen.shape[-1]] = chosen.where(chosen < blocks, -1)
    return indices


def _differentiate(package: Package, call: Call, position: Tensor, first: Tensor) -> dict[str, Tensor]:
    """lse, delta and gradients in float64, from the definition."""
    q, k, v, do, gate, indices = (call[name] for name in ("q", "k", "v", "do", "gate", "indices"))
    rows, tokens = q.shape[1], k.shape[1]
    blocks = -(-tokens // package.block)
    local = torch.arange(tokens, device=q.device)[None] - first[:, None]

    def seen(b: int, h: int) -> Tensor:
        chosen = torch.zeros(rows, blocks + 1, dtype=torch.bool, device=q.device)
        chosen.scatter_(1, indices[b, :, h].long().where(indices[b, :, h] >= 0, blocks), True)
        visible = (local >= 0) & (local <= position[:, None])
        return visible & chosen.gather(1, (local // package.block).clamp(0, blocks))

    return hopper.differentiate(q, k, v, do, gate, package.scale, seen)


def _poison_memory(package: Package) -> None:
    """Leave NaN in the memory that the allocator gives next."""
    if package.device == "cuda":
        junk = [torch.full((size,), torch.nan, device="cuda") for size in (2**28, 2**26, 2**22, 2**18)]
        del junk


def attend(package: Package, call: Call, kernel: str, chunk_tokens: int) -> dict[str, Tensor]:
    """o and lse of a call by one of the kernels, where memory held NaN before."""
    layout = package.index.Layout.of(call["sequences"], chunk_tokens)
    keys = package.index.slot_keys(call["indices"], call["counts"], call["sequences"], layout, *package.without_local)
    ordered = package.index.sort_slots(keys, layout)
    _poison_memory(package)
    q, k, v = (call[name] for name in ("q", "k", "v"))
    o = torch.full_like(call["do"], torch.nan)
    lse = torch.full(q.shape[:3], torch.nan, device=package.device)
    with package.configs.override("selected_outputs", HOPPER_TOKENS=KERNELS[kernel]):
        package.forward.forward(q, k, v, keys, *ordered, layout, o, lse, call["sequences"], *package.local)
    return {"o": o, "lse": lse}


def differentiate(
    package: Package, call: Call, kernel: str, chunk_tokens: int, with_dq: bool = True
) -> dict[str, Tensor]:
    """dk, dv and dq of a call by one of the kernels, where memory held NaN before; dk and dv are added to."""
    layout = package.index.Layout.of(call["sequences"], chunk_tokens)
    keys = package.index.slot_keys(call["indices"], call["counts"], call["sequences"], layout, *package.without_local)
    ordered = package.index.sort_slots(keys, layout)
    _poison_memory(package)
    before = (("k", 0.25), ("v", -0.5))
    dk, dv = (torch.full(call[name].shape, value, device=package.device) for name, value in before)
    dq = torch.full_like(call["q"], torch.nan).contiguous() if with_dq else None
    tensors = (*(call[name] for name in ("q", "k", "v")), keys, *ordered, layout)
    gradient = package.sequences.OutputGradient(*(call[name] for name in ("do", "lse", "delta", "gate")))
    with package.configs.override("selected_backward", HOPPER_BACKWARD_TOKENS=KERNELS[kernel]):
        package.backward.backward(*tensors, gradient, dq, dk, dv, call["sequences"])
    found = {"dk": dk - 0.25, "dv": dv + 0.5}
    return found if dq is None else found | {"dq": dq}


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "ragged": ({"rows": 1000, "tokens": 1000}, 128),
    "batch": ({"rows": 333, "tokens": 333, "batch": 3}, 4096),
    "fewer queries, strided": ({"rows": 300, "tokens": 777, "batch": 2, "strided": True}, 64),
    "same blocks": ({"rows": 1500, "tokens": 1500, "same": True}, 4096),
    "packed": ({"rows": 1000, "tokens": 1000, "lengths": (1, 300, 0, 64, 63, 572)}, 256),
    "no gate": ({"rows": 700, "tokens": 700, "gated": False}, 512),
}
"""By name, what `make_call` takes, and tokens of a chunk."""


TOKENS = 500
BROKEN = (("k", 200, "nan"), ("v", 499, "nan"), ("v", 460, "inf"), ("v", 10, "nan"), ("q", 150, "nan"))
"""An input of TOKENS tokens, a place in it, and what is there: some queries of its block see it, and some do not."""


def backward_job(result: dict[str, Any], module: ModuleType, device: str = "cuda") -> None:
    """Compare errors of both kernels in every case of a package, whether bits repeat, and where a NaN goes."""
    package = Package(module, device)
    result["rows"] = rows = []
    for name, (arguments, chunk_tokens) in CASES.items():
        call = make_call(package, **arguments)
        for with_dq in (True, False):
            say(f"{name}, {'with' if with_dq else 'without'} dq")
            mine, again = (differentiate(package, call, "hopper", chunk_tokens, with_dq) for _ in range(2))
            theirs = differentiate(package, call, "ordinary", chunk_tokens, with_dq)
            errors = {key: (_error(mine[key], call[key]), _error(theirs[key], call[key])) for key in mine}
            same_bits = all(torch.equal(mine[key], again[key]) for key in mine)
            ok = same_bits and all(x <= FACTOR * y + FLOOR for x, y in errors.values())
            rows.append({"case": name, "dq": with_dq, "errors": errors, "same_bits": same_bits, "ok": ok})
    call = make_call(package, TOKENS, TOKENS)
    for name, place, value in (*BROKEN, ("do", TOKENS // 2, "nan")):
        broken = call | {name: call[name].clone()}
        broken[name][0, place, 0, 5] = float(value)
        mine, theirs = (differentiate(package, broken, kernel, 128) for kernel in KERNELS)
        ok = all(torch.equal(mine[key].isfinite(), theirs[key].isfinite()) for key in mine)
        rows.append({"case": f"{value} in {name} at {place}", "ok": ok})
    wrong = [row for row in rows if not row["ok"]]
    result.update(ok=not wrong, error="; ".join(map(str, wrong)))


def forward_job(result: dict[str, Any], module: ModuleType, device: str = "cuda") -> None:
    """Compare errors of both kernels in every case of a package, whether bits repeat, and what a NaN reaches."""
    package = Package(module, device)
    result["rows"] = rows = []
    for name, (arguments, chunk_tokens) in CASES.items():
        say(name)
        call = make_call(package, **arguments)
        mine, again = (attend(package, call, "hopper", chunk_tokens) for _ in range(2))
        theirs = attend(package, call, "ordinary", chunk_tokens)
        errors = {key: (_error(mine[key], call[key]), _error(theirs[key], call[key])) for key in mine}
        same_bits = all(torch.equal(mine[key], again[key]) for key in mine)
        ok = same_bits and all(x <= FACTOR * y + FLOOR for x, y in errors.values())
        rows.append({"case": name, "errors": errors, "same_bits": same_bits, "ok": ok})
    call = make_call(package, TOKENS, TOKENS)
    clean = attend(package, call, "hopper", 128)
    for name, place, value in BROKEN:
        broken = call | {name: call[name].clone()}
        broken[name][0, place, 0, 5] = float(value)
        mine, theirs = (attend(package, broken, kernel, 128) for kernel in KERNELS)
        same_places = all(torch.equal(mine[key].isfinite(), theirs[key].isfinite()) for key in mine)
        spared = theirs["o"].isfinite()
        same_bits = torch.equal(mine["o"][spared], clean["o"][spared])
        ok = same_places and same_bits and not bool(spared.all())
        rows.append({"case": f"{value} in {name} at {place}", "places": same_places, "same_bits": same_bits, "ok": ok})
    wrong = [row for row in rows if not row["ok"]]
    result.update(ok=not wrong, error="; ".join(map(str, wrong)))


def _error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected; NaN if anything is NaN."""
    return ((found.double() - expected).norm() / expected.norm()).item()
