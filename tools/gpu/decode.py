"""Inference on a GPU: correctness first, then a captured graph over many lengths, allocations, and times.

    python -m tools.gpu.decode SPEC...      one job a spec, the table last

Times of decode are those of a captured graph that decodes several layers, whose keys together exceed the L2 cache, over
the number of layers. The floor is the bytes that a step must read over the bandwidth of a plain copy in the same run.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nsa_gen.rendering import import_package
from nsa_gen.spec import Spec, load_spec
from nsa_gen.verification.inference import run_scenarios
from nsa_gen.verification.inputs import parameter_shapes
from nsa_gen.verification.oracle import OracleParameters
from nsa_gen.verification.verify import environment
from tools.gpu.packages import package_of, variant
from tools.gpu.progress import save, say, seconds_left

SCENARIOS = 10
REPLAYS = 1000
COMPARED_EVERY = 100
SHAPES = ((65536, 1), (65536, 32), (65536, 16), (4096, 1), (4096, 64), (16384, 8), (262144, 1), (262144, 4))
"""(Tokens, sequences) that are timed, the most telling first."""
MOST_CACHE_BYTES = 30e9
COLD_BYTES = 150e6
"""Bytes that the layers decoded in turn read together: three times the L2 cache of an H100."""
PROMPT, CHUNK = 131072, 8192


def decode_job(result: dict[str, Any], *, spec: str, seed: int, root: str, times: bool = True) -> None:
    """Check and time the inference of a shipped spec, in bfloat16."""
    meaning = variant(spec, "bfloat16")
    module = import_package(package_of(meaning, Path(root)))
    result.update(environment=asdict(environment(torch.device("cuda"))), rows=[], table=[])
    rows = run_scenarios(meaning, module, SCENARIOS, seed, "cuda", say)
    result["rows"] = [asdict(row) for row in rows if not row.ok][:20]
    result["comparisons"] = len(rows)
    if not rows or result["rows"]:
        result["error"] = f"{len(result['rows'])} of {len(rows)} comparisons failed, so nothing is timed"
        return
    say(f"{spec}: {REPLAYS} replays of one graph")
    problems = [*graph_faults(meaning, module), *allocation_faults(meaning, module)]
    result["error"] = "; ".join(problems)
    result["table"].append(
        f"{spec}: {len(rows)} comparisons with the oracle ok; {REPLAYS} replays of one graph over growing lengths: "
        f"{result['error'] or 'the bits of fresh caches, nothing allocated'}"
    )
    save(result)
    if problems or not times:
        result["ok"] = not problems
        return
    bandwidth = copy_bandwidth()
    result["copy_tbs"] = bandwidth / 1e12
    for tokens, batch in SHAPES:
        if seconds_left() < 20:
            result["table"].append(f"{spec}: the budget was spent before {tokens} tokens, batch {batch}")
            break
        say(f"{spec}: decode, {tokens} tokens, batch {batch}")
        line = _timed(meaning, module, tokens, batch, bandwidth)
        torch.cuda.empty_cache()
        if line:
            result["table"].append(f"{spec} {line}")
        save(result)
    if seconds_left() > 20:
        say(f"{spec}: prefill of {PROMPT} in chunks of {CHUNK}")
        result["table"].append(f"{spec} {prefill_line(meaning, module)}")
    result["ok"] = True


def filled_cache(
    spec: Spec, module: Any, tokens: int, batch: int, *, room: int = 0, layers: int = 1, **more: Any
) -> Any:
    """A cache whose sequences hold `tokens` random tokens each."""
    cache = module.NSACache(batch, tokens + room, layers=layers, device="cuda", **more)
    generator = torch.Generator("cuda").manual_seed(tokens)
    for start in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - start)
        cache.extend(count)
        for layer in range(layers):
            cache.write(**new_tokens(spec, module, batch, count, generator), layer=layer)
    return cache


def new_tokens(spec: Spec, module: Any, batch: int, tokens: int, generator: torch.Generator) -> dict[str, Any]:
    """Random keys and values, and phi's parameters, as `NSACache.write` takes them."""
    p = OracleParameters.from_spec(spec)
    names = [name for name in module.cache.Layer._fields if not name.endswith("_cmp")]
    found: dict[str, Any] = {}
    for name in names:
        dim = p.head_dim_qk if name.startswith("k") else p.head_dim_v
        shape = (batch, tokens, p.kv_heads, dim)
        found[name] = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
    hidden = spec.compression.phi.hidden if spec.compression else None
    shapes = parameter_shapes(p, hidden)
    if shapes:
        fixed = torch.Generator("cuda").manual_seed(0)
        drawn = {
            name: torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=fixed) / shape[-2] ** 0.5
            for name, shape in shapes.items()
        }
        found["compression"] = module.CompressionParameters(**drawn)
    return found


