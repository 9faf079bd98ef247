"""Times of decode and of prefill in chunks, beside dense attention and the bytes that must be read.

Decode is timed as a captured graph of several layers, whose keys together exceed the L2 cache, over the number of
layers. The floor is the bytes that a step must read over the bandwidth of a plain copy in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nsa_gen.rendering import import_package
from nsa_gen.spec import Spec
from nsa_gen.verification.oracle import OracleParameters
from nsa_gen.verification.verify import environment
from tools.gpu.inference import CHUNK, captured, filled_cache, new_tokens, queries
from tools.gpu.packages import package_of, variant
from tools.gpu.progress import save, say, seconds_left

MOST_CACHE_BYTES = 30e9
COLD_BYTES = 150e6
"""Bytes that the layers decoded in turn read together: three times the L2 cache of an H100."""
PROMPT = 131072


def decode_job(
    result: dict[str, Any], *, spec: str, shapes: Sequence[Sequence[int]], timed: bool, seed: int, root: str
) -> None:
    """Time the decode of a shipped spec at (tokens, sequences), and its prefill; not `timed`, run each shape once."""
    meaning = variant(spec, "bfloat16")
    module = import_package(package_of(meaning, Path(root)))
    result.update(environment=asdict(environment(torch.device("cuda"))), table=[], seed=seed)
    bandwidth = copy_bandwidth() if timed else 1.0
    result["copy_tbs"] = bandwidth / 1e12
    for tokens, batch in shapes:
        if seconds_left() < 20:
            result["table"].append(f"{spec}: the budget was spent before {tokens} tokens, batch {batch}")
            break
        say(f"{spec}: decode, {tokens} tokens, batch {batch}")
        if timed:
            result["table"].append(f"{spec} {_timed(meaning, module, tokens, batch, bandwidth)}")
        else:
            touch(meaning, module, tokens, batch)
        torch.cuda.empty_cache()
        save(result)
    if timed and seconds_left() > 20:
        say(f"{spec}: prefill of {PROMPT} in chunks of {CHUNK}")
        result["table"].append(f"{spec} {prefill_line(meaning, module)}")
    result["ok"] = True


def touch(spec: Spec, module: Any, tokens: int, batch: int) -> None:
    """Compile what timing a shape needs, on a cache of that capacity that holds little."""
    cache = module.NSACache(batch, tokens + 64, device="cuda")
    new = new_tokens(spec, module, batch, 100, torch.Generator("cuda"))
    cache.extend(100)
    cache.write(**new)
    q, gates, out = queries(spec, batch, 1)
    cache.extend(1)
    cache.write(**new_tokens(spec, module, batch, 1, torch.Generator("cuda")))
    module.nsa_decode(q, cache, **gates, out=out)
    torch.cuda.synchronize()


def graph_microseconds(graph: torch.cuda.CUDAGraph, repeats: int = 15, inner: int = 10) -> float:
    """Median microseconds of a replay."""
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * start.elapsed_time(end) / inner)
    return sorted(found)[len(found) // 2]


def copy_bandwidth() -> float:
    """Bytes a second of a plain copy, read and written."""
    x, y = (torch.empty(2**29, dtype=torch.float32, device="cuda") for _ in range(2))

    def copy() -> None:
        y.copy_(x)

    graph = captured(copy)
    return 2 * x.numel() * 4 / (graph_microseconds(graph, 5, 3) * 1e-6)


def step_bytes(spec: Spec, tokens: int, batch: int) -> int:
    """Bytes of keys and values that a step must read: compressed blocks, selected blocks, the window."""
    p = OracleParameters.from_spec(spec)
    rows = p.compressed_blocks(tokens) + (p.selection_count * p.selection_block if p.selection_block else 0)
    rows += p.window or 0
    return batch * p.kv_heads * rows * (p.head_dim_qk + p.head_dim_v) * 2


def _timed(spec: Spec, module: Any, tokens: int, batch: int, bandwidth: float) -> str:
    p = OracleParameters.from_spec(spec)
    row = p.kv_heads * (p.head_dim_qk + p.head_dim_v) * 2
    one = batch * tokens * row * (1 + 1 / (p.compression_stride or tokens))
    needed = step_bytes(spec, tokens, batch)
    layers = max(1, min(int(COLD_BYTES / needed) + 1, int(MOST_CACHE_BYTES / one), 32))
    if one > MOST_CACHE_BYTES:
        return f"{tokens} tokens, batch {batch}: skipped, the cache takes {one / 1e9:.0f} GB"
    cache = filled_cache(spec, module, tokens, batch, room=64, layers=layers)
    q, gates, out = queries(spec, batch, 1)

    def decode() -> None:
        for layer in range(layers):
            module.nsa_decode(q, cache, **gates, layer=layer, out=out)

    microseconds = graph_microseconds(captured(decode)) / layers
    new = new_tokens(spec, module, batch, 1, torch.Generator("cuda"))
    # Written over the newest token again and again: the lengths stay.
    cache.extend(1)

    def write() -> None:
        for layer in range(layers):
            cache.write(**new, layer=layer)

    writing = graph_microseconds(captured(write)) / layers
    dense = _dense_microseconds(spec, cache, q, tokens)
    floor = 1e6 * needed / bandwidth
    return (
        f"{tokens:>6} tokens, batch {batch:>2}: decode {microseconds:7.1f} us, {100 * floor / microseconds:3.0f}% of "
        f"the floor {floor:.1f}; write {writing:.1f}; dense cuDNN {dense}"
    )


def _dense_microseconds(spec: Spec, cache: Any, q: torch.Tensor, tokens: int) -> str:
    """Dense attention of the same token to the same keys, of the first layer."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layer = cache.layers[0]
    query = q.transpose(1, 2)
    k, v = (x[:, :tokens].transpose(1, 2) for x in (layer.k, layer.v))

    def attend() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(query, k, v, scale=spec.scale_value, enable_gqa=True)

    try:
        return f"{graph_microseconds(captured(attend), 5, 5):.0f}"
    except RuntimeError as error:
        return f"refused ({str(error).splitlines()[0][:60]})"


def prefill_line(spec: Spec, module: Any) -> str:
    """Time of a prompt in chunks beside that of the same prompt at once."""
    new = new_tokens(spec, module, 1, PROMPT, torch.Generator("cuda").manual_seed(3))
    q, gates, _ = queries(spec, 1, PROMPT)
    cache = module.NSACache(1, PROMPT, device="cuda")

    def run(chunk: int) -> float:
        cache.reset()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for first in range(0, PROMPT, chunk):
            part = slice(first, first + chunk)
            cache.extend(chunk)
            kept = {name: x[:, part] if isinstance(x, torch.Tensor) else x for name, x in new.items()}
            cache.write(**kept)
            module.nsa_prefill(q[:, part], cache, **{name: x[:, part] for name, x in gates.items()})
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    both: dict[int, list[float]] = {PROMPT: [], CHUNK: []}
    for _ in range(4):
        for chunk, times in both.items():
            times.append(run(chunk))
    whole, chunks = (sorted(times[1:])[1] for times in both.values())
    return f"prefill of {PROMPT}: at once {whole:.1f} ms, in chunks of {CHUNK} {chunks:.1f} ms ({chunks / whole:.2f} x)"
