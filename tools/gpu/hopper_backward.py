"""How long Hopper's kernel of selected attention's gradients takes beside the ordinary one.

    python -m tools.gpu.hopper_backward generated/llama3_8b --tokens 65536 8192 --save build/hopper_backward.json

Needs a GPU of capability 9.0, and of Python torch and triton alone. `pytest tests/gpu -k hopper` checks the values.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from tests.gpu.hopper_backward import KERNELS, Package

REPEATS = 12


def prepare(package: Package, tokens: int) -> dict[str, Callable[[], None]]:
    """Launches of the gradients by kernel, merges included, with the blocks that the operator chooses."""
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=package.dtype)

    q, do = normal(1, tokens, package.hq, package.dk), normal(1, tokens, package.hq, package.dv)
    k, v = normal(1, tokens, package.hkv, package.dk), normal(1, tokens, package.hkv, package.dv)
    gate = normal(1, tokens, package.hq, 3)[..., 1] if package.gated else None
    k_cmp, v_cmp = package.top.compress(k, v)
    lse_cmp = package.top.compressed_attention(q, k_cmp, v_cmp)[1]
    indices, counts = package.top.select_blocks(q, k_cmp, lse_cmp)
    o, lse = package.top.selected_attention(q, k, v, indices, counts)
    delta = (do.float() * o.float()).sum(-1)
    sequences = package.sequences.Sequences(1, tokens, tokens)
    layout = package.index.Layout.of(sequences, package.configs.get("selected_attention", q.device)["CHUNK_TOKENS"])
    keys = package.index.slot_keys(indices, counts, sequences, layout, False)
    ordered = package.index.sort_slots(keys, layout)
    dk, dv = torch.zeros(k.shape, device="cuda"), torch.zeros(v.shape, device="cuda")

    def launch(kernel: str, dq: Tensor | None) -> None:
        with package.configs.override("selected_backward", HOPPER_BACKWARD_TOKENS=KERNELS[kernel]):
            given = (q, k, v, keys, *ordered, layout, do, lse, delta, gate, dq, dk, dv, sequences)
            package.kernels.backward(*given)

    dq = torch.empty_like(q)
    return {
        f"{kernel}, {'dk, dv' if without else 'dk, dv, dq'}": lambda kernel=kernel, x=None if without else dq: launch(
            kernel, x
        )
        for without in (False, True)
        for kernel in KERNELS
    }


def measure(package: Package, tokens: int) -> dict[str, float]:
    """Milliseconds by kernel, medians of launches in turn."""
    launches = prepare(package, tokens)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in launches}
    for repeat in range(REPEATS + 2):
        for name, launch in launches.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launch()
            end.record()
            if repeat >= 2:
                events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 65536])
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    package = Package(given.package)
    found = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "milliseconds": {str(tokens): measure(package, tokens) for tokens in given.tokens},
    }
    text = json.dumps(found, indent=1)
    print(text)
    if given.save is not None:
        given.save.write_text(text + "\n")


if __name__ == "__main__":
    main()
