"""Hopper's kernel of banded attention beside the ordinary ones: equal values, NaN in the same places, equal bits again.

The ordinary kernels are held against the oracle elsewhere; so is this one, by `verify`, at the schedules that it draws.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
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
)  # fmt: skip
"""Query tokens or packed lengths, key tokens where there are more, and how the tensors lie in memory."""
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
    attention = importlib.import_module(f"{module.__name__}.kernels.banded")
    forward = getattr(attention, f"{branch}_forward")
    clean, sequences = _inputs(module, branch, tokens, tokens_kv, form, device)
    inputs = _poisoned(clean, poison)
    found = {}
    runs = (("ordinary", NEVER, inputs), ("hopper", 0, inputs), ("again", 0, inputs), ("clean", 0, clean))
    for name, least, tensors in runs:
        with module.configs.override("banded_attention", HOPPER_TOKENS=least), _poisoned_memory():
            found[name] = dict(zip(("o", "lse"), forward(*tensors, sequences), strict=True))
    if other_bits(found["hopper"], found["again"]):
        yield "other bits when called again"
    spared = ~found["ordinary"]["o"].isnan().any(-1)
    if other_bits({"o": found["hopper"]["o"][spared]}, {"o": found["clean"]["o"][spared]}):
        yield "other bits in rows that see no NaN"
    for name, tolerance in (("o", TOLERANCE[inputs[0].dtype]), ("lse", 1e-5)):
        ours, theirs = found["hopper"][name].double(), found["ordinary"][name].double()
        for what in (torch.isnan, torch.isinf):
            if not torch.equal(what(ours), what(theirs)):
                yield f"{name}: {what.__name__} elsewhere"
        ours, theirs = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (ours, theirs))
        error = ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()
        if not error <= tolerance:
            yield f"{name}: off by {error:.2e}, at most {tolerance:.0e}"


def _inputs(
    module: Any, branch: str, tokens: Any, tokens_kv: int | None, form: str, device: str
) -> tuple[tuple[Tensor, Tensor, Tensor], Any]:
    p = importlib.import_module(f"{module.__name__}.spec")
    sequences_of = importlib.import_module(f"{module.__name__}.runtime.sequences").Sequences
    packed = not isinstance(tokens, int)
    rows, batch = (sum(tokens), 1) if packed else (tokens, 2)
    ends = torch.tensor([0, *tokens], device=device).cumsum(0).int() if packed else None
    sequences = sequences_of(batch, rows, tokens_kv or rows, ends)
    keys = sequences.tokens_kv
    if branch == "compressed":
        keys = sequences.compressed_rows(p.COMPRESSION_BLOCK.value, p.COMPRESSION_STRIDE.value)
    dtype = getattr(torch, module.SPEC["dtype"])

    def random(length: int, heads: int, width: int) -> Tensor:
        sizes = {"plain": (batch, length, heads, width), "fused": (batch, length, 3, heads, width)}
        x = torch.randn(sizes.get(form, (batch, heads, length, width)), device=device).to(dtype)
        return x if form == "plain" else x[:, :, 1] if form == "fused" else x.transpose(1, 2)

    q = random(rows, p.QUERY_HEADS.value, p.HEAD_DIM_QK.value)
    k, v = (random(keys, p.KV_HEADS.value, width.value) for width in (p.HEAD_DIM_QK, p.HEAD_DIM_V))
    return (q, k, v), sequences


def _poisoned(inputs: tuple[Tensor, Tensor, Tensor], poison: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, laid out as they were, with NaN and infinities in what `poison` names."""
    q, k, v = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in inputs)
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
