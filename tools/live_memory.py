"""Print what a forward and a backward hold in memory at their peaks, without a GPU.

    python tools/live_memory.py nsa_64x4 [--tokens 8192 32768] [--target sm_90] [--batch 1] [--json]

The package's launch functions run on tensors without storage, and launches are recorded instead of executed. The bytes
are those of all tensors that live at the same time, without the inputs, as `nsa-gen bench` counts them. The rounding of
the caching allocator is not included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nsa_gen.rendering import generate, import_package
from nsa_gen.spec import load_spec
from nsa_gen.targets.memory import Peak, measure_memory

MIB = 2**20


def show(peak: Peak, least: int) -> None:
    """Print a pass's peak, and the allocations of at least `least` bytes that live at that time."""
    print(f"  {peak.bytes / MIB:10.1f} MiB  {peak.name}, at {peak.at}")
    for each in peak.live:
        if each.bytes >= least:
            print(f"    {each.bytes / MIB:10.1f}  {each.dtype.removeprefix('torch.'):9}{each.shape!s:28}{each.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--least", type=float, default=1.0, help="smallest allocation to print, in MiB")
    parser.add_argument("--recompute", nargs="*", default=[], help="branches whose forward the backward runs again")
    parser.add_argument("--workspace", type=int, help="bytes of partial results, as `workspace_bytes`")
    parser.add_argument("--json", action="store_true", help="print the bytes of each peak by tokens and pass, as JSON")
    options = parser.parse_args()
    bytes_of: dict[int, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="nsa_gen_memory_") as folder:
        package = import_package(generate(load_spec(options.spec), Path(folder)))
        for tokens in options.tokens:
            peaks = measure_memory(package, tokens, options.target, options.batch, options.recompute, options.workspace)
            bytes_of[tokens] = {peak.name: peak.bytes for peak in peaks}
            if not options.json:
                print(f"{options.spec}, {options.batch} x {tokens} tokens, {options.target}")
                for peak in peaks:
                    show(peak, int(options.least * MIB))
    if options.json:
        print(json.dumps(bytes_of))


if __name__ == "__main__":
    main()
