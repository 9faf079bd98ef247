"""The tuner: searches on the GPU at hand, survives bad candidates, and saves results that can be shared.

    space     buckets of calls, and which configurations are worth compiling, by the symbolic space and the cost model
    stage0    compile candidates ahead of time in parallel: drop, merge and rank them
    race      candidates and their times: ratios to the default, and noise; the journal of results
    backend   one measuring process per GPU, each of which may die; quarantine
    engine    the inside of that process: check with the oracle first, then time; timed: what is timed, on which inputs
    search    successive halving, schedules against each other, and a final
    store     results, with the kernels and GPU that they are for; cache: which entry serves a call, and why
    run       everything, from settings to a report

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
