"""Run by test_engineering in its own process: launches and allocations of packages on tensors without storage.

Arguments: the packages' folders. Prints JSON, a line a package. Any look at a tensor's values raises: these have none.
"""

import json
import sys
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_gen.rendering import import_package
from nsa_gen.targets.launches import record_launches
from nsa_gen.targets.tracing import trace

SEQUENCES = 3
"""Sequences of a packed call, each of the call's number of tokens."""
CHUNK_TOKENS = 4096


class Allocations(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def constants_of(launch: Any) -> dict[str, Any]:
    """The declared constants of a launch and its options, by name."""
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.keywords
    declared = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    options = {name: value for name, value in launch.keywords.items() if name not in launch.kernel.arg_names}
    return {name: value for name, value in named.items() if name in declared} | options


def specialized_integers(launch: Any) -> list[str]:
    """Names of integer arguments beside strides for whose value Triton may compile anew."""
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    free = {p.name for p in launch.kernel.params if p.do_not_specialize or p.is_constexpr}
    return sorted(
        name
        for name, value in named.items()
        if isinstance(value, int) and name not in free and not name.startswith("stride_")
    )


def record(package: Any, tokens: int, packed: bool) -> dict[str, Any]:
    """Launches and allocations of a call whose inverted index is walked CHUNK_TOKENS tokens at a time."""
    rows = tokens * SEQUENCES if packed else tokens
    if hasattr(package.kernels, "selected_attention"):
        package.kernels.selected_attention.workspace_of = lambda *_: 2**62  # every schedule has the same chunks
    with (
        package.configs.override("selected_attention", CHUNK_TOKENS=CHUNK_TOKENS),
        record_launches() as launches,
        Allocations() as allocations,
    ):
        trace(package, tokens, SEQUENCES if packed else 1, "meta", packed, ("forward", "backward"))
    return {
        "kernels": [launch.name for launch in launches],
        "constants": [constants_of(launch) for launch in launches],
        "specialized": sorted({f"{x.kernel.__name__}.{name}" for x in launches for name in specialized_integers(x)}),
        "grids": [launch.grid for launch in launches],
        "largest": allocations.largest,
        "chunks": triton.cdiv(rows, CHUNK_TOKENS),
        "most_shares": most_shares(package, rows),
    }


def most_shares(package: Any, rows: int) -> int:
    """Most shares of tokens in which blocks are scored, where each but the last fills half its workspace or more."""
    needed = 4 * package.spec.KV_HEADS.value * triton.cdiv(rows, package.spec.SELECTION_BLOCK.value) * rows
    return 1 + 2 * needed // package.kernels.selection.SCORE_BYTES if hasattr(package.kernels, "selection") else 0


def main() -> None:
    calls = ((4099, False), (131072, False), (262144, False), (4099, True), (131072, True))
    for package in map(import_package, sys.argv[1:]):
        print(json.dumps({f"{tokens} {packed}": record(package, tokens, packed) for tokens, packed in calls}))


if __name__ == "__main__":
    main()
