"""Hopper's kernels of banded attention beside the ordinary ones: equal values, NaN in its place, equal bits again.

The ordinary kernels are held against the oracle elsewhere; so is this one, by `verify`, at the schedules that it draws.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.gpu.common import other_bits, say

NEVER = 2**31
SHAPES: tuple[tuple[Any, int | None, str], ...] = (
    (33, None, "plain"), (128, None, "plain"), (129, None, "plain"), (2311, None, "plain"),
    (1000, None, "fused"), (1000, None, "heads first"), (1, 700, "plain"), (777, 3000, "plain"),
    ((1, 0, 33, 511, 700, 64, 2), None, "plain"), ((130, 1300, 16, 15, 48, 257), None, "plain"),
    (256, None, "many"),
)  # fmt: skip
"""Query tokens or packed lengths, key tokens where there are more, and how the tensors lie in memory, or "many" where
there are MANY sequences and not two."""
MANY = 48
POISONS = ("none", "v", "k", "q", "far keys")
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Of o in the Frobenius norm: both round probabilities and o, at other places."""


def hopper_job(result: dict[str, Any], module: ModuleType, branch: str, seed: int = 0) -> None:
    """Compare the kernels of a branch of a package, for every shape and poison."""
    torch.manual_seed(seed)
    broken: list[str] = []
    for shape in SHAPES:
        for poison in POISONS:
            label = f"{branch} {shape} poison {poison}"
            say(label)
            broken += [f"{label}: {fault}" for fault in faults(module, branch, *shape, poison, "cuda")]
    result.update(ok=not broken, error="; ".join(broken), compared=len(SHAPES) * len(POISONS))


def faults(
    module: Any, branch: str, tokens: Any, tokens_kv: int | None, form: str, poison: str, device: str
) -> Iterator[str]:
    """What is wrong with o and lse of a branch by Hopper's kernel, for inputs with NaN in what `poison` names."""
    forward = _forward(module, branch, device)
    clean, sequences = inputs(module, branch, tokens, tokens_kv, form, device)
    spoilt = _poisoned(clean, poison)
    found = {}
    runs = (("ordinary", NEVER, spoilt), ("hopper", 0, spoilt), ("again", 0, spoilt), ("clean", 0, clean))
    for name, least, tensors in runs:
        with module.configs.override("banded_attention", HOPPER_TOKENS=least), _poisoned_memory():
            found[name] = dict(zip(("o", "lse"), forward(*tensors, sequences), strict=True))
    if other_bits(found["hopper"], found["again"]):
        yield "other bits when called again"
    spared = ~found["ordinary"]["o"].isnan().any(-1)
    if other_bits({"o": found["hopper"]["o"][spared]}, {"o": found["clean"]["o"][spared]}):
        yield "other bits in rows that see no NaN"
    for name, tolerance in (("o", TOLERANCE[spoilt[0].dtype]), ("lse", 1e-5)):
        ours, theirs = found["hopper"][name].double(), found["ordinary"][name].double()
        for what in (torch.isnan, torch.isinf):
            if not torch.equal(what(ours), what(theirs)):
                yield f"{name}: {what.__name__} elsewhere"
        ours, theirs = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (ours, theirs))
        error = ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()
        if not error <= tolerance:
            yield f"{name}: off by {error:.2e}, at most {tolerance:.0e}"


# Gradients

GRADIENT_FACTOR, GRADIENT_FLOOR = 1.3, 1e-4
"""The error of Hopper's gradients, relative to float64, may be this much of the ordinary ones', and this much more."""
TILE = 64
"""Keys and queries of a tile of Hopper's kernel: a NaN reaches the tiles of keys that its tile of queries sees."""


def gradients_job(result: dict[str, Any], module: ModuleType, branch: str, seed: int = 0) -> None:
    """Compare gradients of a branch of a package by Hopper's kernels and by the ordinary ones; time dq."""
    torch.manual_seed(seed)
    broken: list[str] = []
    for shape in SHAPES:
        for gated in (True, False):
            label = f"gradients of {branch} {shape} {'with' if gated else 'without'} a gate"
            say(label)
            broken += [f"{label}: {fault}" for fault in gradient_faults(module, branch, *shape, gated, "cuda")]
    result.update(ok=not broken, error="; ".join(broken), compared=2 * len(SHAPES), ms=times(module, branch))


