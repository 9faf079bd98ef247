"""Predict how long a call takes on several ranks, from the prediction for one GPU and the bytes that travel.

Assumptions, all of which a measurement may prove wrong:

- A rank takes its share of a kernel's time on one GPU. For kernels whose work grows with the visible compressed blocks
  (attention to them, their scores, the selection), this is its queries' share of the visible blocks. For all others, it
  is its share of the tokens. That small chunks fill a GPU less well is ignored.
- A gather or a sum takes a latency, and the bytes that a rank receives divided by the bandwidth of its link. In a
  gather and in a reduce-scatter, the ranks of a node share keys from other nodes, so each rank's network link carries
  only its share. In an exchange, each link carries its rank's own data.
- The gather of one group of heads is hidden behind the forward of the previous group. Sums are not hidden.
- Every rank waits for the slowest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nsa_gen.distributed.sharding import Order, Shards, blocks_in, gathered_rows
from nsa_gen.lowering import Plan
from nsa_gen.lowering.prediction import predict

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_BY_BLOCKS = ("compressed_", "block_scores", "select_blocks", "mean_scores", "index_scores")


@dataclass(frozen=True)
class Fabric:
    """What connects the ranks. The bandwidths are assumptions: 0.8 of the published peaks of an H100 board.

    Attributes:
        ranks_per_node: GPUs that NVLink connects.
        link: bytes per second that a GPU receives over NVLink, in one direction.
        network: bytes per second that a GPU receives from other nodes over its adapter.
        latency: additional seconds of a collective, and of each rank in it.
    """

    ranks_per_node: int = 8
    link: float = 0.8 * 450e9
    network: float = 0.8 * 50e9
    latency: tuple[float, float] = (20e-6, 0.5e-6)


@dataclass(frozen=True)
class RankPrediction:
    """A forward and backward of one call on several ranks.

    Attributes:
        ranks, order, tokens: of the call.
        forward, backward: seconds of the kernels on the rank with the most work.
        gathered: bytes that a rank receives from others in the forward: keys, values and compressed ones.
        summed: bytes that a rank receives in the backward.
        gathering, summing: seconds that these take.
        exposed: seconds of both that nothing hides.
        alone: seconds on a single GPU.
    """

    ranks: int
    order: Order
    tokens: int
    forward: float
    backward: float
    gathered: int
    summed: int
    gathering: float
    summing: float
    exposed: float
    alone: float

    @property
    def seconds(self) -> float:
        """Seconds of the call."""
        return self.forward + self.backward + self.exposed

    @property
    def speedup(self) -> float:
        """Speed-up over one GPU."""
        return self.alone / self.seconds


def visible_blocks(first: int, end: int, block: int, stride: int) -> int:
    """The sum over queries t in [first, end) of the compressed blocks that they see, max(0, (t + 1 - l) // d + 1)."""

    def up_to(tokens: int) -> int:
        """The sum over queries before `tokens`."""
        complete = blocks_in(tokens, block, stride)
        # Queries from i * d + l - 1 on see block i.
        return complete * (tokens - block + 1) - stride * complete * (complete - 1) // 2

    return up_to(end) - up_to(first)


def shares(plan: Plan, shards: Shards, rank: int) -> tuple[float, float]:
    """A rank's shares of one sequence's tokens, and of the compressed blocks that queries see; all ranks' add up to 1.

    Specs without compression score a mean key for each selection block instead. Then these count.
    """
    block, stride = _blocks(plan)
    seen = sum(visible_blocks(chunk.start, chunk.end, block, stride) for chunk in shards.chunks_of(rank))
    total = visible_blocks(0, shards.tokens, block, stride)
    return shards.rows(rank) / max(1, shards.tokens), seen / total if total else 1 / shards.ranks


def _blocks(plan: Plan) -> tuple[int, int]:
    spec = plan.spec
    if spec.compression is not None:
        return spec.compression.block, spec.compression.stride
    return (spec.selection.block,) * 2 if spec.selection is not None else (1, 1)


def predict_ranks(
    plan: Plan,
    *,
    tokens: int,
    ranks: int,
    order: Order = "head_tail",
    batch: int = 1,
    head_groups: int = 1,
    reduction: Literal["exchange", "reduce_scatter"] = "exchange",
    gpu_key: str = "h100",
    fabric: Fabric | None = None,
) -> RankPrediction:
    """Predict how long `ContextParallel` takes for a forward and backward of `batch` sequences of `tokens` tokens.

    The assumptions are in the module's docstring and in `Fabric`.

    Raises:
        ValueError: tokens or ranks is not positive.
        UnknownGpuError: `gpu_key` is not in the hardware table.
    """
    shards = Shards(tokens, ranks, order)
    if not tokens:
        raise ValueError("tokens: expected at least 1, got 0")
    fabric = fabric or Fabric()
    times = predict(plan, tokens=tokens, batch=batch, gpu_key=gpu_key)
    directions = {kernel.name: kernel.direction for kernel in plan.kernels}
    one = {"forward": [0.0, 0.0], "backward": [0.0, 0.0]}
    for name, each in times.items():
        if directions[name] in one:
            one[directions[name]][name.startswith(_BY_BLOCKS)] += each.seconds
    each_rank = [shares(plan, shards, rank) for rank in range(ranks)]
    forward, backward = (
        max(sum(part * share for part, share in zip(parts, some, strict=True)) for some in each_rank)
        for parts in one.values()
    )
    raw, compressed = _sent_bytes(plan, shards, batch, head_groups)
    gathered = (ranks - 1) * (raw + compressed)
    widened = 1 if reduction == "exchange" else 4 // _BYTES[plan.dtype]
    summed = widened * gathered
    calls = len(plan.raw_names) + 2 * bool(compressed) + bool(plan.index_dim)
    gathering = _travel(gathered, ranks, fabric, shared=True) + _latency(calls * head_groups, ranks, fabric)
    summing = _travel(summed, ranks, fabric, shared=reduction == "reduce_scatter")
    summing += _latency(calls * head_groups, ranks, fabric)
    # The first gather is waited for. Each later one is exposed as far as it takes longer than the previous forward.
    exposed = gathering / head_groups
    exposed += (head_groups - 1) * max(0.0, (gathering - forward) / head_groups) + summing
    alone = sum(sum(parts) for parts in one.values())
    return RankPrediction(ranks, order, tokens, forward, backward, gathered, summed, gathering, summing, exposed, alone)


def _sent_bytes(plan: Plan, shards: Shards, batch: int, head_groups: int) -> tuple[int, int]:
    """Bytes of keys and values that a rank sends, raw and compressed, including the padding of uneven shards.

    Raw ones include index keys, which every group of heads gathers.
    """
    spec, element = plan.spec, _BYTES[plan.dtype]
    head = {"k": spec.head_dim.qk, "v": spec.head_dim.v}
    token = sum(head[name[0]] for name in plan.raw_names) * spec.heads.kv * element * batch
    token += plan.index_dim * element * batch * head_groups
    raw = token * gathered_rows(shards.segments, shards.ranks)
    if not (plan.compresses and plan.compressed_output):
        return raw, 0
    block, stride = _blocks(plan)
    rows = gathered_rows(shards.block_segments(block, stride), shards.ranks)
    return raw, (head["k"] + head["v"]) * spec.heads.kv * element * batch * rows


def _travel(received: int, ranks: int, fabric: Fabric, *, shared: bool) -> float:
    """Seconds in which each rank receives these bytes, an equal part from each other rank."""
    if ranks == 1:
        return 0.0
    node = min(ranks, fabric.ranks_per_node)
    outside = received * (ranks - node) / (ranks - 1)
    within = received if shared else received - outside
    return max(within / fabric.link, outside / (node if shared else 1) / fabric.network)


def _latency(collectives: int, ranks: int, fabric: Fabric) -> float:
    once, each = fabric.latency
    return collectives * (once + each * ranks) if ranks > 1 else 0.0


def table(plan: Plan, calls: list[tuple[int, int]], gpu_key: str = "h100") -> str:
    """Predictions for (tokens, ranks) as a Markdown table, one line each, with the better of both ways to sum.

    Times are in milliseconds and bytes in megabytes (10^6), per rank.
    """
    lines = [
        "| tokens | ranks | contiguous: slowest kernels | head-tail: kernels | gathered MB | gather | sum | "
        "predicted | speedup | efficiency |",
        "| --: " * 10 + "|",
    ]
    for tokens, ranks in calls:
        contiguous = predict_ranks(plan, tokens=tokens, ranks=ranks, order="contiguous", gpu_key=gpu_key)
        reductions: tuple[Literal["exchange", "reduce_scatter"], ...] = ("exchange", "reduce_scatter")
        best = min(
            (predict_ranks(plan, tokens=tokens, ranks=ranks, reduction=each, gpu_key=gpu_key) for each in reductions),
            key=lambda each: each.seconds,
        )
        slowest, kernels = (1e3 * (each.forward + each.backward) for each in (contiguous, best))
        lines.append(
            f"| {tokens} | {ranks} | {slowest:.1f} | {kernels:.1f} | {best.gathered / 1e6:.0f} | "
            f"{1e3 * best.gathering:.2f} | {1e3 * best.summing:.2f} | {1e3 * best.seconds:.1f} | "
            f"{best.speedup:.1f} | {100 * best.speedup / ranks:.0f}% |"
        )
    return "\n".join(lines)
