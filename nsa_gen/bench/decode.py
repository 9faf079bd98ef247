"""Times of decode steps on full caches, by context and batch, contiguous and paged, next to dense attention.

A step is timed as a captured graph of several layers, whose keys together exceed the L2 cache, divided by the number of
layers. The floor is the bytes of keys and values that a step must read, divided by the bandwidth of a plain copy,
measured in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from nsa_gen.bench.measure import captured, faults, first_line
from nsa_gen.bench.records import DecodeRow
from nsa_gen.verification.inference import fixed_scenarios, run_scenario
from nsa_gen.verification.reference.inputs import make_inputs
from nsa_gen.verification.reference.oracle import SINKS, OracleParameters

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

COLD_BYTES = 200e6
"""Bytes that the layers of a step read together: four times the L2 cache of an H100, so each layer finds it cold."""
MOST_LAYERS = 32
ROOM = 64
"""Free tokens of a benchmarked cache beyond those it holds."""
PAGE_SIZE = 64
"""Tokens per page of the benchmarked paged cache."""
COPIED_FLOATS = 2**28
FREE_SHARE = 0.8
"""The largest share of free memory that the caches of a step may take."""


@dataclass(frozen=True)
class DecodeInputs:
    """A full cache of several layers, and one query per sequence; `step` decodes with every layer in turn.

    Attributes:
        cache: the package's NSACache.
        q: queries (B, 1, Hq, Dk).
        arguments: gates, index queries, lists of blocks and sinks, if the operator takes them.
        out: where o is written.
        layers: how many layers a step goes through.
    """

    package: Any
    cache: Any
    q: torch.Tensor
    arguments: dict[str, torch.Tensor]
    out: torch.Tensor
    layers: int

    def step(self) -> None:
        """Decode one token per sequence in every layer."""
        for layer in range(self.layers):
            self.package.nsa_decode(self.q, self.cache, layer=layer, out=self.out, **self.arguments)


def step_bytes(spec: Spec, tokens: int, batch: int) -> int:
    """Bytes of keys and values that a step must read: compressed blocks, selected blocks, the window."""
    p = OracleParameters.from_spec(spec)
    raw = min(p.selection_count * (p.selection_block or 0), tokens) + min(p.window or 0, tokens)
    return batch * p.kv_heads * _head_bytes(spec, p, raw, tokens)


def cache_bytes(spec: Spec, tokens: int, batch: int) -> int:
    """Approximate bytes of one layer of a cache: raw keys and values of one pair, and compressed ones."""
    p = OracleParameters.from_spec(spec)
    return batch * p.kv_heads * _head_bytes(spec, p, tokens, tokens)


def _head_bytes(spec: Spec, p: OracleParameters, raw: int, tokens: int) -> int:
    """Bytes of one KV head's keys and values: `raw` raw rows, and the compressed ones of a sequence."""
    element = torch.empty(0, dtype=getattr(torch, spec.dtype)).element_size()
    compressed = p.compressed_blocks(tokens) * (p.head_dim_qk + p.head_dim_v * p.compression_output)
    return raw * (p.head_dim_qk + p.head_dim_v) * (1 if spec.cache else element) + compressed * element


def decode_inputs(
    spec: Spec,
    package: Any,
    tokens: int,
    batch: int,
    *,
    device: torch.device,
    seed: int = 0,
    room: int = 0,
    page_size: int | None = None,
) -> DecodeInputs:
    """A cache with `tokens` random tokens per sequence and room for more. It has too many layers to stay in L2."""
    generator = torch.Generator(device).manual_seed(seed)
    needed = step_bytes(spec, tokens, batch)
    layers = max(1, min(int(COLD_BYTES / needed) + 1, MOST_LAYERS)) if device.type == "cuda" else 1
    cache = package.NSACache(batch, tokens + room, layers=layers, page_size=page_size, device=device)
    for layer in cache.layers:
        for tensor in layer:
            if tensor.dtype == torch.uint8:  # codes; 0x7f is NaN
                tensor.random_(0, 0x60, generator=generator)
            elif tensor.dim() == 4:
                tensor.normal_(generator=generator)
    cache.extend(tokens)
    q, arguments, out = drawn_queries(spec, batch, 1, tokens, device=device, seed=seed, generator=generator)
    return DecodeInputs(package, cache, q, arguments, out, layers)


