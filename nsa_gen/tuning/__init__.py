"""The tuner: it searches on the GPU at hand, survives bad candidates, never lies, and its results travel.

    space     buckets of calls, and which configurations are worth compiling, by the symbolic space and the cost model
    stage0    compiled ahead of time in parallel: dropped, merged, ranked
    race      candidates and their times: ratios to the default, and noise; the journal of what was found
    backend   one measuring process a GPU, each of which may die; quarantine
    engine    that process from inside: the oracle first, then interleaved times; timed: what is timed, on which inputs
    search    halving, schedules against each other, and a final
    store     what was decided, for which kernels and GPU, for ever; cache: which entry serves a call, and why
    run       all of it, from settings to a report

Importing this package imports neither torch nor triton: both stay in the worker processes.
"""

from nsa_gen.tuning.backend import BackendLost
from nsa_gen.tuning.run import Settings, Tools, TuneReport, dry_run, tune
from nsa_gen.tuning.search import BucketResult
from nsa_gen.tuning.space import Bucket
from nsa_gen.tuning.stage0 import EFFORTS
from nsa_gen.tuning.store import Entry, Store

__all__ = [
    "EFFORTS",
    "BackendLost",
    "Bucket",
    "BucketResult",
    "Entry",
    "Settings",
    "Store",
    "Tools",
    "TuneReport",
    "dry_run",
    "tune",
]
