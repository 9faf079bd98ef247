"""Our front end `parallel_nsa_of` beside flash-linear-attention's naive_nsa and parallel_nsa, as it may be called.

`fla` and `einops` must be importable (see docs/bench.md). Agreement is measured as that package's
tests do: the root mean square of the difference over that of the reference, below LIMIT. Where compression chooses the
blocks, lists may differ by ties of rounding; tokens whose lists agree are compared, and few may not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_gen.compat import parallel_nsa_of
from nsa_gen.rendering import import_package
from nsa_gen.spec import Spec, parse_spec
from tests.gpu.support import package_of

LIMIT = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 2e-2}
"""Most that o or a gradient may differ, of its root mean square."""
FEWEST_EQUAL_LISTS = {"float32": 0.999, "float16": 0.97, "bfloat16": 0.9}


@dataclass(frozen=True)
class Configuration:
    """One call, as that package supports it: groups of 16 or 32, one block size for compression and selection."""

    heads: tuple[int, int]
    dim: int
    count: int
    block: int
    bounds: tuple[int, ...]
    batch: int
    dtype: str
    chosen: bool
    against: str

    @property
    def name(self) -> str:
        lists = "chosen" if self.chosen else "handed"
        lengths = "x".join(map(str, (self.batch, self.bounds[-1]))) if self.batch else f"packed {list(self.bounds)}"
        query, kv = self.heads
        return (
            f"{self.against} {lists} {lengths} {query}/{kv} heads {self.dim} n={self.count} {self.block} {self.dtype}"
        )

    @property
    def spec(self) -> Spec:
        query, kv = self.heads
        compression = f"compression: {{block: {self.block}, stride: {self.block}, phi: mean}}" if self.chosen else ""
        more = "initial: 1, local: 2" if self.chosen else "indices: input"
        text = f"""
version: 1
name: beside_fla
heads: {{query: {query}, kv: {kv}}}
head_dim: {self.dim}
dtype: {self.dtype}
{"fp32_precision: ieee" if self.dtype == "float32" else ""}
{compression}
selection: {{block: {self.block}, count: {self.count}, {more}}}
combine: {{gate: given}}
"""
        return parse_spec(text, "<beside fla>")


CONFIGURATIONS = (
    Configuration((16, 1), 64, 16, 32, (0, 63), 1, "float16", False, "naive_nsa"),
    Configuration((32, 2), 64, 8, 32, (0, 512), 2, "float16", False, "naive_nsa"),
    Configuration((16, 1), 64, 8, 16, (0, 15, 205, 550, 800), 0, "float16", False, "naive_nsa"),
    Configuration((16, 1), 64, 4, 32, (0, 400), 1, "float32", True, "naive_nsa"),
    Configuration((32, 2), 64, 8, 32, (0, 512), 1, "float32", True, "naive_nsa"),
    Configuration((32, 2), 64, 4, 32, (0, 256, 500), 0, "float32", True, "naive_nsa"),
    Configuration((32, 2), 128, 16, 32, (0, 1024), 3, "float16", False, "parallel_nsa"),
    Configuration((32, 2), 64, 16, 32, (0, 2048), 4, "float16", False, "parallel_nsa"),
    Configuration((64, 4), 128, 16, 64, (0, 4096), 1, "bfloat16", False, "parallel_nsa"),
    Configuration((32, 2), 64, 16, 32, (0, 256, 500, 1000), 0, "float16", False, "parallel_nsa"),
)


def missing() -> str:
    """Packages that cannot be imported here, of those that the comparison needs; empty where all can."""
    return ", ".join(name for name in ("fla", "einops") if importlib.util.find_spec(name) is None)


def compare(each: Configuration, theirs: Callable[..., Any], device: str, seed: int) -> dict[str, Any]:
    """Outputs and gradients of one configuration by both packages."""
    torch.backends.cuda.matmul.allow_tf32 = False
    module = import_package(package_of(each.spec))
    inputs, do = drawn(each, device, seed)
    lists = None if each.chosen else some_lists(each, device, seed)
    bounds = None if each.batch else torch.tensor(each.bounds, dtype=torch.int32, device=device)
    common: dict[str, Any] = {"block_counts": each.count, "block_size": each.block, "cu_seqlens": bounds}
    if lists is not None:
        common["block_indices"] = lists
    equal = torch.ones(do.shape[:2], dtype=torch.bool, device=device)
    if each.chosen:
        gates = torch.stack([inputs["g_cmp"], inputs["g_slc"]], dim=-1)
        given = [x.detach() if each.batch else x.detach()[0] for x in (*(inputs[name] for name in "qkv"), gates)]
        _, aux = module.nsa_attention(*given, cu_seqlens=bounds, return_aux=True)
        mine = aux.indices if each.batch else aux.indices[None]
        with torch.no_grad():
            _, found = theirs(**inputs, **common, return_block_indices=True)
        equal = same_lists(mine, found, each)
    # Tokens whose lists differ are left out of the loss, so that gradients can be compared too.
    do = do * equal[..., None, None]
    ours = gradients(lambda: parallel_nsa_of(module)(**inputs, **common), inputs, do)
    reference = gradients(lambda: theirs(**inputs, **common), inputs, do)
    ours["o"], reference["o"] = ours["o"][equal], reference["o"][equal]
    errors = {name: relative(ours[name], reference[name]) for name in ours}
    share = equal.float().mean().item()
    ok = all(error <= LIMIT[each.dtype] for error in errors.values()) and share >= FEWEST_EQUAL_LISTS[each.dtype]
    return {"ok": ok, "errors": errors, "limit": LIMIT[each.dtype], "equal_lists": share}


def drawn(each: Configuration, device: str, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves by the names of the call's arguments, and an output gradient."""
    generator = torch.Generator().manual_seed(seed + 1)
    query, kv = each.heads
    rows = (each.batch or 1, each.bounds[-1])
    sizes = {"q": (query, each.dim), "k": (kv, each.dim), "v": (kv, each.dim), "g_slc": (query,)}
    sizes |= {"g_cmp": (query,)} if each.chosen else {}
    dtype = getattr(torch, each.dtype)

    def draw(*size: int) -> Tensor:
        return torch.randn(*rows, *size, generator=generator).to(device, dtype)

    leaves = {name: draw(*size) for name, size in sizes.items()}
    leaves = {name: x.sigmoid() if name.startswith("g_") else x for name, x in leaves.items()}
    return {name: x.detach().requires_grad_() for name, x in leaves.items()}, draw(query, each.dim)


