"""Inference checked: scenarios against the oracle, one graph over many lengths, and that a step allocates nothing."""

from __future__ import annotations

import inspect
import random
from dataclasses import asdict
from typing import Any

import torch

from nsa_gen.bench.decode import drawn_queries
from nsa_gen.rendering import import_package
from nsa_gen.spec import Spec
from nsa_gen.verification.inference import run_scenario, scenario_of_seed
from nsa_gen.verification.reference.inputs import parameter_shapes
from nsa_gen.verification.reference.oracle import OracleParameters
from nsa_gen.verification.report import Row, environment, raised
from nsa_gen.verification.verify import adapt
from tests.gpu.common import say
from tests.gpu.support import package_of, spec_of_request

REPLAYS = 1000
COMPARED_EVERY = 100
CHUNK = 8192


def inference_job(
    result: dict[str, Any], *, spec: str, device: str, first: int, count: int, graphs: bool, seed: int
) -> None:
    """Go through `count` scenarios of a shipped spec, from seed `first` on; with `graphs`, replay a graph as well."""
    meaning, _ = adapt(spec_of_request(spec), interpreted=device == "cpu", dtype=None, fixed=False)
    module = import_package(package_of(meaning))
    rows: list[Row] = []
    for number in range(seed + first, seed + first + count):
        scenario = scenario_of_seed(meaning, number, device)
        say(f"{spec}: seed {number}: {scenario.text}")
        try:
            rows += run_scenario(meaning, module, scenario, device)
        except Exception as error:  # of the package or of the device
            rows.append(raised(f"{scenario.text} seed {number}", error))
    result.update(environment=asdict(environment(torch.device(device))), rows=[asdict(row) for row in rows])
    bad = sum(not row.ok for row in rows)
    problems = [f"{bad} of {len(rows)} comparisons failed"] if bad or not rows else []
    if graphs and device == "cuda":
        say(f"{spec}: {REPLAYS} replays of one graph")
        for faults in (graph_faults, attached_faults, allocation_faults):
            problems += faults(meaning, module)
        result["shapes"] = [{"repeats": REPLAYS, "shape": "growing lengths"}]
    result["ok"] = not problems
    result["error"] = "; ".join(problems)


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
    written = inspect.signature(module.NSACache.write).parameters
    names = [name for name in module.cache.Layer._fields if name in written and not name.endswith("_cmp")]
    found: dict[str, Any] = {}
    for name in names:
        dim = p.head_dim_qk if name.startswith("k") else p.head_dim_v
        heads, dim = (1, p.index_dim) if name == "k_idx" else (p.kv_heads, dim)
        shape = (batch, tokens, heads, dim)
        found[name] = torch.randn(shape, device="cuda", dtype=getattr(torch, spec.dtype), generator=generator)
    hidden = spec.compression.phi.hidden if spec.compression else None
    shapes = parameter_shapes(p, hidden)
    if shapes:
        fixed = torch.Generator("cuda").manual_seed(0)
        drawn = {
            name: torch.randn(shape, device="cuda", dtype=getattr(torch, spec.dtype), generator=fixed)
            / shape[-2] ** 0.5
            for name, shape in shapes.items()
        }
        found["compression"] = module.CompressionParameters(**drawn)
    return found


def graph_faults(spec: Spec, module: Any) -> list[str]:
    """One graph of a whole step, replayed over growing lengths, held against a fresh cache now and then."""
    batch, first = 4, 1500
    faults = []
    for page_size in (None, 64):
        generator = torch.Generator("cuda").manual_seed(1)
        cache = filled_cache(spec, module, first, batch, room=REPLAYS + 2, page_size=page_size)
        q, gates, out = drawn_queries(spec, batch, 1, first, device=torch.device("cuda"))
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


def attached_faults(spec: Spec, module: Any) -> list[str]:
    """One graph over an engine's pages, in which requests change rows and pages; held against caches of their own."""
    batch, first, page_size, steps = 4, 700, 64, 40
    tokens = first + steps
    width, chance = -(-tokens // page_size), random.Random(0)
    shapes = module.NSACache.page_shapes(page_size)
    layer = {
        name: torch.full((2 * batch * width, *shape), float("nan"), dtype=dtype, device="cuda")
        for name, (shape, dtype) in shapes.items()
    }
    table = torch.zeros(batch, width, dtype=torch.int32, device="cuda")
    cache = module.NSACache.attach([layer], table, page_size=page_size)
    owned = torch.tensor(chance.sample(range(2 * batch * width), batch * width), dtype=torch.int32).view(batch, width)
    generator = torch.Generator("cuda").manual_seed(2)
    drawn = new_tokens(spec, module, batch, tokens, generator)
    whole = {name: x for name, x in drawn.items() if isinstance(x, torch.Tensor)}
    other = {name: x for name, x in drawn.items() if name not in whole}

    def place(order: list[int], held: int, new: int) -> None:
        table.copy_(owned[order])
        cache.assign([held] * batch, [new] * batch)

    place([0, 1, 2, 3], first, first)
    cache.write(**{name: x[:, :first].contiguous() for name, x in whole.items()}, **other)
    q, weights, out = drawn_queries(spec, batch, 1, first, device=torch.device("cuda"))
    new = {name: x[:, :1].clone() for name, x in whole.items()}

    def step() -> None:
        cache.write(**new, **other)
        module.nsa_decode(q, cache, **weights, out=out)

    def bring(order: list[int], held: int) -> None:
        place(order, held, 1)
        for name, x in new.items():
            x.copy_(whole[name][order, held - 1 : held])

    bring([0, 1, 2, 3], first + 1)
    step()  # compiles the kernels; the first replay writes the same token again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    faults = []
    for held in range(first + 1, tokens + 1):
        order = chance.sample(range(batch), batch)
        bring(order, held)
        q.normal_(generator=generator)
        graph.replay()
        own = module.NSACache(batch, width * page_size, page_size=page_size, device="cuda")
        for start, end in ((0, held - 1), (held - 1, held)):
            own.extend(end - start)
            own.write(**{name: x[order, start:end].contiguous() for name, x in whole.items()}, **other)
        expected = module.nsa_decode(q, own, **weights)
        if not torch.equal(out, expected):
            worst = (out.float() - expected.float()).abs().max().item()
            faults.append(
                f"{held} tokens in rows {order} of an engine's pages: differs by {worst:.2e} from its own cache"
            )
    return faults[:4]


def allocation_faults(spec: Spec, module: Any) -> list[str]:
    """A step, without a graph, allocates nothing."""
    cache = filled_cache(spec, module, 1000, 2, room=64, page_size=64)
    q, gates, out = drawn_queries(spec, 2, 1, 1000, device=torch.device("cuda"))
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
