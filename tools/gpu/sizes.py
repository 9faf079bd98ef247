"""What the suite runs, in numbers: parts, specs, lengths, repeats, and what each may cost."""

from __future__ import annotations

from collections.abc import Mapping

PARTS = (
    "correctness",
    "inference",
    "examples",
    "repeats",
    "hopper",
    "hygiene",
    "long",
    "sanitizer",
    "far",
    "soak",
    "tuner_faults",
    "pytorch",
    "training",
    "fla",
    "decode",
    "bench",
)
"""Every part, in the order in which they are reported."""
CPU_PARTS = ("correctness", "inference", "examples", "repeats", "hygiene", "far", "soak", "pytorch", "training")
"""What Triton's interpreter can do, at tiny sizes."""
PHASES = (
    ("correctness", "inference", "examples", "repeats", "hopper", "hygiene", "long", "sanitizer"),
    ("far",),
    ("soak",),
    ("tuner_faults",),
    ("pytorch", "training", "fla"),
)
"""Parts that run side by side, one phase after the other: `far` needs most of the GPU's memory, `soak` takes every
worker for as long as it lasts, and `tuner_faults` has kernels that never end. Decode and the benchmark come last, by
themselves."""
DTYPES = ("bfloat16", "float16", "float32")
LENGTHS = (1, 31, 63, 65, 511, 2049, 8192)
PACKED = ((700, 0, 1, 2049, 63), (1, 0, 511, 65, 0))
"""Packed batches beside verify's own, on a GPU: with sequences longer than a window, and than all selected blocks."""
LONG = ("llama3_8b", 131072)
LONG_ROWS = 48
EXAMPLES = {"cuda": 2240, "cpu": 300}
"""Examples of the part of that name, unless told otherwise."""
DRAWN_SPECS = {"cuda": 21, "cpu": 24}
"""Specs of the examples that are drawn rather than shipped."""
SHIPPED_SHARE = {"cuda": 0.4, "cpu": 0.4}
"""How much of the examples goes to shipped specs, whose calls are larger."""
EXAMPLE_SEEDS = 100_000
"""Seeds between the first ones of two jobs."""
REPEATS = {"cuda": (200, (4096, (1500, 0, 1, 2595))), "cpu": (3, (19, (9, 0, 1, 5)))}
"""How often, and at which lengths, a call is repeated."""
HYGIENE = {"cuda": ((1500, 0, 1, 2595), 4096, 16384), "cpu": (19, (9, 0, 1, 5))}
SOAK_PER_SPEC = {"cuda": 30, "cpu": 4}
FAR_LIMIT = {"cuda": 2**31, "cpu": 2**12}
"""Elements beyond which a tensor is far."""
TUNER_FAULTS = ("illegal access", "hang", "wrong", "out of memory", "crash")
TUNER_RUNS = ("worker killed", "run killed", "two tuners", "read-only cache", "full disk")
"""What goes wrong for the tuner: a candidate, or the run."""
SOAK_SEED = 1_000_000_000
"""The first seed of a soak's specs, far from those of the examples."""
RESERVED_GB = 1.0
"""What a process takes of the GPU's memory without asking for a share."""
BENCHED: Mapping[str, tuple[int, ...]] = {
    "llama3_8b": (8192, 32768, 65536),
    "nsa_64x4": (8192, 32768, 65536),
    "mha_16": (8192, 32768),
    "nsa_paper": (8192, 32768, 65536),
}
PYTORCH = ("llama3_8b", "mha_16", "tiny")
"""Specs that PyTorch's tools are tried on."""
DECODED = ("nsa_64x4", "llama3_8b")
"""Specs whose decode is timed."""
DECODE_TARGETS = ((65536, 1), (65536, 32), (65536, 16))
DECODE_SHAPES = (
    *DECODE_TARGETS,
    *(
        (tokens, batch)
        for tokens in (4096, 16384, 65536, 262144)
        for batch in (1, 4, 16, 64)
        if (tokens, batch) not in DECODE_TARGETS
    ),
)
"""(Tokens, sequences) at which decode is timed, the most telling first."""
DECODE_JOBS = 7
"""Processes a spec that compile what these need."""
SCENARIO_JOBS = {"cuda": (4, 2), "cpu": (1, 2)}
"""Jobs a spec, and scenarios a job."""
MEMORY_SHARE_GB = 25
"""What a process verifying 64 heads of 192 at 8192 tokens in float32 needs: some 20 tensors of 0.8 GB in float64."""