def queries(spec: Spec, batch: int, tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Random queries, gates by name where the operator has them, and a place for o."""
    p = OracleParameters.from_spec(spec)
    q = torch.randn(batch, tokens, p.query_heads, p.head_dim_qk, device="cuda", dtype=torch.bfloat16)
    gates = torch.randn(batch, tokens, p.query_heads, len(p.branches), device="cuda", dtype=torch.bfloat16)
    out = torch.empty(batch, tokens, p.query_heads, p.head_dim_v, device="cuda", dtype=torch.bfloat16)
    return q, {} if p.gate == "none" else {"gates": gates}, out


def captured(action: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of an action, which is run once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph


def graph_faults(spec: Spec, module: Any) -> list[str]:
    """One graph of a whole step, replayed over growing lengths, held against a fresh cache now and then."""
    batch, first = 4, 1500
    faults = []
    for page_size in (None, 64):
        generator = torch.Generator("cuda").manual_seed(1)
        cache = filled_cache(spec, module, first, batch, room=REPLAYS + 2, page_size=page_size)
        q, gates, out = queries(spec, batch, 1)
        new = new_tokens(spec, module, batch, 1, generator)
        tensors = {name: x for name, x in new.items() if isinstance(x, torch.Tensor)}
        # Compiles the kernels, and is taken back.
        cache.extend(1)
        cache.write(**new)
        module.nsa_decode(q, cache, **gates, out=out)
        cache.truncate(first)

        def step(cache: Any = cache, new: Any = new, q: Any = q, gates: Any = gates, out: Any = out) -> None:
            cache.extend(1)
            cache.write(**new)
            module.nsa_decode(q, cache, **gates, out=out)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        history: list[dict[str, torch.Tensor]] = []
        for replay in range(REPLAYS):
            for x in (*tensors.values(), q):
                x.normal_(generator=generator)
            history.append({name: x.clone() for name, x in tensors.items()})
            cache.reserve(1)
            graph.replay()
            if replay % COMPARED_EVERY == COMPARED_EVERY - 1:
                fresh = filled_cache(spec, module, first, batch, room=REPLAYS + 2, page_size=page_size)
                rest = {name: torch.cat([each[name] for each in history], 1) for name in tensors}
                fresh.extend(len(history))
                fresh.write(**{**new, **rest})
                expected = module.nsa_decode(q, fresh, **gates)
                if not torch.equal(out, expected):
                    worst = (out.float() - expected.float()).abs().max().item()
                    faults.append(f"replay {replay + 1}, pages {page_size}: differs by {worst:.2e} from a fresh cache")
        cache.synchronize()
        if cache.tokens != (first + REPLAYS,) * batch:
            faults.append(f"lengths are {cache.tokens} after {REPLAYS} replays from {first}")
    return faults[:4]


def allocation_faults(spec: Spec, module: Any) -> list[str]:
    """A step, without a graph, allocates nothing."""
    cache = filled_cache(spec, module, 1000, 2, room=64, page_size=64)
    q, gates, out = queries(spec, 2, 1)
    new = new_tokens(spec, module, 2, 1, torch.Generator("cuda"))

    def step() -> None:
        cache.extend(1)
        cache.write(**new)
        module.nsa_decode(q, cache, **gates, out=out)

    step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(8):
        step()
    count = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    return [f"8 steps allocated {count} times"] if count else []


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
    graph = captured(lambda: y.copy_(x) and None)
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


def main(specs: Sequence[str]) -> int:
    """Run the jobs of shipped specs one after the other, and print their tables."""
    lines, ok = [], True
    with tempfile.TemporaryDirectory(prefix="nsa_gen_decode_") as root:
        for name in specs:
            if "decode" not in load_spec(name).passes:
                raise SystemExit(f"{name}: expected a spec with a decode pass, got passes {load_spec(name).passes}")
            result: dict[str, Any] = {"ok": False, "table": []}
            decode_job(result, spec=name, seed=0, root=root)
            ok = ok and result["ok"]
            lines += result["table"]
            lines += [
                f"FAILED {row['case']}: {row['quantity']}: {row['problem'] or row['error']}" for row in result["rows"]
            ]
            lines += [f"FAILED {name}: {result['error']}"] if result.get("error") else []
    print("\n".join(lines))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
