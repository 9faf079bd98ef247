"""Times of decode and of prefill in chunks, beside dense attention and the bytes that must be read.

    python -m tools.gpu.decode nsa_64x4 llama3_8b --json decode.json [--shapes 65536:1 65536:32]

Decode is timed as a captured graph of several layers, whose keys together exceed the L2 cache, over the number of
layers. The floor is the bytes that a step must read over the bandwidth of a plain copy in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nsa_gen.bench.measure import captured
from nsa_gen.rendering import import_package
from nsa_gen.spec import Spec
from nsa_gen.tuning.timed import step_bytes
from nsa_gen.verification.reference.oracle import OracleParameters
from nsa_gen.verification.report import environment
from tests.gpu.common import say
from tests.gpu.inference import CHUNK, new_tokens, queries
from tests.gpu.support import package_of, variant

MOST_CACHE_BYTES = 30e9
COLD_BYTES = 150e6
"""Bytes that the layers decoded in turn read together: three times the L2 cache of an H100."""
SHAPES = [(tokens, batch) for tokens in (65536, 4096, 16384, 262144) for batch in (1, 4, 16, 32, 64)]
"""(Tokens, sequences), the most telling first."""
PROMPT = 131072
ROOM = 64
"""Tokens that a cache is larger than what it holds; part of what kernels are compiled for."""


def measure(spec: str, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Times of a shipped spec's prefill, and of its decode at (tokens, sequences)."""
    meaning = variant(spec, "bfloat16")
    module = import_package(package_of(meaning))
    bandwidth = copy_bandwidth()
    touch_prefill(meaning, module)
    prefill = prefill_times(meaning, module)
    say(
        f"{spec} prefill of {PROMPT}: at once {prefill['whole_ms']:.1f} ms, in chunks of {CHUNK} "
        f"{prefill['chunks_ms']:.1f} ms ({prefill['ratio']:.3f} x)"
    )
    found = []
    for tokens, batch in shapes:
        torch.cuda.empty_cache()
        try:
            found.append(decode_times(meaning, module, tokens, batch, bandwidth))
        except torch.cuda.OutOfMemoryError:
            found.append({"tokens": tokens, "batch": batch, "skipped": "out of memory"})
        say(f"{spec} {decode_line(found[-1])}")
    return {"spec": spec, "copy_tbs": bandwidth / 1e12, "prefill": prefill, "decode": found}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="+")
    parser.add_argument("--shapes", nargs="+", metavar="TOKENS:BATCH", default=[])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    named = [(int(tokens), int(batch)) for tokens, batch in (each.split(":") for each in given.shapes)]
    documents = []
    for spec in given.specs:
        documents.append(measure(spec, named or SHAPES))
        if given.json is not None:
            found_on = asdict(environment(torch.device("cuda")))
            given.json.write_text(json.dumps({"environment": found_on, "specs": documents}, indent=1) + "\n")


def decode_line(found: dict[str, Any]) -> str:
    """What was found at one shape, in a line."""
    shape = f"{found['tokens']:>6} tokens, batch {found['batch']:>2}"
    if "skipped" in found:
        return f"{shape}: skipped, {found['skipped']}"
    dense = "" if found["dense_us"] is None else f"; dense cuDNN {found['dense_us']:.0f} ({found['speedup']:.1f}x)"
    return (
        f"{shape}: decode {found['decode_us']:7.1f} us, {100 * found['floor_fraction']:3.0f}% of the floor "
        f"{found['floor_us']:.1f}; write {found['write_us']:.1f}{dense}"
    )


def touch_prefill(spec: Spec, module: Any) -> None:
    """Compile what timing prefill needs, which does not depend on lengths: a prompt at once, and a chunk behind it."""
    cache = module.NSACache(1, 4096, device="cuda")
    for tokens in (1024, 2048):
        cache.extend(tokens)
        cache.write(**new_tokens(spec, module, 1, tokens, torch.Generator("cuda")))
        q, gates, _ = queries(spec, 1, tokens)
        module.nsa_prefill(q, cache, **gates)
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
    return statistics.median(found)


def copy_bandwidth() -> float:
    """Bytes a second of a plain copy, read and written."""
    x, y = (torch.empty(2**29, dtype=torch.float32, device="cuda") for _ in range(2))
    graph = captured(lambda: y.copy_(x))
    return 2 * x.numel() * 4 / (graph_microseconds(graph, 5, 3) * 1e-6)


def decode_times(spec: Spec, module: Any, tokens: int, batch: int, bandwidth: float) -> dict[str, Any]:
    """Microseconds of a step at one shape: decode, writing a token, dense attention (None where that is refused)."""
    p = OracleParameters.from_spec(spec)
    row = p.kv_heads * (p.head_dim_qk + p.head_dim_v) * 2
    one = batch * tokens * row * (1 + 1 / (p.compression_stride or tokens))
    needed = step_bytes(spec, tokens, batch)
    layers = max(1, min(int(COLD_BYTES / needed) + 1, int(MOST_CACHE_BYTES / one), 32))
    shape = {"tokens": tokens, "batch": batch}
    if one > MOST_CACHE_BYTES:
        return {**shape, "skipped": f"the cache takes {one / 1e9:.0f} GB"}
    cache = random_cache(module, tokens, batch, layers)
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

    writing = graph_microseconds(captured(write), 7, 5) / layers
    dense = _dense_microseconds(spec, cache, q, tokens)
    floor = 1e6 * needed / bandwidth
    return {
        **shape,
        "layers": layers,
        "bytes": needed,
        "decode_us": microseconds,
        "write_us": writing,
        "floor_us": floor,
        "floor_fraction": floor / microseconds,
        "dense_us": dense,
        "speedup": None if dense is None else dense / microseconds,
    }


def random_cache(module: Any, tokens: int, batch: int, layers: int) -> Any:
    """A cache of `tokens` random tokens a sequence, laid down as they are, with room for one more."""
    cache = module.NSACache(batch, tokens + ROOM, layers=layers, device="cuda")
    for tensor in (tensor for layer in cache.layers for tensor in layer):
        tensor.normal_()
    cache.extend(tokens)
    return cache


def _dense_microseconds(spec: Spec, cache: Any, q: torch.Tensor, tokens: int) -> float | None:
    """Dense attention of the same token to the same keys, of the first layer; None where cuDNN refuses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layer = cache.layers[0]
    query = q.transpose(1, 2)
    k, v = (x[:, :tokens].transpose(1, 2) for x in (layer.k, layer.v))

    def attend() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(query, k, v, scale=spec.scale_value, enable_gqa=True)

    try:
        return graph_microseconds(captured(attend), 5, 3)
    except RuntimeError as error:
        say(f"dense refused: {str(error).splitlines()[0][:80]}")
        return None


def prefill_times(spec: Spec, module: Any) -> dict[str, float]:
    """Milliseconds of a prompt at once, and in chunks; the cache is written in both."""
    new = new_tokens(spec, module, 1, PROMPT, torch.Generator("cuda").manual_seed(3))
    q, gates, _ = queries(spec, 1, PROMPT)
    cache = module.NSACache(1, PROMPT, device="cuda")

    def run(chunk: int) -> float:
        cache.reset()
        torch.cuda.synchronize()
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
    return {"tokens": PROMPT, "chunk": CHUNK, "whole_ms": whole, "chunks_ms": chunks, "ratio": chunks / whole}


if __name__ == "__main__":
    main()