def gradient_faults(
    module: Any, branch: str, tokens: Any, tokens_kv: int | None, form: str, gated: bool, device: str
) -> Iterator[str]:
    """What is wrong with gradients of a branch by Hopper's kernels: dk and dv, and dq where the package has the kernel.

    With a gate, dq is added in float32 to what it holds before; without one, it is written in the package's dtype.
    """
    backward = getattr(importlib.import_module(f"{module.__name__}.kernels.banded_backward"), f"{branch}_backward")
    (q, k, v), sequences = inputs(module, branch, tokens, tokens_kv, form, device)
    do = torch.randn(*q.shape[:3], v.shape[3], device=device).to(q.dtype)
    gated = gated and module.SPEC["combine"]["gate"] == "sigmoid"
    gate = torch.randn(*q.shape[:3], 3, device=device).to(q.dtype)[..., 1] if gated else None
    visible = _visible(module, branch, sequences, k.shape[1], device)
    scale = importlib.import_module(f"{module.__name__}.spec").SCALE.value
    exact = differentiate(q, k, v, do, gate, scale, lambda *_: visible[0])
    gradient_type = importlib.import_module(f"{module.__name__}.runtime.sequences").OutputGradient

    before = None if gate is None else torch.randn(q.shape, device=device)
    exact["dq"] += 0.0 if before is None else before
    tunables = _tunables(module, device)

    def run(least: int, do: Tensor, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> dict[str, Tensor]:
        new = torch.zeros_like if sequences.packed else torch.empty_like  # what belongs to no key is not written
        with module.configs.override("banded_backward", **dict.fromkeys(tunables, least)), _poisoned_memory():
            dk, dv = (new(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (k, v))
            dq = new(q, memory_format=torch.contiguous_format) if before is None else before.clone()
            gradient = gradient_type(do, exact["lse"], exact["delta"], gate)
            backward(q, k, v, gradient, dq, dk, dv, sequences, dq_before=None if before is None else dq)
        return {"dq": dq, "dk": dk, "dv": dv}

    hopper, again, ordinary = run(0, do), run(0, do), run(NEVER, do)
    if other_bits(hopper, again):
        yield "other bits when called again"
    for name in hopper:
        size = (exact[name] - (before if name == "dq" and before is not None else 0.0)).norm().clamp_min(1e-30)
        ours, theirs = (((found[name].double() - exact[name]).norm() / size).item() for found in (hopper, ordinary))
        if not ours <= GRADIENT_FACTOR * theirs + GRADIENT_FLOOR:
            yield f"{name}: off by {ours:.2e}, the ordinary kernel by {theirs:.2e}"
    if before is None and DQ_TUNABLE in tunables:
        group = q.shape[2] // k.shape[2]
        for poison in POISONS[1:]:
            spoilt = _poisoned((q, k, v), poison)
            ours, theirs = (run(least, do, *spoilt)["dq"] for least in (0, NEVER))
            q_bad, k_bad, v_bad = (~x.isfinite().all(-1) for x in spoilt)
            seen = torch.einsum("tk,bkh->bth", visible[0].float(), (k_bad | v_bad).float()) > 0
            finite, kept = ours.isfinite().all(-1), theirs.isfinite().all(-1)
            if (kept & ~finite).any():
                yield f"dq: poison {poison} reaches rows that the ordinary kernel keeps finite"
            reached = seen.repeat_interleave(group, 2) | (q_bad & visible.any(-1)[..., None])
            if (finite & reached).any():
                yield f"dq: poison {poison} does not reach every row that sees it"
            # What the other rows hold was right above, where nothing was poisoned.
            ours, clean = ours[finite & kept].double(), hopper["dq"][finite & kept].double()
            if not (ours - clean).norm() <= TOLERANCE[q.dtype] * clean.norm():
                yield f"dq: poison {poison} changes rows that it does not reach"
    at = q.shape[1] // 2
    do[:, at, -1, 3] = float("nan")
    reached = run(0, do)["dv"][:, :, -1].isnan().any(-1)
    if not reached[:, visible[0, at]].all():
        yield "dv: a NaN of do does not reach every key that its query sees"
    if not sequences.packed:
        seen = visible[0, at // TILE * TILE : at // TILE * TILE + TILE].any(0)
        tiles = torch.nn.functional.pad(seen, (0, -len(seen) % TILE)).view(-1, TILE)
        beyond = ~tiles.any(-1).repeat_interleave(TILE)[: len(seen)]
        if reached[:, beyond].any():
            yield "dv: a NaN of do reaches a tile of keys that no query of its tile sees"


DQ_TUNABLE = "HOPPER_DQ_TOKENS"
TIMED = 65536
"""Tokens of the sequence whose gradients are timed."""


def _tunables(module: Any, device: str) -> list[str]:
    """From how many tokens on Hopper's kernels serve: for dk and dv, and for dq where the package has the kernel."""
    return list(module.configs.get("banded_backward", torch.device(device)))


def times(module: Any, branch: str, tokens: int = TIMED) -> dict[str, float]:
    """Milliseconds of a branch's gradients with dq by the ordinary kernel and by Hopper's: medians of 7, in turn."""
    gradients = importlib.import_module(f"{module.__name__}.kernels.banded_backward")
    (q, k, v), sequences = inputs(module, branch, tokens, None, "plain", "cuda", batch=1)
    o, lse = _forward(module, branch, "cuda")(q, k, v, sequences)
    delta = torch.zeros_like(lse)
    gradient = importlib.import_module(f"{module.__name__}.runtime.sequences").OutputGradient(o, lse, delta, None)
    dq, dk, dv = (torch.empty_like(x, dtype=torch.float32) for x in (q, k, v))
    found: dict[str, list[float]] = {"ordinary": [], "hopper": []}
    if DQ_TUNABLE not in _tunables(module, "cuda"):
        return {}
    for turn in range(8):
        for name, least in (("ordinary", NEVER), ("hopper", 0)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with module.configs.override("banded_backward", HOPPER_BACKWARD_TOKENS=0, HOPPER_DQ_TOKENS=least):
                start.record()
                getattr(gradients, f"{branch}_backward")(q, k, v, gradient, dq, dk, dv, sequences)
                end.record()
            torch.cuda.synchronize()
            if turn > 0:  # the first compiles
                found[name].append(start.elapsed_time(end))
    return {name: sorted(each)[len(each) // 2] for name, each in found.items()}


def _forward(module: Any, branch: str, device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of a branch as a function of q, k, v and sequences: with random sinks where it has them."""
    forward = getattr(importlib.import_module(f"{module.__name__}.kernels.banded"), f"{branch}_forward")
    if "sink" not in inspect.signature(forward).parameters:
        return forward
    heads = importlib.import_module(f"{module.__name__}.spec").QUERY_HEADS.value
    sink = torch.randn(heads, device=device)
    return lambda q, k, v, sequences: forward(q, k, v, sink, sequences)


def _visible(module: Any, branch: str, sequences: Any, keys: int, device: str) -> Tensor:
    """(1, Tq, keys) bool: which keys, or rows of compressed keys, a query sees."""
    p = importlib.import_module(f"{module.__name__}.spec")
    block, stride, window = (
        (p.COMPRESSION_BLOCK.value, p.COMPRESSION_STRIDE.value, 0) if branch == "compressed" else (1, 1, p.WINDOW.value)
    )
    visible = torch.zeros(sequences.tokens_q, keys, dtype=torch.bool, device=device)
    bounds = sequences.cu_seqlens.tolist() if sequences.packed else [0, sequences.tokens_q]
    for start, end in pairwise(bounds):
        tokens_kv = end - start if sequences.packed else sequences.tokens_kv
        position = torch.arange(end - start, device=device)[:, None] + tokens_kv - (end - start)
        key = torch.arange(max(tokens_kv - block + stride, 0) // stride, device=device)[None]
        seen = key * stride + block - 1 <= position
        if window:
            seen &= key > position - window
        first = start // stride
        visible[start:end, first : first + seen.shape[1]] = seen
    return visible[None]


def differentiate(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, gate: Tensor | None, scale: float, seen: Callable[[int, int], Tensor]
) -> dict[str, Tensor]:
    """lse and delta (B, Tq, Hq) float32, and o, dq, dk and dv in float64, from the definition.

    `seen` gives which keys the queries of a batch entry see by a KV head, (Tq, keys) bool.
    """
    group = q.shape[2] // k.shape[2]
    found = {name: torch.empty(q.shape[:3], device=q.device) for name in ("lse", "delta")}
    for name, x in (("o", do), ("dq", q), ("dk", k), ("dv", v)):
        found[name] = torch.zeros(x.shape, dtype=torch.float64, device=q.device)
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            h = head // group
            unseen = ~seen(b, h)
            queries, keys = q[b, :, head].double(), k[b, :, h].double()
            scores = (queries @ keys.T * scale).masked_fill(unseen, -torch.inf)
            lse = torch.logsumexp(scores, 1)
            p = torch.exp(scores - lse[:, None]).masked_fill(unseen, 0.0)
            found["o"][b, :, head] = p @ v[b, :, h].double()
            dp = do[b, :, head].double() @ v[b, :, h].double().T
            delta = (p * dp).sum(1)
            found["lse"][b, :, head], found["delta"][b, :, head] = lse.float(), delta.float()
            if gate is not None:
                p = p * torch.sigmoid(gate[b, :, head].double())[:, None]
            ds = p * (dp - delta[:, None])
            found["dq"][b, :, head] = ds @ keys * scale
            found["dk"][b, :, h] += ds.T @ queries * scale
            found["dv"][b, :, h] += p.T @ do[b, :, head].double()
    return found


def inputs(
    module: Any, branch: str, tokens: Any, tokens_kv: int | None, form: str, device: str, batch: int = 2
) -> tuple[tuple[Tensor, Tensor, Tensor], Any]:
    p = importlib.import_module(f"{module.__name__}.spec")
    sequences_of = importlib.import_module(f"{module.__name__}.runtime.sequences").Sequences
    packed = not isinstance(tokens, int)
    rows, batch = (sum(tokens), 1) if packed else (tokens, MANY if form == "many" else batch)
    ends = torch.tensor([0, *tokens], device=device).cumsum(0).int() if packed else None
    sequences = sequences_of(batch, rows, tokens_kv or rows, ends)
    keys = sequences.tokens_kv
    if branch == "compressed":
        keys = sequences.compressed_rows(p.COMPRESSION_BLOCK.value, p.COMPRESSION_STRIDE.value)
    dtype = getattr(torch, module.SPEC["dtype"])

    def random(length: int, heads: int, width: int) -> Tensor:
        plain = (batch, length, heads, width)
        sizes = {"plain": plain, "many": plain, "fused": (batch, length, 3, heads, width)}
        x = torch.randn(sizes.get(form, (batch, heads, length, width)), device=device).to(dtype)
        return x[:, :, 1] if form == "fused" else x.transpose(1, 2) if form == "heads first" else x

    q = random(rows, p.QUERY_HEADS.value, p.HEAD_DIM_QK.value)
    k, v = (random(keys, p.KV_HEADS.value, width.value) for width in (p.HEAD_DIM_QK, p.HEAD_DIM_V))
    return (q, k, v), sequences


def _poisoned(clean: tuple[Tensor, Tensor, Tensor], poison: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, laid out as they were, with NaN and infinities in what `poison` names."""
    q, k, v = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in clean)
    if poison == "far keys":
        # What no query sees but those at the end: it must not leak out of a tile that others share.
        k[:, -1:], v[:, -1:] = float("nan"), float("nan")
    elif poison != "none":
        x = {"q": q, "k": k, "v": v}[poison]
        x[:, x.shape[1] // 3 : x.shape[1] // 3 + 1, 0, 3] = float("nan")
        x[:, x.shape[1] // 2 : x.shape[1] // 2 + 1, -1, 5] = float("inf") if poison == "v" else float("nan")
    return q, k, v


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Within the block new tensors hold NaN: what is not written shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1])