def some_lists(each: Configuration, device: str, seed: int) -> Tensor:
    """Random blocks up to each token's own, (B, T, Hkv, n) int64, padded with -1 in front."""
    generator = torch.Generator().manual_seed(seed + 2)
    lists = torch.full((each.batch or 1, each.bounds[-1], each.heads[1], each.count), -1, dtype=torch.int64)
    for first, end in zip(each.bounds, each.bounds[1:], strict=False):
        for token in range(first, end):
            blocks = (token - first) // each.block + 1
            order = torch.rand(*lists.shape[:1], lists.shape[2], blocks, generator=generator).argsort(-1)
            used = order[..., : each.count]
            lists[:, token, :, : used.shape[-1]] = used
    return lists.sort(-1).values.to(device)


def same_lists(mine: Tensor, theirs: Tensor, each: Configuration) -> Tensor:
    """Tokens (B, T) whose lists name the same blocks for every head, among those that a token can see."""
    positions = torch.cat([torch.arange(end - first) for first, end in zip(each.bounds, each.bounds[1:], strict=False)])
    own = (positions.to(mine.device) // each.block)[None, :, None, None]

    def tidy(lists: Tensor) -> Tensor:
        lists = lists.long()
        return lists.where((lists >= 0) & (lists <= own), -1).sort(-1).values

    return (tidy(mine) == tidy(theirs)).all(-1).all(-1)


def gradients(call: Callable[[], Tensor], inputs: dict[str, Tensor], do: Tensor) -> dict[str, Tensor]:
    """o and every gradient, by name."""
    o = call()
    found: Sequence[Tensor] = torch.autograd.grad(o, list(inputs.values()), do.to(o.dtype))
    return {"o": o.detach(), **{f"d{name}": x for name, x in zip(inputs, found, strict=True)}}


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what was expected."""
    difference = (found.double() - expected.double()).square().mean().sqrt()
    return (difference / expected.double().square().mean().sqrt().clamp(min=1e-30)).item()
