"""Show which blocks the queries of a call select.

    python examples/visualise_selection.py [FILE.png]

Each line is a query and each character a block: `#` forced (the first block and the query's own), `o` selected by
importance, `.` not selected. With a file name, matplotlib draws the same. The keys of one block are made to stand out,
so that the queries after it select it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import nsa_gen


def selected_blocks(tokens: int = 128, striking: int = 3) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Blocks that each query of the first KV head selects, (T, blocks) bool; the forced ones, bool; and the sizes.

    The keys of block `striking` are parallel to all queries, so its importance is high.
    """
    op = nsa_gen.load("tiny")
    sizes = op.SPEC["selection"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    direction = torch.ones(16, device=device)
    q = 0.3 * torch.randn(1, tokens, 4, 16, device=device) + direction
    k, v = (torch.randn(1, tokens, 2, 16, device=device) for _ in range(2))
    k[:, striking * sizes["block"] : (striking + 1) * sizes["block"]] += direction
    # The steps up to the selection, one by one. `nsa_attention(..., return_aux=True)` returns the same indices.
    k_cmp, v_cmp = op.compress(k, v)
    _, lse_cmp = op.compressed_attention(q, k_cmp, v_cmp)
    found, _ = op.select_blocks(q, k_cmp, lse_cmp)

    indices = found[0, :, 0].long().cpu()  # (T, n), -1 in unused slots
    blocks = -(-tokens // sizes["block"])
    chosen = torch.zeros(tokens, blocks + 1, dtype=torch.bool)
    chosen.scatter_(1, indices.where(indices >= 0, blocks), True)
    own = (torch.arange(tokens) // sizes["block"])[:, None]
    block = torch.arange(blocks)
    forced = ((block < sizes["initial"]) | (block > own - sizes["local"])) & (block <= own)
    return chosen[:, :blocks], forced, dict(sizes)


def draw(chosen: Tensor, forced: Tensor, path: Path) -> None:
    """Draw the blocks: rows are queries, columns are blocks. Needs matplotlib."""
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(4, 5), layout="constrained")
    ax.imshow((chosen.int() + (chosen & forced).int()).numpy(), aspect="auto", interpolation="nearest", cmap="Blues")
    ax.set(xlabel="block", ylabel="query", title="light: selected, dark: forced")
    figure.savefig(path)
    pyplot.close(figure)


def main(path: str | None = None) -> None:
    """Print every eighth query, or draw all of them."""
    chosen, forced, sizes = selected_blocks()
    print(f"blocks of {sizes['block']} tokens, {sizes['count']} a query")
    for t in range(7, len(chosen), 8):
        marks = ["#" if f else "o" if c else "." for c, f in zip(chosen[t], forced[t], strict=True)]
        print(f"query {t:4}  {''.join(marks[: t // sizes['block'] + 1])}")
    if path is not None:
        draw(chosen, forced, Path(path))
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:2])