def drawn_queries(
    spec: Spec,
    batch: int,
    queries: int,
    tokens: int,
    *,
    device: torch.device,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The other arguments of `nsa_prefill` and `nsa_decode` for a cache of `tokens` tokens and `queries` new ones.

    Returns random q (B, queries, Hq, Dk); a dict of gates, index queries, sinks and lists of blocks, as far as the
    operator takes them, with blocks spread evenly over the tokens; and a tensor for o.
    """
    small = make_inputs(spec, batch=1, tokens=64, dtype=getattr(torch, spec.dtype), device=device, seed=seed)
    shape = (batch, queries, *small.q.shape[2:])
    q = torch.randn(shape, generator=generator, dtype=small.q.dtype, device=device)
    out = torch.empty((*shape[:-1], spec.head_dim.v), dtype=q.dtype, device=device)
    arguments: dict[str, torch.Tensor] = {name: x for name in SINKS if (x := getattr(small, name)) is not None}
    for name in ("gates", "q_idx"):
        if (like := getattr(small, name)) is not None:
            shape = (batch, queries, *like.shape[2:])
            arguments[name] = torch.randn(shape, generator=generator, dtype=q.dtype, device=device)
    if small.indices is not None:
        assert spec.selection is not None
        blocks = torch.arange(spec.selection.count, dtype=torch.int32, device=device)
        spread = blocks * max(1, tokens // spec.selection.block // spec.selection.count)
        arguments["indices"] = spread.expand(batch, queries, spec.scopes, -1).contiguous()
    return q, arguments, out


def decode_faults(spec: Spec, package: Any, device: str = "cuda") -> list[str]:
    """What is wrong with decode compared with the oracle: contiguous and paged, with more blocks than are selected."""
    contiguous, paged, *_ = fixed_scenarios(OracleParameters.from_spec(spec))
    return [fault for each in (contiguous, paged) for fault in faults(run_scenario(spec, package, each, device))]


def measure_decode(
    spec: Spec, package: Any, shapes: Iterable[tuple[int, int]], *, dense: bool = True, seed: int = 0
) -> Iterator[DecodeRow]:
    """One row for each (tokens, batch). What does not fit or fails is a row that says so."""
    bandwidth = copy_bandwidth()
    for tokens, batch in shapes:
        torch.cuda.empty_cache()
        try:
            yield _measured(spec, package, tokens, batch, bandwidth, dense=dense, seed=seed)
        except (torch.cuda.OutOfMemoryError, ValueError) as error:
            yield DecodeRow(spec.name, tokens, batch, problem=first_line(error))


def _measured(
    spec: Spec, package: Any, tokens: int, batch: int, bandwidth: float, *, dense: bool, seed: int
) -> DecodeRow:
    needed = step_bytes(spec, tokens, batch)
    row = DecodeRow(spec.name, tokens, batch, needed, 1e6 * needed / bandwidth)
    free, size = torch.cuda.mem_get_info()[0], cache_bytes(spec, tokens, batch)
    if size > FREE_SHARE * free:
        return replace(row, problem=f"the cache takes {size / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    found: dict[str, float] = {}
    for name, page_size in (("us", None), ("paged_us", PAGE_SIZE)):
        inputs = decode_inputs(
            spec, package, tokens, batch, device=torch.device("cuda"), seed=seed, room=ROOM, page_size=page_size
        )
        found[name] = graph_microseconds(captured(inputs.step)) / inputs.layers
        if dense and page_size is None and (beside := _dense_microseconds(spec, inputs, tokens)) is not None:
            found["dense_us"] = beside
        del inputs
        torch.cuda.empty_cache()
    return replace(row, **found)


def graph_microseconds(graph: torch.cuda.CUDAGraph, repeats: int = 15, inner: int = 10) -> float:
    """Median microseconds per replay, over rounds of several replays in a row.

    An untimed replay comes first: while it runs, the host launches the timed ones.
    """
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(inner):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * start.elapsed_time(end) / inner)
    return statistics.median(found)


def copy_bandwidth() -> float:
    """Bytes per second of a plain copy, counting reads and writes."""
    x, y = (torch.empty(COPIED_FLOATS, dtype=torch.float32, device="cuda") for _ in range(2))
    graph = captured(lambda: y.copy_(x))
    return 2 * x.nbytes / (graph_microseconds(graph, 5, 3) * 1e-6)


def _dense_microseconds(spec: Spec, inputs: DecodeInputs, tokens: int) -> float | None:
    """cuDNN's dense attention of the same queries to a layer's keys, in microseconds; None if cuDNN refuses.

    It goes through all layers, so it finds each layer's keys as cold as our step does.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layers = [layer._asdict() for layer in inputs.cache.layers]
    if not {"k", "v"} <= set(layers[0]):
        return None
    query = inputs.q.transpose(1, 2)
    keys = [tuple(layer[name][:, :tokens].transpose(1, 2) for name in "kv") for layer in layers]

    def attend() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for k, v in keys:
                torch.nn.functional.scaled_dot_product_attention(query, k, v, scale=spec.scale_value, enable_gqa=True)

    try:
        return graph_microseconds(captured(attend), 5, 3) / len(keys)
    except RuntimeError:
        return None
