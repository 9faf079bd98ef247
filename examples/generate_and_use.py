"""Generate an operator from a spec and call it, forward and backward.

    python examples/generate_and_use.py [SPEC]

SPEC is a path or a shipped spec's name (default: `tiny`). Without a GPU, the operator runs in Triton's interpreter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import nsa_gen


def main(spec: str = "tiny", tokens: int = 40) -> None:
    """Call the operator of a spec whose branches share keys, and show what it returns."""
    op = nsa_gen.load(spec)  # generated once, into the user's cache; then imported
    heads, dims = op.SPEC["heads"], op.SPEC["head_dim"]
    branches = sum(op.SPEC[name] is not None for name in ("compression", "selection", "window"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"device": device, "dtype": getattr(torch, op.SPEC["dtype"]), "requires_grad": True}

    torch.manual_seed(0)
    q = torch.randn(1, tokens, heads["query"], dims["qk"], **options)
    k = torch.randn(1, tokens, heads["kv"], dims["qk"], **options)
    v = torch.randn(1, tokens, heads["kv"], dims["v"], **options)
    gates = torch.randn(1, tokens, heads["query"], branches, **options)

    o, aux = op.nsa_attention(q, k, v, gates, return_aux=True)
    o.sum().backward()
    print(f"o {tuple(o.shape)}, dq {tuple(q.grad.shape)}, dk {tuple(k.grad.shape)}, dv {tuple(v.grad.shape)}")
    print(f"the last query selects blocks {aux.indices[0, -1, 0].tolist()} for its first KV head")

    # Packed: three independent sequences in one batch. The first is also the beginning of the call above.
    bounds = torch.tensor([0, 20, 21, tokens], dtype=torch.int32, device=device)
    with torch.no_grad():
        packed = op.nsa_attention(q[0], k[0], v[0], gates[0], cu_seqlens=bounds)
    same = torch.allclose(packed[:20].float(), o[0, :20].float(), atol=1e-2 if q.is_cuda else 1e-5)
    print(f"packed {tuple(packed.shape)}; its first sequence is the beginning of the call above: {same}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
