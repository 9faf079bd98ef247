"""Print the predicted times of context parallelism: `python tools/predict_ranks.py [SPEC] [--gpu h100]`.

docs/distributed.md has this table. `--calls 262144x2,...` asks for other calls (tokens x ranks).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nsa_gen import load_spec, lower
from nsa_gen.distributed.prediction import table

CALLS = (
    *((262_144, ranks) for ranks in (2, 4, 8, 64)),
    *((1_048_576, ranks) for ranks in (8, 64, 512)),
    *((8_388_608, ranks) for ranks in (64, 512)),
)


def _call(text: str) -> tuple[int, int]:
    tokens, _, ranks = text.partition("x")
    return int(tokens), int(ranks)


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("spec", nargs="?", default="llama3_8b", help="a spec's path or shipped name (llama3_8b)")
    parser.add_argument("--gpu", default="h100", help="of the hardware table (h100)")
    parser.add_argument("--calls", help="tokens x ranks, by commas")
    options = parser.parse_args()
    calls = [_call(each) for each in options.calls.split(",")] if options.calls else list(CALLS)
    print(table(lower(load_spec(options.spec)), calls, options.gpu))


if __name__ == "__main__":
    main()
