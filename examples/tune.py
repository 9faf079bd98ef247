"""Find the fastest tiles of an operator on this machine's GPU; without a GPU, show what would be tried.

    python examples/tune.py [SPEC]

On a GPU, the result is saved where the operator finds it. Without a GPU, candidates are compiled for an H100 and ranked
by the cost model. The default spec has only a window, whose single kernel compiles in seconds. The command for this is
`nsa-gen tune`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nsa_gen.spec import load_spec, parse_spec
from nsa_gen.tuning import dry_run, tune
from nsa_gen.tuning.run import TuneReport

WINDOW = """
version: 1
name: window_only
heads: {query: 4, kv: 2}
head_dim: 32
dtype: bfloat16
window: {size: 128}
combine: {gate: none}
passes: [forward]
"""


def main(spec: str | None = None) -> TuneReport:
    """Tune, or compile and rank candidates, and print the result for each kernel."""
    loaded = parse_spec(WINDOW) if spec is None else load_spec(spec)
    settings = {"shapes": (8192,), "effort": "quick"}
    report = tune(loaded, **settings) if torch.cuda.is_available() else dry_run(loaded, "h100", **settings)
    for bucket, selections in report.selections.items():
        for each in selections:
            print(f"{each.kernel}, {bucket.tokens} tokens: {each.legal} legal configurations, to be timed are")
            for survivor in each.survivors:
                values = ", ".join(f"{name}={value}" for name, value in survivor.config.items())
                print(f"  {values}: {1e6 * survivor.seconds:.1f} us predicted, {survivor.registers} registers")
    for result in report.results:
        print(f"{result.bucket.tokens} tokens: {result.gain:.3f} times the default's speed, saved in {result.saved}")
    return report


if __name__ == "__main__":
    main(*sys.argv[1:2])
