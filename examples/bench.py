"""Show how long an operator takes by length, and where the time goes.

    python examples/bench.py [SPEC] [N,N,...]

On a GPU, the operator and dense attention are timed, as by `nsa-gen bench`. Without a GPU, the table compares the cost
model's prediction for an H100 with the least time that dense causal attention could take there: its arithmetic at the
GPU's peak. No dense kernel reaches this, so sparse attention is faster from shorter lengths on than the table says.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nsa_gen import load_spec, lower
from nsa_gen.cli import main as nsa_gen_command
from nsa_gen.hardware import gpu
from nsa_gen.lowering.prediction import predict

LENGTHS = "8192,32768,65536,131072"


def dense_floor(heads: int, dims: int, tokens: int, tflops: float) -> float:
    """Seconds of dense causal attention, forward and backward, at a peak of `tflops` TFLOP/s.

    The forward has two products of T x T, the backward five; causal attention needs half of each.
    """
    return 7 * heads * tokens * tokens * dims / (tflops * 1e12)


def main(spec: str = "llama3_8b", lengths: str = LENGTHS) -> int:
    """Time the operator, or print the cost model's predictions."""
    if torch.cuda.is_available():
        return nsa_gen_command(["bench", spec, "--against", "dense", "--tokens", lengths])
    loaded, device = load_spec(spec), gpu("h100")
    plan = lower(loaded)
    print(f"{loaded.name} on one {device.name}, forward and backward, predicted")
    print(f"{'tokens':>9}  {'sparse ms':>9}  {'dense floor ms':>14}  slowest kernels")
    for tokens in map(int, lengths.split(",")):
        found = predict(plan, tokens=tokens, gpu_key=device.key)
        times = {name: 1e3 * found[name].seconds for name in found if plan.kernel(name).direction != "decode"}
        slowest = sorted(times, key=times.__getitem__, reverse=True)[:3]
        dims = (loaded.head_dim.qk + loaded.head_dim.v) // 2
        dense = 1e3 * dense_floor(loaded.heads.query, dims, tokens, device.bf16_tflops)
        print(f"{tokens:>9,}  {sum(times.values()):>9.2f}  {dense:>14.2f}  {', '.join(slowest)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
