"""Time decode and prefill in chunks, next to dense attention and the bytes that must be read.

    python -m tools.gpu.decode nsa_64x4 llama3_8b --json decode.json [--shapes 65536:1 65536:32]

Decode is timed as `nsa-gen bench SPEC --passes decode` does it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nsa_gen.bench.decode import drawn_queries, measure_decode
from nsa_gen.rendering import import_package
from nsa_gen.spec import Spec
from nsa_gen.verification.reference.oracle import SINKS
from nsa_gen.verification.report import environment
from tests.gpu.common import say
from tests.gpu.inference import CHUNK, new_tokens
from tests.gpu.support import package_of, variant

SHAPES = [(tokens, batch) for tokens in (65536, 4096, 16384, 262144) for batch in (1, 4, 16, 32, 64)]
"""(Tokens, sequences), the most informative first."""
PROMPT = 131072


def measure(spec: str, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Times of a shipped spec's prefill, and of its decode at (tokens, sequences)."""
    meaning = variant(spec, "bfloat16")
    module = import_package(package_of(meaning))
    touch_prefill(meaning, module)
    prefill = prefill_times(meaning, module)
    say(
        f"{spec} prefill of {PROMPT}: at once {prefill['whole_ms']:.1f} ms, in chunks of {CHUNK} "
        f"{prefill['chunks_ms']:.1f} ms ({prefill['ratio']:.3f} x)"
    )
    found = []
    for row in measure_decode(meaning, module, shapes):
        found.append(asdict(row))
        say(f"{spec} {row}")
    return {"spec": spec, "prefill": prefill, "decode": found}


def main() -> None:
    """Run the command that the module's docstring describes."""
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


def touch_prefill(spec: Spec, module: Any) -> None:
    """Compile what timing prefill needs: a whole prompt, and a chunk after it. Lengths do not matter."""
    cache = module.NSACache(1, 4096, device="cuda")
    for tokens in (1024, 2048):
        cache.extend(tokens)
        cache.write(**new_tokens(spec, module, 1, tokens, torch.Generator("cuda")))
        q, gates, _ = drawn_queries(spec, 1, tokens, tokens, device=torch.device("cuda"))
        module.nsa_prefill(q, cache, **gates)
    torch.cuda.synchronize()


def prefill_times(spec: Spec, module: Any) -> dict[str, float]:
    """Milliseconds of a prompt as a whole and in chunks. Both write the cache."""
    new = new_tokens(spec, module, 1, PROMPT, torch.Generator("cuda").manual_seed(3))
    q, gates, _ = drawn_queries(spec, 1, PROMPT, PROMPT, device=torch.device("cuda"))
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
            rows = {name: x if name in SINKS else x[:, part] for name, x in gates.items()}
            module.nsa_prefill(q[:, part], cache, **rows)
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
